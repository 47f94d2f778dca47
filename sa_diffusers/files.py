"""Files that are whole or not there: written beside, renamed into place, sealed with digests."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

_SAVING, _SAVED, _RETIRED, _LEAVING = ".saving-", ".saved", ".retired", ".leaving.json"
_WRITING = "-writing-"
# A folder that another machine was writing is left alone for so long.
_FOREIGN_SECONDS = 24 * 3600
# A process may seem to have begun so much later than it did.
_CLOCKS_APART = 2.0
Kept = TypeVar("Kept")


class DamagedArtefact(ValueError):
    """A file of ours is not what was written: cut short, changed, or from elsewhere."""


# Whole folders


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder; on success it becomes `folder` in one step, if there is none by then.

    Raises:
        OSError: As raised while writing, with the place and what to do added to its message.
    """
    folder = Path(folder)
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent, f".{folder.name}{_WRITING}")
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}{_WRITING}{_owner()}-", dir=folder.parent))
        try:
            yield staging
            _flush_tree(staging)
            staging.chmod(_mode(0o777))
            try:
                staging.rename(folder)
            except OSError:
                # Another run was faster: what it made is the same.
                if not folder.is_dir():
                    raise
            _flush_to_disk(folder.parent)
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
        leaving: Entries of `folder` that belong to the old ones: they go in the same step.

    Raises:
        OSError: As raised while writing, with the place and what to do added to its message.
    """
    folder = Path(folder)
    is_new = not folder.is_dir()
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        finish_interrupted(folder)
        staging = Path(tempfile.mkdtemp(prefix=f"{_SAVING}{_owner()}-", dir=folder))
        try:
            yield staging
            write_json(staging / _LEAVING, list(leaving))
            _flush_tree(staging)
            staging.rename(folder / _SAVED)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        _move_in(folder)


def finish_interrupted(folder: str | Path) -> bool:
    """Finish what a process that died in `replacing_folder` began, or take it back.

    Returns:
        Whether new entries had still to be moved in.
    """
    folder = Path(folder)
    sweep(folder, _SAVING)
    _sweep_files(folder)
    if not (folder / _SAVED).is_dir():
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
    _flush_to_disk(folder)
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
        if path.is_dir() and not _is_alive(path, prefix):
            shutil.rmtree(path, ignore_errors=True)


def _sweep_files(folder: Path) -> None:
    for path in folder.glob(f".*{_WRITING}*"):
        if path.is_file() and not _is_alive(path, ""):
            path.unlink(missing_ok=True)


def _owner() -> str:
    return f"{socket.gethostname().replace('-', '_')}-{os.getpid()}"


def _is_alive(path: Path, prefix: str) -> bool:
    host, _, rest = path.name.rpartition(_WRITING)[2].removeprefix(prefix).partition("-")
    number = rest.partition("-")[0]
    try:
        written = path.stat().st_mtime
        if host == socket.gethostname().replace("-", "_") and number.isdecimal():
            # A container that is started again gives its processes the numbers of before.
            return psutil.Process(int(number)).create_time() < written + _CLOCKS_APART
    except (FileNotFoundError, psutil.NoSuchProcess):
        return False
    except psutil.Error:
        return True
    return time.time() - written < _FOREIGN_SECONDS


# Digests


def digest_of(path: str | Path) -> str:
    """A digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digests_of(folder: str | Path) -> dict[str, str]:
    """The digest of every file under a folder, by its path inside."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in sorted(folder.rglob("*"))
            if path.is_file()}  # fmt: skip


def write_sealed(folder: str | Path, name: str, version: int, values: Mapping[str, Any]) -> None:
    """Write the marker of an artefact: `values`, the digests of all files that are in the folder, and its own.

    Args:
        folder: Everything else of the artefact is in it.
        name: Of the marker, a JSON file.
        version: Of the artefact's format.
        values: Plain data.
    """
    content = {"format_version": version, **values, "files": digests_of(folder)}
    write_json(Path(folder) / name, {**content, "digest": _digest_of_values(content)})


def read_sealed(folder: str | Path, name: str, version: int, what: str) -> dict[str, Any]:
    """Read an artefact's marker, and compare every digest.

    Args:
        folder: The artefact's.
        name: Of the marker.
        version: The format that is read.
        what: What the artefact is called in an error.

    Raises:
        DamagedArtefact: A file is missing, changed, or no such marker.
        ValueError: It is of another format.
    """
    folder = Path(folder)
    if not (folder / name).is_file():
        raise DamagedArtefact(f"{folder} is not {what}: it has no {name}")
    content = read_json(folder / name)
    found = content.get("format_version") if isinstance(content, dict) else None
    if found != version:
        raise ValueError(f"{folder} has format {found}, this version reads {version}: delete it, it will be made again")
    digest = content.pop("digest", None)
    if digest != _digest_of_values(content) or not isinstance(content.get("files"), dict):
        raise DamagedArtefact(f"{folder / name} is not what was written: its digest differs")
    for file, expected in content.pop("files").items():
        if not (folder / file).is_file():
            raise DamagedArtefact(f"{folder} is not whole: {file} is missing")
        if digest_of(folder / file) != expected:
            raise DamagedArtefact(f"{folder / file} is not what was written: its digest differs")
    return content


def resealed(before: str, after: str) -> str:
    """A JSON text that was changed on purpose, with the digest that it has now; other texts as they are.

    Args:
        before: The text as it was written, whose digest has to hold.
        after: The changed text.
    """
    try:
        old, new = json.loads(before), json.loads(after)
        whole = old.pop("digest") == _digest_of_values(old)
        new.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError):
        return after
    if not whole:
        return after
    return json.dumps({**new, "digest": _digest_of_values(new)}, indent=2, ensure_ascii=False) + "\n"


def write_record(path: str | Path, version: int, values: Mapping[str, Any]) -> None:
    """Write a JSON file that holds its own digest."""
    content = {"format_version": version, **values}
    write_json(path, {**content, "digest": _digest_of_values(content)})


def read_record(path: str | Path, version: int) -> dict[str, Any] | None:
    """Read what `write_record` wrote; None if it is not there, of another format, or not what was written."""
    try:
        content = read_json(path)
        digest = content.pop("digest")
        whole = digest == _digest_of_values(content) and content["format_version"] == version
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return content if whole else None


def _digest_of_values(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# Single files


@contextlib.contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_disk_error(error):
            raise
        cause = error.__cause__ if _ADVICE in str(error) else error
        raise OSError(f"could not write {place} ({cause}). What was there before is unchanged. {_ADVICE}") from cause


_ADVICE = "Free some space on that disk, or choose a folder on another one, and run the same command again."


def _is_disk_error(error: Exception) -> bool:
    """Whether writing failed; safetensors reports the operating system's errors under a type of its own."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _mode(widest: int) -> int:
    """The permissions that the user's umask leaves; temporary files have narrower ones."""
    mask = os.umask(0)
    os.umask(mask)
    return widest & ~mask


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush_to_disk(path)
    _flush_to_disk(folder)


def _flush_to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, beside `path` first and then renamed over it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, beside `path` first and then renamed over it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes, flush: bool = True) -> None:
    """Write bytes, beside `path` first and then renamed over it.

    Args:
        path: The file.
        content: What it holds.
        flush: Whether it has to outlive a failure of the machine, not only of the process.
    """
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_beside(path, content, flush)


def _write_beside(path: Path, content: bytes, flush: bool) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}{_WRITING}{_owner()}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, _mode(0o666))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: The file is not valid JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedArtefact(f"{path} is not valid JSON ({error})") from error
