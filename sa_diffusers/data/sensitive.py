"""Pictures that nobody wants to see unasked: which concepts lead to them, and how they are blurred."""

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

_WORDS = Path(__file__).parent / "sensitive_words.json"
_BLURRED_PIXELS = 8
BLUR_CHOICES = ("auto", "yes", "no")
# Scripts that put no space between words, or tie endings to them.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI")


def must_blur(blur: str, concepts: Sequence[str]) -> bool:
    """Whether the pictures of an erasure are written blurred.

    Args:
        blur: `"yes"`, `"no"`, or `"auto"`: where a concept names nudity or its kind, by the words in
            `sensitive_words.json`, whole words in any case, spelling of letters and plural.
        concepts: What is erased, and whatever else the pictures are of.

    Raises:
        ValueError: `blur` is another word.
    """
    if blur not in BLUR_CHOICES:
        raise ValueError(f'blur="{blur}" is not one of {", ".join(BLUR_CHOICES)}: choose one of these')
    return blur == "yes" or (blur == "auto" and any(names_sensitive(concept) for concept in concepts))


def names_sensitive(text: str) -> bool:
    """Whether a text names nudity or its kind."""
    return _pattern().search(_normal(text)) is not None


@lru_cache
def _pattern() -> re.Pattern:
    words = [word for listed in json.loads(_WORDS.read_text(encoding="utf-8")).values() for word in listed]
    normal = sorted({_normal(word) for word in words})
    unspaced = [word for word in normal if unicodedata.name(word[0], "").startswith(_UNSPACED)]
    spaced = [word for word in normal if word not in unspaced]
    return re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, spaced))})(?: s|e?s)?(?!\S)|{'|'.join(unspaced)}")


def _normal(text: str) -> str:
    """Words in small letters without accents, one space between them; what is no letter and no figure is a space."""
    text = unicodedata.normalize("NFKD", text).casefold()
    kept = []
    for character in unicodedata.normalize("NFKD", text):
        category = unicodedata.category(character)
        # Accents and characters that are not seen tie nothing apart.
        if category[0] != "M" and category != "Cf":
            kept.append(character if category[0] in "LN" else " ")
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def blurred(picture: Image.Image) -> Image.Image:
    """A picture of the same size of which nothing is left but the mean colours of 8 by 8 fields."""
    small = picture.convert("RGB").resize((_BLURRED_PIXELS, _BLURRED_PIXELS), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.BICUBIC)
