"""Reading image files of any kind."""

import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

# What Pillow's readers raise on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, OverflowError, zlib.error, Image.DecompressionBombError)


def read_picture(source: str | Path | BinaryIO | Image.Image, place: str) -> Image.Image:
    """Read an image in 8 bits, grey (`L`) or `RGB`; transparency is dropped, 16 bits are scaled down.

    Args:
        source: A file, by name or opened, or what Pillow made of it.
        place: What it is called in an error.

    Raises:
        ValueError: It is not a readable image.
    """
    try:
        if isinstance(source, Image.Image):
            return eight_bits(source)
        with Image.open(source) as opened:
            return eight_bits(opened)
    except _DAMAGED as error:
        raise ValueError(f"{place} is not a readable image ({error}): remove or replace it") from error


def eight_bits(picture: Image.Image) -> Image.Image:
    """A picture as `L` if it is grey, else as `RGB`.

    Raises:
        ValueError: Its values are floating point, of unknown range.
    """
    if picture.mode == "F":
        raise ValueError("its values are floating point: save it in 8 or 16 bits")
    # Pillow would cut off everything above 255.
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        scale = 257 if picture.mode != "I" or values.max(initial=0) > 255 else 1
        return Image.fromarray((values.clip(0, 65535) / scale).round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("L", "1"):
        return picture.convert("L")
    return picture.convert("RGB")
