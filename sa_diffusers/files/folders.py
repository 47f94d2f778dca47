"""Whole folders: made beside and renamed into place, replaced entry by entry, set aside."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from .single import WRITING, disk_errors, flush_to_disk, flush_tree, is_alive, owner, permissions, read_json, write_json

_SAVING, _SAVED, _RETIRED, _LEAVING = ".saving-", ".saved", ".retired", ".leaving.json"
Kept = TypeVar("Kept")


@contextlib.contextmanager
def new_folder(folder: str | Path, shared: bool = True) -> Iterator[Path]:
    """Yield an empty folder; on success it becomes `folder` in one step, if there is none by then, or an empty one.

    Args:
        folder: A link leads to where it is made.
        shared: Whether a run that was faster has made the same, and what it made stays.

    Raises:
        OSError: As raised while writing, with the place and what to do added to its message.
    """
    with disk_errors(Path(folder)):
        # Over a link no folder can be renamed.
        folder = Path(os.path.realpath(folder))
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent, f".{folder.name}{WRITING}")
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}{WRITING}{owner()}-", dir=folder.parent))
        try:
            yield staging
            flush_tree(staging)
            staging.chmod(permissions(0o777))
            try:
                staging.rename(folder)
            except OSError:
                if not (shared and folder.is_dir() and any(folder.iterdir())):
                    raise
            flush_to_disk(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def remade_folder(folder: str | Path) -> Iterator[Path]:
    """Yield the place of a folder that is not there yet; on success it takes that of `folder`, which is deleted.

    Who reads meanwhile finds the one, the other, or none for a moment.

    Raises:
        OSError: As raised while writing, with the place and what to do added to its message.
    """
    folder = Path(folder)
    with disk_errors(folder):
        prefix = f".{folder.name}{WRITING}"
        sweep(folder.parent, prefix)
        staging = Path(tempfile.mkdtemp(prefix=f"{prefix}{owner()}-", dir=folder.parent))
        try:
            yield staging / "new"
            folder.rename(staging / "earlier")
            (staging / "new").rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(folder: str | Path, leaving: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder; on success its entries replace those of the same name in `folder`.

    Nothing in `folder` is touched until everything is written: an error inside the block (a full disk, say) removes
    the new files and leaves the old ones whole. A process that dies while the entries move leaves what
    `finish_interrupted` needs.

    Args:
        folder: Made if it is not there.
        leaving: Entries of `folder`, or of folders in it, that belong to the old ones: they go in the same step, and so
            does a folder that is empty then.

    Raises:
        OSError: As raised while writing, with the place and what to do added to its message.
    """
    folder = Path(folder)
    is_new = not folder.is_dir()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        finish_interrupted(folder)
        staging = Path(tempfile.mkdtemp(prefix=f"{_SAVING}{owner()}-", dir=folder))
        try:
            yield staging
            write_json(staging / _LEAVING, list(leaving))
            flush_tree(staging)
            staging.rename(folder / _SAVED)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        _move_in(folder)


def is_interrupted(folder: str | Path) -> bool:
    """Whether new entries of `replacing_folder` have still to be moved in."""
    return (Path(folder) / _SAVED).is_dir()


def finish_interrupted(folder: str | Path) -> bool:
    """Finish what a process that died in `replacing_folder` began, or take it back.

    Returns:
        Whether new entries had still to be moved in.
    """
    folder = Path(folder)
    sweep(folder, _SAVING)
    _sweep_files(folder)
    if not is_interrupted(folder):
        return False
    _move_in(folder)
    return True


def _move_in(folder: Path) -> None:
    saved = folder / _SAVED
    retired = saved / _RETIRED
    retired.mkdir(exist_ok=True)
    if (saved / _LEAVING).is_file():
        for name in read_json(saved / _LEAVING):
            if (folder / name).exists():
                _retire(folder / name, retired)
            for parent in Path(name).parents[:-1]:
                # The folder that it leaves is gone with its last file.
                with contextlib.suppress(OSError):
                    (folder / parent).rmdir()
        (saved / _LEAVING).unlink()
    # What is hidden says that the rest is there: it comes last.
    entries = sorted(saved.rglob("*"), key=lambda path: (path.relative_to(saved).parts[0].startswith("."), path))
    for entry in entries:
        inside = entry.relative_to(saved)
        if not entry.exists() or inside.parts[0] == _RETIRED:
            continue
        target = folder / inside
        if inside.parts[0].startswith("."):
            # A hidden folder holds other things too: its files are replaced one by one.
            if entry.is_dir():
                target.mkdir(exist_ok=True)
            else:
                entry.replace(target)
        elif len(inside.parts) == 1:
            if target.is_dir() or (target.exists() and entry.is_dir()):
                _retire(target, retired)
            entry.replace(target)
    flush_to_disk(folder)
    shutil.rmtree(saved)


def _retire(path: Path, retired: Path) -> None:
    path.rename(Path(tempfile.mkdtemp(dir=retired)) / path.name)


def set_aside(folder: str | Path) -> Path:
    """Give a damaged folder another name, so that it can be made again; nothing in it is deleted."""
    folder = Path(folder)
    number = 1
    while (target := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def load_kept(folder: str | Path, load: Callable[[Path], Kept], is_main: bool = True) -> Kept | None:
    """Load an artefact if it is there; a damaged one is set aside and told.

    Args:
        folder: The artefact's.
        load: Reads it, and raises ValueError where it is not what was written.
        is_main: Whether this process sets it aside and tells; the others see nothing.

    Returns:
        None where it has to be made.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    try:
        return load(folder)
    except FileNotFoundError:
        return None
    except ValueError as error:
        if is_main and folder.is_dir():
            print(f"warning: {error}. It is kept as {set_aside(folder)} and made again", file=sys.stderr, flush=True)
        return None


def sweep(parent: str | Path, prefix: str) -> None:
    """Delete the unfinished folders of processes that are no more."""
    for path in Path(parent).glob(f"{prefix}*"):
        if path.is_dir() and not is_alive(path, prefix):
            shutil.rmtree(path, ignore_errors=True)


def _sweep_files(folder: Path) -> None:
    for path in folder.glob(f".*{WRITING}*"):
        if path.is_file() and not is_alive(path, ""):
            # In a folder that one may only read it stays.
            with contextlib.suppress(OSError):
                path.unlink()
