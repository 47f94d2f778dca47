"""Grids of pictures before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw, ImageFont

_GAP = 4
_TEXT = 14
_CAPTION = 60


def before_after_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[Image.Image]]],
    path: str | Path | BinaryIO,
    tile: int = 64,
) -> None:
    """Draw a row for each prompt: pictures of the base on the left, of the same seeds after erasure on the right.

    Args:
        rows: Caption (of a long one its first 60 characters), pictures before, pictures after (as many).
        path: PNG to write, by name or opened.
        tile: Side of a picture in pixels; small pictures are enlarged without smoothing.
    """
    font = ImageFont.load_default(size=_TEXT)
    rows = [(_short(caption), before, after) for caption, before, after in rows]
    columns = max(len(before) for _, before, _ in rows)
    label_width = max(int(font.getlength(caption)) for caption, _, _ in rows) + 3 * _GAP
    label_width = max(label_width, 60)
    half = columns * (tile + _GAP)
    header = _TEXT + 3 * _GAP
    sheet = Image.new("RGB", (label_width + 2 * half + 4 * _GAP, header + len(rows) * (tile + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    second = label_width + half + 3 * _GAP
    draw.text((label_width, _GAP), "before", fill="black", font=font)
    draw.text((second, _GAP), "after, same seeds", fill="black", font=font)
    for number, (caption, before, after) in enumerate(rows):
        top = header + number * (tile + _GAP)
        draw.text((_GAP, top + tile // 2 - _TEXT // 2), caption, fill="black", font=font)
        for left, pictures in ((label_width, before), (second, after)):
            for column, picture in enumerate(pictures):
                smoothing = Image.Resampling.NEAREST if picture.width < tile else Image.Resampling.LANCZOS
                resized = picture.convert("RGB").resize((tile, tile), smoothing)
                sheet.paste(resized, (left + column * (tile + _GAP), top))
    sheet.save(path, "PNG")


def _short(caption: str) -> str:
    caption = " ".join(caption.split())
    return caption if len(caption) <= _CAPTION else caption[: _CAPTION - 1] + "…"
