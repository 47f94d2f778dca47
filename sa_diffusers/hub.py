"""Publishing an erased pipeline."""

from pathlib import Path

from huggingface_hub import HfApi

# What a run needs and a reader does not.
_LEFT_OUT = ["checkpoint-*", "checkpoint-*/**", "logs/**", ".*", ".*/**"]


def push_folder(folder: str | Path, repo_id: str | None = None, private: bool = False) -> str:
    """Upload an output folder to the Hub, without checkpoints and logs; the token is the one of `hf auth login`.

    Args:
        folder: A finished output folder.
        repo_id: Name on the Hub (default: the folder's name, under the user).
        private: Make a new repository private.

    Returns:
        The address of the repository.

    Raises:
        ConnectionError: The upload failed. The folder is unchanged; the message says how to repeat it.
    """
    folder = Path(folder)
    api = HfApi()
    name = repo_id or folder.resolve().name
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            ignore_patterns=_LEFT_OUT,
            commit_message="Upload erased pipeline",
        )
    except Exception as error:
        raise ConnectionError(
            f'the upload to "{name}" failed ({error}). {folder} is whole: log in with `hf auth login`, then upload it '
            f"with `hf upload {name} {folder}`, or run the same command again"
        ) from error
    return str(repository)
