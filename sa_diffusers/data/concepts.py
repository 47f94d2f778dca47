"""Concepts, what each turns into, and mistakes in naming them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..messages import near_paths, shown
from ..names import name_key, names_concept, says_something

UNIFORM_NOISE = "uniform_noise"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Shorter names are often one letter apart and mean different things.
_SHORTEST_MISSPELT = 7


@dataclass(frozen=True)
class Surrogate:
    """What a concept turns into: the distribution q(x | c_f) of eq. 4.

    Attributes:
        kind: `"prompt"` (images that the frozen model makes for it), `"images"` (a folder) or `"noise"` (uniform over
            pixel values, the paper's class experiments).
        value: The prompt, the folder, or `"uniform_noise"`.
    """

    kind: Literal["prompt", "images", "noise"]
    value: str


@dataclass(frozen=True)
class ErasurePair:
    """One concept and its surrogate."""

    concept: str
    surrogate: Surrogate


def pair_concepts(concepts: Sequence[str], surrogates: Sequence[str], must_exist: bool = True) -> list[ErasurePair]:
    """Pair concepts with surrogates: one surrogate for all concepts, or one for each.

    Args:
        concepts: Phrases to forget, none empty, no two alike.
        surrogates: Prompts, folders of images (recognised by a slash and by being there), or `"uniform_noise"`.
        must_exist: Whether folders of images are needed.

    Raises:
        ValueError: A concept or surrogate is empty, a concept is a surrogate or stands twice, the numbers do not pair
            up, or a folder does not exist or holds no image.
    """
    concepts = [" ".join(concept.split()) for concept in concepts]
    surrogates = [" ".join(surrogate.split()) for surrogate in surrogates]
    parsed = [parse_surrogate(surrogate, must_exist) for surrogate in surrogates]
    for place, surrogate in enumerate(parsed):
        if surrogate.kind == "prompt" and must_exist:
            _check_no_folder(surrogate.value)
        elif surrogate.kind == "prompt" and _meant_as_folder(surrogate.value):
            parsed[place] = Surrogate("images", surrogate.value)
    pairs = pair_up(concepts, parsed, name_key)
    _check_near_names(pairs)
    _check_quotes(pairs)
    if must_exist:
        _warn_of_named_concepts(pairs)
    return pairs


def _check_quotes(pairs: Sequence[ErasurePair]) -> None:
    """Words that a shell took apart, and names that somebody put together."""
    for pair in pairs:
        if pair.surrogate.kind == "prompt" and pair.surrogate.value.casefold() in ("a", "an", "the"):
            raise ValueError(
                f'surrogate "{pair.surrogate.value}" is an article alone: put names of several words in quotes, as in '
                '--concept "Brad Pitt" --surrogate "a middle aged man"'
            )
        if "," in pair.concept:
            warnings.warn(
                f'concept "{shown(pair.concept)}" is one concept of that name: several are given one by one, as in '
                '--concept "Brad Pitt" "Angelina Jolie"',
                stacklevel=3,
            )


def _warn_of_named_concepts(pairs: Sequence[ErasurePair]) -> None:
    """Warn of surrogates that name what is to be forgotten ("a photo of a cat" for "cat")."""
    for surrogate in dict.fromkeys(pair.surrogate.value for pair in pairs if pair.surrogate.kind == "prompt"):
        for named in (pair.concept for pair in pairs if names_concept(surrogate, pair.concept)):
            warnings.warn(
                f'the surrogate "{shown(surrogate)}" names "{shown(named)}", which is to be forgotten: choose another, '
                "unless it means another thing",
                stacklevel=3,
            )


def check_pairs(concepts: Sequence[str], surrogates: Sequence[str]) -> None:
    """What can be said of concepts and surrogates before it is known whether they are phrases or classes.

    Raises:
        ValueError: As `pair_concepts`.
    """
    pair_up(concepts, [parse_surrogate(surrogate) for surrogate in surrogates], lambda name: " ".join(name.split()))


def pair_up(concepts: Sequence[str], surrogates: Sequence[Surrogate], key: Callable[[str], str]) -> list[ErasurePair]:
    """Pair them; `key` is what two names have in common that mean the same."""
    for kind, values in (("concept", concepts), ("surrogate", [surrogate.value for surrogate in surrogates])):
        if not values or not all(value.strip() for value in values):
            example = '--concept "Brad Pitt" --surrogate "a middle aged man"'
            raise ValueError(f"{kind} is empty: say what to forget and what it turns into, such as {example}")
        for value in values:
            if not says_something(value):
                raise ValueError(f'{kind} "{shown(value)}" holds no letter: say what to forget and what it turns into')
    if len(surrogates) not in (1, len(concepts)):
        raise ValueError(
            f"{len(concepts)} concepts and {len(surrogates)} surrogates do not pair up: give one surrogate for all "
            "concepts, or one for each"
        )
    if len(surrogates) == 1:
        surrogates = [surrogates[0]] * len(concepts)
    pairs: list[ErasurePair] = []
    for concept, surrogate in zip(concepts, surrogates, strict=True):
        if any(key(concept) == key(pair.concept) for pair in pairs):
            raise ValueError(f'concept "{shown(concept)}" stands twice')
        if surrogate.kind == "prompt" and key(concept) == key(surrogate.value):
            raise ValueError(
                f'concept "{shown(concept)}" equals its surrogate "{shown(surrogate.value)}": nothing would be '
                "forgotten. Choose another surrogate"
            )
        if surrogate.kind == "prompt" and any(key(surrogate.value) == key(other) for other in concepts):
            raise ValueError(
                f'"{shown(surrogate.value)}" is the surrogate of "{shown(concept)}" and is itself to be forgotten: '
                "choose a surrogate that is kept"
            )
        pairs.append(ErasurePair(concept, surrogate))
    return pairs


def parse_surrogate(text: str, must_exist: bool = True) -> Surrogate:
    """Tell a prompt from a folder of images and from uniform noise.

    Args:
        text: As the user gave it.
        must_exist: Whether a folder of images is needed; if not, it may be gone.

    Raises:
        ValueError: The text looks like a path (`/...`, `./...`, `../...`, `~...`) but is no folder with images.
    """
    if text == UNIFORM_NOISE:
        return Surrogate("noise", text)
    path = as_folder(text)
    looks_like_path = text.startswith(("/", "./", "../", "~"))
    if looks_like_path or ("/" in text and path is not None and path.is_dir()):
        if path is None:
            raise ValueError(f'surrogate "{shown(text)}" is not a path: give a folder of images, or a prompt')
        if must_exist and not path.is_dir():
            raise ValueError(f'surrogate folder "{shown(text, 200)}" does not exist{near_paths(path)}')
        if must_exist and not image_files(path):
            raise ValueError(f'surrogate folder "{shown(text, 200)}" holds no image ({", ".join(IMAGE_SUFFIXES)})')
        return Surrogate("images", str(path))
    return Surrogate("prompt", text)


def as_folder(text: str) -> Path | None:
    """A text as a path; None if no path can be so."""
    try:
        path = Path(text).expanduser()
        path.is_dir()
    except (OSError, ValueError, RuntimeError):
        return None
    return path


def _meant_as_folder(text: str) -> bool:
    """Whether a prompt would more likely be a folder: no sentence, or in a folder that is there."""
    if "\\" in text:
        return True
    path = as_folder(text)
    return "/" in text and (" " not in text or (path is not None and str(path.parent) != "." and path.parent.is_dir()))


def _check_no_folder(text: str) -> None:
    """Refuse a prompt that is more likely a misspelt folder.

    Raises:
        ValueError: It looks like one.
    """
    if _meant_as_folder(text):
        raise ValueError(
            f'surrogate "{shown(text, 200)}" looks like a folder, but there is none{near_paths(text)}: write '
            f'"./{shown(text, 200)}" if you mean a folder, and spaces around the slash if you mean a prompt'
        )
    path = as_folder(text)
    if path is not None and path.is_dir() and image_files(path):
        warnings.warn(
            f'the surrogate "{shown(text)}" is a prompt, although a folder of images is called so: write '
            f'"./{shown(text)}" if you mean the folder',
            stacklevel=3,
        )


def _check_near_names(pairs: Sequence[ErasurePair]) -> None:
    """Refuse a concept that is another one, or another's surrogate, but for one letter.

    Raises:
        ValueError: There is one; the message asks which is meant.
    """
    for place, pair in enumerate(pairs):
        for other in pairs[place + 1 :]:
            if _one_letter_apart(pair.concept, other.concept):
                raise ValueError(
                    f'concept "{shown(other.concept)}" is nearly "{shown(pair.concept)}": did you mean one and the '
                    "same? Give it once, or, if both are meant, forget them in two runs"
                )
        for other in pairs:
            if other is pair or other.surrogate.kind != "prompt" or other.surrogate == pair.surrogate:
                continue
            if _one_letter_apart(pair.concept, other.surrogate.value):
                raise ValueError(
                    f'"{shown(other.surrogate.value)}", the surrogate of "{shown(other.concept)}", is nearly the '
                    f'concept "{shown(pair.concept)}": did you mean that? Choose a surrogate that is kept'
                )


def _one_letter_apart(first: str, second: str) -> bool:
    """Whether two names differ by one letter that is added, left out, another, or in the next one's place."""
    short, long = sorted((name_key(first), name_key(second)), key=len)
    if len(long) - len(short) > 1 or len(short) < _SHORTEST_MISSPELT or short == long:
        return False
    if names_concept(first, second) or names_concept(second, first):  # the one is the other's plural
        return False
    start = next((place for place, pair in enumerate(zip(short, long, strict=False)) if pair[0] != pair[1]), len(short))
    if len(short) < len(long):
        return short[start:] == long[start + 1 :]
    rest, other = short[start:], long[start:]
    return rest[1:] == other[1:] or (rest[:2] == other[1::-1] and rest[2:] == other[2:])


def image_files(folder: str | Path) -> list[Path]:
    """The image files directly in a folder, by name; hidden ones do not count."""
    return sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path.is_file()
    )
