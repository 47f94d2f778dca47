"""What a model's name can be told from, before anything of it is read: a folder, a name on the Hub, a mistake."""

import re
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from ..messages import near_paths, shown, shown_error
from ..weights import WEIGHT_SUFFIXES

HUB_TIMEOUT_SECONDS = 10
# What is in the folder of an erasure that holds what was trained alone, and says of which base model.
TRAINED_NAME = "trained_components.json"
# What is in the folder of an erasure that is an adapter.
ADAPTER_NAME = "pytorch_lora_weights.safetensors"
_EXAMPLE = "CompVis/stable-diffusion-v1-4"
_PATH_SIGNS = ("/", "./", "../", "~", ".\\", "..\\", "\\")


def expanded(name_or_path: str) -> str:
    """A path with its `~` expanded; anything else as it is.

    Raises:
        ValueError: There is no such user.
    """
    if not str(name_or_path).startswith("~"):
        return str(name_or_path)
    try:
        return str(Path(name_or_path).expanduser())
    except RuntimeError as error:
        raise ValueError(f'"{shown(name_or_path)}": there is no such user: give the whole path') from error


def looks_like_path(text: str) -> bool:
    """Whether a text can only be meant as a path, and not as a name on the Hub."""
    return (
        text.startswith(_PATH_SIGNS)
        or "\\" in text
        or text.endswith("/")
        or text.count("/") > 1
        or text.lower().endswith((*WEIGHT_SUFFIXES, ".json", ".yaml", ".yml", ".zip", ".gguf"))
        or re.match(r"[A-Za-z]:[\\/]", text) is not None
    )


def check_name(name_or_path: str, setting: str = "pretrained_model_name_or_path") -> None:
    """What can be said of a name without looking at the Hub.

    Raises:
        ValueError: It can be none.
    """
    name = f'{setting}="{shown(name_or_path, 200)}"'
    try:
        path = Path(name_or_path)
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is not a name: give a folder, or a name such as {_EXAMPLE}") from error
    if not name_or_path.strip():
        raise ValueError(f"{setting} is empty: give a folder, or a name such as {_EXAMPLE}")
    if is_folder:
        if not any((path / file).is_file() for file in (DiffusionPipeline.config_name, TRAINED_NAME)):
            inner = [entry for entry in sorted(path.iterdir()) if (entry / DiffusionPipeline.config_name).is_file()]
            hint = f"; did you mean {inner[0]}?" if inner else ""
            if (path.parent / DiffusionPipeline.config_name).is_file():
                hint = f"; did you mean {path.parent}?"
            if (path / ADAPTER_NAME).is_file():
                raise ValueError(
                    f"{name} is a folder that holds an adapter: give the model that it was trained on, or fuse the two "
                    "with `sa-diffusers merge` and give the folder that it writes"
                )
            raise ValueError(
                f"{name} is a folder without {DiffusionPipeline.config_name}: give the folder of a saved pipeline{hint}"
            )
    elif is_file and path.suffix.lower() == ".safetensors":
        return
    elif is_file and path.suffix.lower() in WEIGHT_SUFFIXES:
        raise ValueError(
            f"{name} is a pickle, which may run code of whoever made it when it is read: give the .safetensors file of "
            "the same model, which most publishers have beside it, or the folder of a pipeline"
        )
    elif is_file and path.name == DiffusionPipeline.config_name:
        raise ValueError(f"{name} is a file of a pipeline: give its folder, {path.parent}")
    elif is_file:
        raise ValueError(f"{name} is a file: give the folder of a saved pipeline, or a name such as {_EXAMPLE}")
    elif looks_like_path(name_or_path):
        raise ValueError(f"{name}: there is no such file or folder{near_paths(path)}")


def why_unreachable(name: str, revision: str | None) -> str | None:
    """Ask the Hub for a model; the reason if it cannot be asked.

    Raises:
        ValueError: The Hub answers that there is no such model, or no leave to read it.
    """
    if constants.HF_HUB_OFFLINE:
        return "offline mode is on: HF_HUB_OFFLINE is set"
    advice = f"give a folder, or a name such as {_EXAMPLE}{near_paths(name)}"
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise ValueError(
            f'the model "{name}" is gated: accept its terms on its page, then run `hf auth login`'
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f'the model "{name}" has no revision "{revision}" on the Hub') from error
    except RepositoryNotFoundError as error:
        raise ValueError(f'there is no model "{name}", neither as a folder nor on the Hub: {advice}') from error
    except HFValidationError as error:
        raise ValueError(f'"{name}" is neither a folder nor a name on the Hub ({error}): {advice}') from error
    except Exception as error:  # the kinds of network errors depend on huggingface_hub's HTTP library
        return f"{type(error).__name__}: {shown_error(error)}"
    return None


def resolved_revision(name_or_path: str, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """The commit that a name on the Hub stands for in the local cache; None for a folder or a file."""
    if Path(name_or_path).exists():
        return None
    for name in (DiffusionPipeline.config_name, TRAINED_NAME):
        index = try_to_load_from_cache(name_or_path, name, cache_dir, revision)
        if isinstance(index, str):
            return Path(index).parent.name
    return None
