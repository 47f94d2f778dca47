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

    Args:
        vocabulary: Where subjects and phrasings come from.
        count: Number of captions.
        seed: The same seed gives the same captions.
        avoid: Concepts that no caption may name, in whole or in part.

    Raises:
        ValueError: Every subject, or every phrasing, names a concept to avoid.
    """
    banned = [part for concept in avoid for part in (concept, *concept_parts(concept))]

    def allowed(text: str) -> bool:
        return not any(names_concept(text, part) for part in banned)

    subjects = [subject for subject in vocabulary.subjects if allowed(subject)]
    templates = [template for template in vocabulary.templates if allowed(template)]
    settings = {name: [value for value in values if allowed(value)] for name, values in vocabulary.settings.items()}
    if not subjects or not templates:
        raise ValueError(f"no caption of this vocabulary avoids {', '.join(avoid)}: bring replay prompts of your own")
    draw = random.Random(seed)
    captions: list[str] = []
    seen: set[str] = set()
    order: list[str] = []
    while len(captions) < count:
        if not order:
            order = draw.sample(subjects, len(subjects))
        subject = order.pop()
        for _ in range(20):
            caption = fill_template(draw.choice(templates), subject)
            for name, values in settings.items():
                if f"{{{name}}}" in caption:
                    caption = caption.replace(f"{{{name}}}", draw.choice(values or [""]))
            caption = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", " ".join(caption.split()))
            if caption not in seen:
                break
        seen.add(caption)
        captions.append(caption)
    return captions


def concept_parts(concept: str) -> list[str]:
    """The words of a concept that mean something by themselves: "Brad" and "Pitt"."""
    ignored = {*ARTICLES, "of", "in", "on", "and", "with", "by", "at", "to", "style", "person", "photo"}
    return [word for word in bare_name(concept).split() if word not in ignored and len(word) > 1]
