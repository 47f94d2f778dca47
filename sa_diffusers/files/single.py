"""Single files, written beside and renamed over; whose unfinished ones they are; what is said when a disk is full."""

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

WRITING = "-writing-"
# What another machine was writing is left alone for so long.
_FOREIGN_SECONDS = 24 * 3600
# A process may seem to have begun so much later than it did.
_CLOCKS_APART = 2.0


class DamagedArtefact(ValueError):
    """A file of ours is not what was written: cut short, changed, or from elsewhere."""


class Recorded(dict):
    """Values by name that somebody wrote as JSON; what is not recorded there is None."""

    def __missing__(self, name: str) -> None:
        return None


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Add to an error of the disk the place and what to do."""
    try:
        yield
    except Exception as error:
        if not _is_disk_error(error):
            raise
        cause = disk_cause(error)
        raise OSError(f"could not write {place} ({cause}). What was there before is unchanged. {_ADVICE}") from cause


def disk_cause(error: Exception) -> BaseException:
    """What the operating system said, also where `disk_errors` has told it already."""
    return error.__cause__ or error if _ADVICE in str(error) else error


_ADVICE = "Free some space on that disk, or choose a folder on another one, and run the same command again."


def _is_disk_error(error: Exception) -> bool:
    """Whether writing failed; safetensors reports the operating system's errors under a type of its own."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def permissions(widest: int) -> int:
    """The permissions that the user's umask leaves; temporary files have narrower ones."""
    mask = os.umask(0)
    os.umask(mask)
    return widest & ~mask


def flush_tree(folder: Path) -> None:
    """Flush a folder's files to the disk, and let others read them as far as the user's umask does."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            # safetensors leaves its files to their owner alone.
            path.chmod(permissions(0o777 if path.is_dir() else 0o666))
        flush_to_disk(path)
    flush_to_disk(folder)


def flush_to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def owner() -> str:
    """This process, in the names of what it is writing."""
    return f"{socket.gethostname().replace('-', '_')}-{os.getpid()}"


def is_alive(path: Path, prefix: str) -> bool:
    """Whether the process in a name's middle may still be writing; `prefix` is what may stand before it."""
    host, _, rest = path.name.rpartition(WRITING)[2].removeprefix(prefix).partition("-")
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


def check_writable(folder: str | Path, name: str) -> None:
    """Refuse a folder that cannot be written, or made, before the work for it is done.

    Args:
        folder: It need not be there.
        name: What the user calls it.

    Raises:
        ValueError: It cannot.
    """
    place = Path(os.path.realpath(folder))
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={folder}: nothing can be written into {place}: choose another folder")


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
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_beside(path, content, flush)


def _write_beside(path: Path, content: bytes, flush: bool) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}{WRITING}{owner()}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, permissions(0o666))
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
