"""Weight files that are not what their names say: pointers of git-lfs, files cut short, shards that are missing."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from .messages import shown, shown_error

_POINTER = b"version https://git-lfs"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_DOWNLOAD = "download it again"


def weights_fault(path: str | Path) -> str | None:
    """What is wrong with one weight file, in a sentence that names it and says what to do; None if nothing is seen.

    Only the header of a safetensors file is read, and compared with the size of the file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(256)
            if start.startswith(_POINTER):
                return (
                    f"{path} is a pointer of git-lfs, not the weights themselves: run `git lfs pull` in its folder, "
                    f"or {_DOWNLOAD}"
                )
            if size == 0:
                return f"{path} is empty: {_DOWNLOAD}"
            if path.suffix.lower() != ".safetensors":
                return None
            if size < 8:
                return f"{path} is cut short: {_DOWNLOAD}"
            (length,) = struct.unpack("<Q", start[:8])
            if length > size - 8:
                kind = "cut short, or not a safetensors file" if size > 8 and start[8:9] == b"{" else "not safetensors"
                return f"{path} is {kind}: {_DOWNLOAD}"
            file.seek(8)
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        return f"{path} cannot be read ({shown(error.strerror or str(error))}): check the disk and the permissions"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"{path} is damaged (its header is not that of a safetensors file): {_DOWNLOAD}"
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        kind = "cut short" if size < expected else "damaged"
        return f"{path} is {kind} ({size:,} bytes in place of {expected:,}): {_DOWNLOAD}"
    return None


def ordered(content: bytes) -> bytes:
    """A safetensors file's content with what its header tells in the order of the names.

    The library writes that in an order of chance, so that two files of the same weights differ.
    """
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    told = header.pop("__metadata__", {})
    values = {"__metadata__": dict(sorted(told.items())), **header}
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files in a folder, and the files that the indices of sharded weights name."""
    folder = Path(folder)
    files = {path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES}
    for index in folder.glob("*.index*.json"):
        try:
            files |= {folder / str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            files.add(index)
    return sorted(files)


def find_broken_weights(folder: str | Path, files: Iterable[Path] | None = None) -> str | None:
    """The first fault of the weights in a folder and in the folders in it; None if none is seen.

    Args:
        folder: Of a pipeline or of a single model.
        files: The files in question. Default: all.
    """
    folder = Path(folder)
    if files is None:
        if not folder.is_dir():
            return None
        places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        files = [file for place in places for file in weight_files(place)]
    for file in files:
        if not file.exists():
            return f"{file} is missing: {_DOWNLOAD}"
        if file.suffix in WEIGHT_SUFFIXES and (fault := weights_fault(file)):
            return fault
    return None


def explain_weights_error(folder: str | Path, error: BaseException) -> str:
    """What to say when loading from a folder has failed: the damaged file if one is found, else the error's own words.

    Args:
        folder: Where the weights lie; a name on the Hub is no folder, and finds nothing.
        error: What loading raised.
    """
    return find_broken_weights(folder) or shown_error(error)
