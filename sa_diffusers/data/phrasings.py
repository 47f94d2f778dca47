"""Phrasings around a concept, and whether a model reads them."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..families.base import Family
from ..messages import shown
from ..names import ARTICLES
from .concepts import ErasurePair
from .prompt_files import read_prompts


def fill_template(template: str, concept: str) -> str:
    """Put a concept into a phrasing, with the article that fits.

    `a {}` becomes `an {}` before a vowel, and loses its article when the concept brings one.

    >>> fill_template("a photo of a {}", "ankle boot")
    'a photo of an ankle boot'
    >>> fill_template("a photo of a {}", "a middle aged man")
    'a photo of a middle aged man'
    """
    has_article = concept.casefold().split()[:1] and concept.casefold().split()[0] in ARTICLES
    if has_article:
        template = re.sub(r"\b(a|an|the) \{\}", "{}", template, flags=re.IGNORECASE)
    elif concept[:1].casefold() in "aeiou":
        template = re.sub(r"\b([Aa]) \{\}", r"\1n {}", template)
    return template.replace("{}", concept)


def read_templates(path: str | Path) -> list[str]:
    """Phrasings of a text file, one a line; see `read_prompts`.

    Raises:
        ValueError: A line has no `{}`.
    """
    templates = read_prompts(path, stands_for="concept")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f'{shown(str(path), 200)}: "{shown(template)}" has no {{}} where the concept goes')
    return templates


def check_phrasings(objective: Family, pairs: Sequence[ErasurePair], templates: Sequence[str]) -> None:
    """Refuse phrasings that the model reads only in part, or in which a concept and its surrogate are the same to it.

    Args:
        objective: The model.
        pairs: Concepts and surrogates.
        templates: All phrasings of training and evaluation.

    Raises:
        ValueError: A concept or a surrogate lies outside of what the text encoder reads, or the model makes the same
            of both, or nothing of one.
    """
    for pair in pairs:
        values = [pair.concept, *([pair.surrogate.value] if pair.surrogate.kind == "prompt" else [])]
        for template in templates:
            prompts = [fill_template(template, value) for value in values]
            for prompt, value in zip(prompts, values, strict=True):
                if reason := objective.why_unseen(prompt, value):
                    raise ValueError(reason)
                if objective.means_the_same(prompt, template.replace("{}", "")):
                    raise ValueError(f'the model\'s tokenizer makes nothing of "{shown(value)}": choose other words')
            if len(prompts) == 2 and objective.means_the_same(*prompts):
                raise ValueError(
                    f'to the model\'s tokenizer "{shown(values[0])}" and "{shown(values[1])}" are the same: nothing '
                    "would be forgotten. Choose another surrogate"
                )


def warn_of_cut_prompts(objective: Family, prompts: Sequence[str], place: str) -> None:
    """Warn of prompts whose ends the model does not read, such as those of a user's own file."""
    distinct = list(dict.fromkeys(prompts))
    if count := objective.count_cut(distinct):
        warnings.warn(
            f"{place}: {count} of {len(distinct)} prompts are longer than what the text encoder reads, and are cut",
            stacklevel=2,
        )
