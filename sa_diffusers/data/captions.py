"""Worlds of captions, to remember by."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..names import ARTICLES, bare_name, names_concept
from .phrasings import fill_template

_VOCABULARIES = Path(__file__).parent / "vocabularies"
# Words of a concept that name nothing by themselves.
_KINDS = {*ARTICLES, "of", "in", "on", "and", "with", "by", "at", "to", "style", "person", "photo"}


@dataclass(frozen=True)
class Vocabulary:
    """A world of captions: subjects and the phrasings around them.

    Attributes:
        subjects: Phrases for `{}`.
        templates: Phrasings.
        held_out_templates: Phrasings that no training may use; evaluation does.
        settings: Further slots: `{name}` in a template is filled from the list of that name.
    """

    subjects: list[str]
    templates: list[str]
    held_out_templates: list[str]
    settings: dict[str, list[str]]


@lru_cache
def load_vocabulary(name: str) -> Vocabulary:
    """Load a built-in vocabulary.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in builtin_vocabularies():
        raise ValueError(f'"{name}" is not one of the built-in vocabularies {", ".join(builtin_vocabularies())}')
    values = json.loads((_VOCABULARIES / f"{name}.json").read_text(encoding="utf-8"))
    return Vocabulary(
        subjects=values.pop("subjects"),
        templates=values.pop("templates"),
        held_out_templates=values.pop("held_out_templates"),
        settings=values,
    )


def builtin_vocabularies() -> list[str]:
    return sorted(path.stem for path in _VOCABULARIES.glob("*.json"))


def generate_captions(vocabulary: Vocabulary, count: int, seed: int, avoid: Sequence[str] = ()) -> list[str]:
    """Draw captions, subjects as evenly as `count` allows, repeating none while new ones can be found.

    What lies nearest to a concept is what an erasure damages first, and stays: "blue heart" is drawn where "red heart"
    is to be avoided, and "cat face" where "grinning cat" is. Left out is what may show the concept: a narrower subject
    ("cat" leaves out "cat face", as a cat face is a cat), and a wider one ("black cat" leaves out "cat").

    Args:
        vocabulary: Where subjects and phrasings come from.
        count: Number of captions.
        seed: The same seed gives the same captions.
        avoid: Concepts that no caption may name; see `what_names`.

    Raises:
        ValueError: Every subject, or every phrasing, names a concept to avoid.
    """
    banned = [name for concept in avoid for name in what_names(concept)]

    def allowed(text: str) -> bool:
        return not any(names_concept(text, name) for name in banned)

    subjects = [
        subject for subject in vocabulary.subjects
        if allowed(subject) and not any(names_concept(concept, subject) for concept in avoid)
    ]  # fmt: skip
    templates = [template for template in vocabulary.templates if allowed(template)]
    settings = {name: [value for value in values if allowed(value)] for name, values in vocabulary.settings.items()}
    draw = random.Random(seed)
    captions: list[str] = []
    seen: set[str] = set()
    order: list[str] = []
    while len(captions) < count:
        if not subjects or not templates:
            names = ", ".join(avoid)
            raise ValueError(f"no caption of this vocabulary avoids {names}: bring replay prompts of your own")
        if not order:
            order = draw.sample(subjects, len(subjects))
        subject = order.pop()
        found = None
        for _ in range(20):
            caption = fill_template(draw.choice(templates), subject)
            for name, values in settings.items():
                if f"{{{name}}}" in caption:
                    caption = caption.replace(f"{{{name}}}", draw.choice(values or [""]))
            caption = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", " ".join(caption.split()))
            # Parts that name nothing may together, such as "black" and "and white".
            if allowed(caption):
                found = caption
                if caption not in seen:
                    break
        if found is None:
            subjects.remove(subject)
            continue
        seen.add(found)
        captions.append(found)
    return captions


def what_names(concept: str) -> list[str]:
    """The phrases by which a caption names a concept: the concept itself, and what it is without the words at either
    end that say only what kind of thing it is. "in the style of Van Gogh" is named by "Van Gogh", and "noto style" by
    "noto"; a word of several does not name it ("heart" names no red heart)."""
    words = bare_name(concept).split()
    while words and words[0] in _KINDS:
        words = words[1:]
    while words and words[-1] in _KINDS:
        words = words[:-1]
    return list(dict.fromkeys([concept, " ".join(words) or concept]))
