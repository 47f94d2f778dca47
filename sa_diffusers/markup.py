"""Texts made harmless: for a terminal, for Markdown, for a shell."""

import html
import re
import shlex
import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

# What Markdown gives a meaning to inside a line, and what has one at the start of a line only.
_MEANINGFUL = re.compile(r"([\\`*_\[\]~#])")
_LEADING = re.compile(r"^([-+](?=\s|$)|[-=](?=[-=\s]*$)|\d+(?=[.)](?:\s|$)))")
# Joiners that scripts and pictures need; other characters that are not seen can make a text look like another.
_JOINERS = "\u200c\u200d"
_LONGEST = 300


def visible(text: str) -> str:
    """A text whose control characters, and others that are not seen or turn the direction of writing, are shown by
    their codes; line breaks and tabs stay."""

    def shown(character: str) -> str:
        category = unicodedata.category(character)
        if category not in ("Cc", "Cf", "Cs") or character in "\n\t" or character in _JOINERS:
            return character
        return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"

    return "".join(map(shown, text))


def single_line(value: object, longest: int | None = None) -> str:
    """Any value as a text on one line, made visible; what is longer than `longest` is cut."""
    text = visible(" ".join(str(value).split()))
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def markdown_text(value: object, longest: int | None = _LONGEST) -> str:
    """Text that Markdown takes literally, in a cell of a table and at the start of a line too.

    Args:
        value: Anything.
        longest: What is longer is cut.
    """
    text = _MEANINGFUL.sub(r"\\\1", html.escape(single_line(value, longest), quote=False))
    return _LEADING.sub(_escaped_mark, text).replace("|", "&#124;")


def _escaped_mark(match: re.Match) -> str:
    # A number's dot is what makes it an item of a list.
    return f"{match[1]}\\" if match[1].isdigit() else f"\\{match[1]}"


def markdown_code(value: object) -> str:
    """Text in the type of code, where nothing in it can end that; else as `markdown_text`."""
    text = single_line(value, _LONGEST)
    return markdown_text(text) if not text or re.search(r"[`|\\<>&]", text) else f"`{text}`"


def markdown_fence(language: str, text: str) -> str:
    """A block of code that no backticks in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def command_words(command: str | list[str]) -> list[str]:
    """The words of a command for a shell."""
    try:
        return shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    except ValueError:  # a quotation mark without its other half
        return str(command).split()


def requoted(command: str | list[str]) -> str:
    """A command for a shell, on one line as far as its words are, each word quoted where it must be. Of an absolute
    path only its last part is left."""
    return shlex.join(_without_place(word) for word in command_words(command))


def _without_place(word: str) -> str:
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(value)
        if (path.is_absolute() or value.startswith("~/")) and path.name:
            return f"{flag}{equals}{path.name}"
    return word
