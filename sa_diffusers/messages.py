"""What messages show of values, files and errors that somebody else made."""

import argparse
import difflib
import itertools
import os
import reprlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

_LONGEST = 80
_LONGEST_COMPLAINT = 600
# Of values in values only the first are shown: written out, a few that hold each other could fill the memory.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _LONGEST
_SHORT.maxlevel = 3


def shown(value: Any, limit: int = _LONGEST) -> str:
    """A value in one line of a message: long ones cut, what cannot be printed escaped.

    Args:
        value: Text is shown as it is, anything else as Python writes it.
        limit: Characters, at most.
    """
    if not isinstance(value, str):
        try:
            value = _SHORT.repr(value)
        except (ValueError, RecursionError):  # Python writes out no integer of more than some thousand digits
            value = f"a value of type {type(value).__name__} too long to be shown"
    text = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in value[: limit + 1]
    )
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one clean line, whatever was typed; a misspelt flag is answered with near ones."""

    def __init__(self, **options: Any) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options}
        super().__init__(**options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if word.startswith("--") and " " not in word and name not in self._option_string_actions:
                near = did_you_mean(name, self._option_string_actions, "").replace(";", ":", 1)
                self.error(f"unknown flag {shown(name)}{near or ': --help shows all'}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(shown(message, _LONGEST_COMPLAINT))


def shown_error(error: BaseException, limit: int = 200) -> str:
    """The first line of what a library says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[0] if lines else type(error).__name__, limit)


def did_you_mean(name: str, known: Iterable[str], quote: str = '"') -> str:
    """A question to be put behind a message, with up to three names that are nearly `name`; empty if there are none."""
    known = list(dict.fromkeys(known))
    folded: dict[str, str] = {}
    for other in known:
        folded.setdefault(other.casefold(), other)
    # Of a short name one wrong letter is a large part.
    near = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.6 if len(name) < 6 else 0.75)
    if not near:
        return ""
    return f"; did you mean {' or '.join(f'{quote}{shown(folded[other])}{quote}' for other in near)}?"


def near_paths(path: str | Path) -> str:
    """As `did_you_mean`, of files and folders beside a path that does not exist."""
    path = Path(path)
    try:
        names = [name for name in os.listdir(path.parent) if not name.startswith(".") and name != path.name]
    except (OSError, ValueError):
        # Its folder may be the misspelt part.
        parent = path.parent
        if parent == parent.parent or os.path.exists(parent):
            return ""
        return near_paths(parent)
    near = did_you_mean(path.name, names)
    # A name alone would be a name on the Hub to some settings.
    return near.replace('"', f'"{shown(str(path.parent), 200)}/', 1) if near and str(path.parent) != "." else near
