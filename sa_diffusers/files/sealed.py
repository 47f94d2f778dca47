"""Digests, and JSON files that hold their own or those of the folder around them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .single import DamagedArtefact, read_json, write_json


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
