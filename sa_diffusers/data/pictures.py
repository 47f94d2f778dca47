"""Reading image files of any kind."""

import contextlib
import warnings
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..messages import shown_error

# What shows through where a picture is transparent.
BACKGROUND = "white"
# Readers that only read: that of EPS starts another program.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "QOI", "TGA")


def read_picture(source: str | Path | BinaryIO | Image.Image, place: str) -> Image.Image:
    """Read an image as programs show it, in 8 bits, grey (`L`) or `RGB`.

    It is turned as its EXIF data say; what is transparent lies over white; of an animation the first frame is taken; 16
    bits are scaled down.

    Args:
        source: A file, by name or opened, or what Pillow made of it.
        place: What it is called in an error.

    Raises:
        ValueError: It is not a readable image, or has so many pixels that it would fill the memory.
    """
    try:
        if isinstance(source, Image.Image):
            return as_shown(source)
        with warnings.catch_warnings():
            # Pillow's doubts about metadata that play no part here.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(source, formats=_known_formats()) as opened:
                return as_shown(opened)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{place} has too many pixels ({shown_error(error)}): make it smaller") from error
    except Exception as error:  # on damaged files Pillow's readers raise whatever their parts do
        raise ValueError(f"{place} is not a readable image ({shown_error(error)}): remove or replace it") from error


@lru_cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def as_shown(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF data say and laid over the background, as `L` if it is grey, else as `RGB`.

    Raises:
        ValueError: Its values are floating point, of unknown range.
    """
    picture.load()
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF data leave the picture as it lies
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in range(2, 9):
        picture = ImageOps.exif_transpose(picture)
    if not picture.has_transparency_data or picture.mode.startswith(("I", "F")):
        return eight_bits(picture)
    grey = picture.mode in ("L", "LA", "La", "1")
    picture = picture.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", picture.size, BACKGROUND), picture)
    return whole.convert("L" if grey else "RGB")


def eight_bits(picture: Image.Image) -> Image.Image:
    """A picture without transparency as `L` if it is grey, else as `RGB`.

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
