"""The prompts to remember: of a world of captions, of a user's own file, or every class but the concepts."""

import random
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..messages import did_you_mean, shown
from ..names import names_concept
from .captions import builtin_vocabularies, generate_captions, load_vocabulary
from .phrasings import fill_template
from .prompt_files import FORMS, is_there, read_texts, split_source

_NAMING = ("{}", "a {}", "the {}", "a photo of a {}", "a picture of a {}", "an image of a {}")


def replay_prompts(
    source: str,
    count: int,
    seed: int,
    concepts: Sequence[str],
    unconditional_share: float = 0.0,
    drop_naming: bool = False,
    names: Sequence[str] = (),
) -> list[str]:
    """Prompts to remember, for `count` replay images.

    Args:
        source: A built-in vocabulary (`"diverse"`, `"garments"`, `"icons"`), a text file with one prompt a line, a CSV,
            TSV, JSON, JSON lines or parquet file as FILE or FILE:COLUMN, or a dataset's column as `NAME:COLUMN` or
            `NAME:COLUMN:SPLIT`, NAME being a repository on the Hub or a local folder.
        count: Number of prompts; a shorter list is repeated.
        seed: Order and draw.
        concepts: Concepts that are being forgotten.
        unconditional_share: Share of the images that belong to the empty prompt, spread evenly over the list.
            Classifier-free guidance extrapolates away from the empty prompt: if its prediction drifts while the concept
            is missing from replay, guidance pushes the concept's prompt back towards the concept.
        drop_naming: Leave out prompts that name a concept, with a warning that counts them, in place of refusing them.
        names: What the model is known to make; every other prompt names one of them, those that name a concept left
            out.

    Raises:
        ValueError: There is no such source, it is empty, or a prompt names a concept (the message quotes the first).
    """
    captions = _captions(source, count - round(count * unconditional_share), seed, concepts, drop_naming)
    names = [name for name in names if not any(names_concept(name, concept) for concept in concepts)]
    if names:
        draw = random.Random(seed)
        for turn, place in enumerate(range(0, len(captions), 2)):
            captions[place] = fill_template(draw.choice(_NAMING), names[turn % len(names)])
    return _with_empty_prompts(captions, count)


def class_replay_prompts(
    labels: Sequence[str], count: int, concepts: Sequence[str], unconditional_share: float = 0.0
) -> list[str]:
    """Every class but the concepts, as evenly as `count` allows; see `replay_prompts` for the empty prompt's share."""
    remembered = [label for label in labels if label not in concepts]
    captions = [remembered[place % len(remembered)] for place in range(count - round(count * unconditional_share))]
    return _with_empty_prompts(captions, count)


def _with_empty_prompts(captions: list[str], count: int) -> list[str]:
    prompts = iter(captions)
    return [
        next(prompts) if len(captions) * (place + 1) // count > len(captions) * place // count else ""
        for place in range(count)
    ]


def _captions(source: str, count: int, seed: int, concepts: Sequence[str], drop_naming: bool) -> list[str]:
    if source in builtin_vocabularies():
        return generate_captions(load_vocabulary(source), count, seed, avoid=concepts)
    setting = f'replay_prompts="{shown(source, 200)}"'
    name, column, _ = split_source(source)
    known = builtin_vocabularies()
    if column is None and not Path(name).suffix and "/" not in name and not is_there(name):
        raise ValueError(
            f"{setting} is neither one of {', '.join(map(repr, known))}, nor a file{did_you_mean(name, known)}: give "
            f"one of these, {FORMS}"
        )
    prompts = read_texts(source, setting)
    if not prompts:
        raise ValueError(f"{setting} holds no prompt")
    if drop_naming:
        prompts = drop_naming_prompts(prompts, concepts, setting)
    check_replay_prompts(prompts, concepts)
    draw = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += draw.sample(prompts, len(prompts))
    return chosen[:count]


def drop_naming_prompts(prompts: Sequence[str], concepts: Sequence[str], place: str) -> list[str]:
    """The prompts that name no concept; a warning says how many do.

    Args:
        prompts: Any prompts.
        concepts: What they must not name.
        place: Where they come from, for the warning.

    Raises:
        ValueError: None is left.
    """
    kept = [prompt for prompt in prompts if not any(names_concept(prompt, concept) for concept in concepts)]
    names = " or ".join(f'"{shown(concept)}"' for concept in concepts)
    if not kept:
        raise ValueError(f"{place}: all {len(prompts)} prompts name {names}, so that none is left: give others")
    if len(kept) < len(prompts):
        warnings.warn(
            f"{place}: {len(prompts) - len(kept)} of {len(prompts)} prompts name {names} and are left out",
            stacklevel=2,
        )
    return kept


def check_replay_prompts(prompts: Sequence[str], concepts: Sequence[str]) -> None:
    """Refuse replay prompts that would teach the concept again.

    Raises:
        ValueError: A prompt names a concept; the message says which, and how many do.
    """
    for concept in concepts:
        naming = [prompt for prompt in prompts if names_concept(prompt, concept)]
        if naming:
            raise ValueError(
                f'{len(naming)} of {len(prompts)} replay prompts name the concept "{shown(concept)}", which replay '
                f'would teach again. The first is: "{shown(naming[0])}". Remove them, or leave them out with '
                "--drop_naming_prompts"
            )
