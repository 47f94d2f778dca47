"""Writing files so that a crash or a full disk never damages what was there before."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success its entries replace those of the same name in `folder`.

    Nothing in `folder` is touched until everything is written: an error inside the block (a full disk, say) removes
    the new files and leaves the old ones whole.

    Raises:
        OSError: As raised while writing, with the place and what to do added to its message.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-writing-", dir=folder.parent))
    try:
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                _flush_to_disk(path)
        folder.mkdir(exist_ok=True)
        retired = staging / ".retired"
        retired.mkdir()
        for entry in sorted(staging.iterdir()):
            if entry == retired:
                continue
            target = folder / entry.name
            if target.is_dir():
                target.rename(retired / entry.name)
            entry.replace(target)
    except Exception as error:
        if _is_disk_error(error):
            raise OSError(
                f"could not write {folder} ({error}). What was there before is unchanged. Free some space on that "
                "disk, or choose a folder on another one, and run the same command again."
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_disk_error(error: Exception) -> bool:
    """Whether writing failed; safetensors reports the operating system's errors under a type of its own."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, beside `path` first and then renamed over it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text`, beside `path` first and then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
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
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
