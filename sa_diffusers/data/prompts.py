"""Concepts, surrogates, phrasings, and the prompts to remember."""

import json
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ..messages import did_you_mean, near_paths, shown
from ..names import ARTICLES, bare_name, name_key, names_concept, says_something
from ..objectives.base import Objective
from .prompt_files import FORMS, read_texts, split_source

_VOCABULARIES = Path(__file__).parent / "vocabularies"
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
    pairs = _pair(concepts, parsed, name_key)
    _check_near_names(pairs)
    return pairs


def check_pairs(concepts: Sequence[str], surrogates: Sequence[str]) -> None:
    """What can be said of concepts and surrogates before it is known whether they are phrases or classes.

    Raises:
        ValueError: As `pair_concepts`.
    """
    _pair(concepts, [parse_surrogate(surrogate) for surrogate in surrogates], lambda name: " ".join(name.split()))


def _pair(concepts: Sequence[str], surrogates: Sequence[Surrogate], key: Callable[[str], str]) -> list[ErasurePair]:
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
    path = _folder(text)
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


def _folder(text: str) -> Path | None:
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
    path = _folder(text)
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
    path = _folder(text)
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


def concept_parts(concept: str) -> list[str]:
    """The words of a concept that mean something by themselves: "Brad" and "Pitt"."""
    ignored = {*ARTICLES, "of", "in", "on", "and", "with", "by", "at", "to", "style", "person", "photo"}
    return [word for word in bare_name(concept).split() if word not in ignored and len(word) > 1]


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


def read_prompts(path: str | Path, concepts: Sequence[str] = (), stands_for: str | None = None) -> list[str]:
    """Prompts of a file or a dataset; see `sa_diffusers.data.prompt_files` for the forms.

    Args:
        path: `FILE`, `FILE:COLUMN`, `NAME:COLUMN` or `NAME:COLUMN:SPLIT`.
        concepts: What no prompt may name.
        stands_for: What `{}` stands for in the prompts, if for anything; it is told where the file is empty.

    Raises:
        ValueError: There is no such file, it cannot be read as text, it is empty, or a prompt names a concept.
    """
    name = shown(str(path), 200)
    file, column, _ = split_source(str(path))
    if column is None and not _is_there(file):
        raise ValueError(
            f"the file of prompts {name} does not exist and could not be read{near_paths(file)}: give {FORMS}"
        )
    try:
        prompts = read_texts(path, name)
    except ValueError as error:
        raise ValueError(f"the file of prompts could not be read: {error}") from error
    if not prompts:
        form = f", with {{}} for the {stands_for}" if stands_for else ""
        raise ValueError(f"the file of prompts {name} is empty: give one prompt a line{form}")
    for prompt in prompts:
        for concept in concepts:
            if names_concept(prompt, concept):
                raise ValueError(f'{name}: "{shown(prompt)}" names "{shown(concept)}", which these prompts must not')
    return prompts


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


def check_phrasings(objective: Objective, pairs: Sequence[ErasurePair], templates: Sequence[str]) -> None:
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


def warn_of_cut_prompts(objective: Objective, prompts: Sequence[str], place: str) -> None:
    """Warn of prompts whose ends the model does not read, such as those of a user's own file."""
    distinct = list(dict.fromkeys(prompts))
    if count := objective.count_cut(distinct):
        warnings.warn(
            f"{place}: {count} of {len(distinct)} prompts are longer than what the text encoder reads, and are cut",
            stacklevel=2,
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
    pairs = _pair([class_name(concept, labels) for concept in concepts], named, str)
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
        path = _folder(text)
        if path is not None and path.is_dir():
            raise ValueError(f"{error}. To name the folder of images, write ./{shown(text)}") from None
        if "/" in text:
            raise ValueError(f"{error}. There is no folder of images of that name{near_paths(text)}") from None
        raise


def class_replay_prompts(
    labels: Sequence[str], count: int, concepts: Sequence[str], unconditional_share: float = 0.0
) -> list[str]:
    """Every class but the concepts, as evenly as `count` allows; see `replay_prompts` for the empty prompt's share."""
    remembered = [label for label in labels if label not in concepts]
    captions = [remembered[place % len(remembered)] for place in range(count - round(count * unconditional_share))]
    return _with_empty_prompts(captions, count)


def replay_prompts(
    source: str,
    count: int,
    seed: int,
    concepts: Sequence[str],
    unconditional_share: float = 0.0,
    drop_naming: bool = False,
) -> list[str]:
    """Prompts to remember, for `count` replay images.

    Args:
        source: A built-in vocabulary (`"diverse"`, `"garments"`), a text file with one prompt a line, a CSV, TSV, JSON,
            JSON lines or parquet file as FILE or FILE:COLUMN, or a dataset's column as `NAME:COLUMN` or
            `NAME:COLUMN:SPLIT`, NAME being a repository on the Hub or a local folder.
        count: Number of prompts; a shorter list is repeated.
        seed: Order and draw.
        concepts: Concepts that are being forgotten.
        unconditional_share: Share of the images that belong to the empty prompt, spread evenly over the list.
            Classifier-free guidance extrapolates away from the empty prompt: if its prediction drifts while the concept
            is missing from replay, guidance pushes the concept's prompt back towards the concept.
        drop_naming: Leave out prompts that name a concept, with a warning that counts them, in place of refusing them.

    Raises:
        ValueError: There is no such source, it is empty, or a prompt names a concept (the message quotes the first).
    """
    captions = _captions(source, count - round(count * unconditional_share), seed, concepts, drop_naming)
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
    if column is None and not Path(name).suffix and "/" not in name and not _is_there(name):
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


def _is_there(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


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
