"""What an artefact depends on, and the name that follows from it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Identity:
    """Everything that an artefact depends on: with the same facts it would come out the same, to rounding.

    Attributes:
        kind: Of artefact, part of its folder's name.
        facts: Plain data by name: settings in use, digests of weights, prompts, seeds.
    """

    kind: str
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return fingerprint(self.facts)

    def folder(self, root: str | Path) -> Path:
        """Where the artefact is kept."""
        return Path(root) / f"{self.kind}-{self.digest}"

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """Facts that another artefact has otherwise, in words: `name=theirs (now ours)`."""
        names = [name for name in self.facts if plain(self.facts[name]) != plain(recorded.get(name))]
        names += [name for name in recorded if name not in self.facts]
        return [f"{name}={_short(recorded.get(name))} (now {_short(self.facts.get(name))})" for name in names]


def fingerprint(value: Any) -> str:
    """A short digest of plain data."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def plain(value: Any) -> Any:
    """Plain data as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
