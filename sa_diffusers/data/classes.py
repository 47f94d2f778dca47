"""Concepts of models that know classes."""

from collections.abc import Sequence

from ..messages import did_you_mean, near_paths, shown
from .concepts import UNIFORM_NOISE, ErasurePair, Surrogate, as_folder, pair_up, parse_surrogate


def class_name(text: str, labels: Sequence[str]) -> str:
    """The name of a class that is given by name, by one of several names ("tench" of "tench, Tinca tinca"), or by
    number.

    Raises:
        ValueError: There is no such class, or there are several.
    """
    if text in labels:
        return text
    bare = " ".join(text.split())
    if bare in labels:
        return bare
    if bare.isdecimal() and int(bare) < len(labels):
        return labels[int(bare)]
    named = [label for label in labels if bare.casefold() in (name.strip().casefold() for name in label.split(","))]
    if len(named) == 1:
        return named[0]
    if named:
        numbers = ", ".join(f"{labels.index(label)} ({label})" for label in named)
        raise ValueError(f'"{shown(text)}" is the name of several classes: give one of the numbers {numbers}')
    listed = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
    near = did_you_mean(bare, [name.strip() for label in labels for name in label.split(",")])
    raise ValueError(
        f'"{shown(text)}" is not a class of this model: give one of {listed}, or a number from 0 to '
        f"{len(labels) - 1}{near}"
    )


def pair_classes(
    concepts: Sequence[str], surrogates: Sequence[str], labels: Sequence[str], must_exist: bool = True
) -> list[ErasurePair]:
    """Pair classes with surrogates; what is not a folder of images nor `"uniform_noise"` must be a class too.

    Args:
        concepts: Classes to forget, by name or by number.
        surrogates: As for `pair_concepts`; none stand for uniform noise, the paper's choice for classes.
        labels: The model's classes.
        must_exist: Whether folders of images are needed.

    Raises:
        ValueError: As `pair_concepts`, or a class is unknown, or none would be left.
    """
    named = [_class_surrogate(surrogate, labels, must_exist) for surrogate in surrogates or [UNIFORM_NOISE]]
    pairs = pair_up([class_name(concept, labels) for concept in concepts], named, str)
    if len(pairs) == len(labels):
        raise ValueError(f"all {len(labels)} classes are to be forgotten: leave at least one to remember")
    return pairs


def _class_surrogate(text: str, labels: Sequence[str], must_exist: bool) -> Surrogate:
    if text in labels:
        return Surrogate("prompt", text)
    surrogate = parse_surrogate(text, must_exist)
    if surrogate.kind != "prompt":
        return surrogate
    try:
        return Surrogate("prompt", class_name(text, labels))
    except ValueError as error:
        if "/" in text and not must_exist:
            return Surrogate("images", text)
        path = as_folder(text)
        if path is not None and path.is_dir():
            raise ValueError(f"{error}. To name the folder of images, write ./{shown(text)}") from None
        if "/" in text:
            raise ValueError(f"{error}. There is no folder of images of that name{near_paths(text)}") from None
        raise
