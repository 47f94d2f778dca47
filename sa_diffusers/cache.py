"""What is kept under the artefacts folder: listing it, and deleting what nobody needs."""

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import read_json

_MARKERS = ("manifest.json", "fisher_config.json")
_KEPT = re.compile(r"(?P<kind>[a-z]+(-samples)?)-[0-9a-f]{16}")
_UNFINISHED = re.compile(r"\.part-.+|\..+-writing-.+")
_DAMAGED = re.compile(r".+\.damaged-\d+")
_FORMAT = 2
STATES = ("kept", "old", "damaged", "unfinished")


@dataclass(frozen=True)
class Entry:
    """A folder in the cache.

    Attributes:
        path: Where it is.
        kind: `"surrogate"`, `"replay"`, `"evaluation"`, `"fisher"`, ...
        state: `"kept"`; `"old"`, of an earlier version, which no run reuses; `"damaged"`, set aside; `"unfinished"`, a
            stopped run's part, from which the same command goes on.
        size: In bytes.
        age: Days since it was written.
    """

    path: Path
    kind: str
    state: str
    size: int
    age: float


def entries(artifacts_dir: str | Path) -> list[Entry]:
    """This package's folders in the cache, largest first; anything else is not looked at."""
    found = []
    for path in Path(artifacts_dir).iterdir() if Path(artifacts_dir).is_dir() else ():
        state = _state(path)
        if state:
            name = path.name.removeprefix(".part-").lstrip(".")
            kind = re.split(r"-(?=[0-9a-f]{16})", name)[0]
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(Entry(path, kind, state, size, (time.time() - path.stat().st_mtime) / 86_400))
    return sorted(found, key=lambda entry: -entry.size)


def _state(path: Path) -> str | None:
    if not path.is_dir() or path.is_symlink():
        return None
    if _DAMAGED.fullmatch(path.name):
        return "damaged"
    if _UNFINISHED.fullmatch(path.name):
        return "unfinished"
    if not _KEPT.fullmatch(path.name):
        return None
    for marker in _MARKERS:
        if (path / marker).is_file():
            try:
                return "kept" if read_json(path / marker)["format_version"] == _FORMAT else "old"
            except (ValueError, KeyError, TypeError):
                return "damaged"
    return None


def delete(found: Sequence[Entry], what: Sequence[str], older_than: float = 0.0) -> list[Entry]:
    """Delete entries.

    Args:
        found: As `entries` gives them.
        what: States and kinds to delete, or `"all"`.
        older_than: Days since they were written, at least.

    Returns:
        What was deleted.
    """
    gone = [entry for entry in found
            if entry.age >= older_than and ({entry.state, entry.kind, "all"} & set(what))]  # fmt: skip
    for entry in gone:
        shutil.rmtree(entry.path)
    return gone


def delete_evaluations(artifacts_dir: str | Path, base_fingerprint: str) -> None:
    """Delete the evaluation's images of one model, an erased one, whose report is written."""
    for path in Path(artifacts_dir).glob("evaluation-*"):
        if _base(path) == base_fingerprint:
            shutil.rmtree(path, ignore_errors=True)


def _base(path: Path) -> str | None:
    try:
        return json.loads((path / _MARKERS[0]).read_text(encoding="utf-8"))["origin"]["base_model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def listing(found: Sequence[Entry]) -> Iterator[str]:
    """Entries as lines of text, with a sum."""
    for entry in found:
        size, age = f"{entry.size / 1e6:10.1f} MB", f"{entry.age:6.1f} days"
        yield f"{size}  {age}  {entry.state:10}  {entry.kind:14}  {entry.path.name}"
    yield f"{sum(entry.size for entry in found) / 1e6:10.1f} MB  in {len(found)} folders"
