"""Text files in whatever encoding users have them, or a sentence about it."""

import codecs
import contextlib
from pathlib import Path

from .messages import shown_error

# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip


def read_text(path: Path, place: str) -> str:
    """A file's text, without its byte order mark.

    Raises:
        ValueError: It cannot be read, or is not text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{place}: {path} cannot be read ({shown_error(error)})") from error
    mark, encoding = next((each for each in _MARKS if raw.startswith(each[0])), (b"", "utf-8"))
    try:
        text = raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if mark:
            raise ValueError(
                f"{place}: {path} says that it is in {encoding.upper()}, but is not (at byte {error.start}): save it "
                "as UTF-8"
            ) from None
        raise ValueError(f"{place}: {path} is not in UTF-8{_guess(raw)}: save it as UTF-8") from None
    if "\0" in text:
        nature = _guess(raw) or ", but holds bytes of zero"
        raise ValueError(f"{place}: {path} is not text in UTF-8{nature}: save it as UTF-8")
    return text


def _guess(raw: bytes) -> str:
    """What the encoding of bytes looks like, as the part of a sentence; empty if nothing is known."""
    start = raw[:4000]
    for places, name in ((start[1::2], "UTF-16 (little endian)"), (start[::2], "UTF-16 (big endian)")):
        if len(places) > 1 and places.count(0) > 0.6 * len(places):
            return f", it looks like {name} without a byte order mark"
    if b"\0" in start:
        return ", and no text at all"
    with contextlib.suppress(ImportError):
        from charset_normalizer import from_bytes

        best = from_bytes(raw[:20_000]).best()
        if best is not None and best.encoding not in ("ascii", "utf_8"):
            return f", it looks like {best.encoding}"
    return ""
