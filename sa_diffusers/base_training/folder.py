"""The folder that a base model or a classifier is written into."""

from collections.abc import Collection
from pathlib import Path

from ..training.checkpoints import CHECKPOINT_PREFIX


def check_is_own(folder: Path, sign: str, beside: Collection[str] = ()) -> None:
    """Refuse a folder that holds something other than an earlier training of this kind.

    Args:
        folder: It need not be there.
        sign: The file that a finished training leaves.
        beside: What one that was stopped may have left, apart from checkpoints and what is hidden.

    Raises:
        ValueError: It is a file, or holds something else.
    """
    if folder.is_file():
        raise ValueError(f"--output_dir {folder} is a file: choose a folder")
    if not folder.is_dir():
        return
    held = {entry.name for entry in folder.iterdir() if not entry.name.startswith((".", CHECKPOINT_PREFIX))}
    if held - {*beside} and sign not in held:
        raise ValueError(
            f"--output_dir {folder} already holds something else (no {sign} in it): choose an empty folder"
        )
