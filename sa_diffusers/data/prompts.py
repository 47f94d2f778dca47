"""Concepts, surrogates, phrasings, and the prompts to remember."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

_VOCABULARIES = Path(__file__).parent / "vocabularies"
_ARTICLES = ("a", "an", "the")
UNIFORM_NOISE = "uniform_noise"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


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
    return _pair(concepts, [parse_surrogate(surrogate, must_exist) for surrogate in surrogates], bare_name)


def check_pairs(concepts: Sequence[str], surrogates: Sequence[str]) -> None:
    """What can be said of concepts and surrogates before it is known whether they are phrases or classes.

    Raises:
        ValueError: As `pair_concepts`.
    """
    _pair(concepts, [parse_surrogate(surrogate) for surrogate in surrogates], lambda name: " ".join(name.split()))


def _pair(concepts: Sequence[str], surrogates: Sequence[Surrogate], key: Callable[[str], str]) -> list[ErasurePair]:
    """Pair them; `key` is what two names have in common that mean the same."""
    for kind, values in (("concept", concepts), ("surrogate", [surrogate.value for surrogate in surrogates])):
        if not values or not all(values):
            example = '--concept "Brad Pitt" --surrogate "a middle aged man"'
            raise ValueError(f"{kind} is empty: say what to forget and what it turns into, such as {example}")
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
            raise ValueError(f'concept "{concept}" stands twice')
        if surrogate.kind == "prompt" and key(concept) == key(surrogate.value):
            raise ValueError(
                f'concept "{concept}" equals its surrogate "{surrogate.value}": nothing would be forgotten. Choose '
                "another surrogate"
            )
        if surrogate.kind == "prompt" and any(key(surrogate.value) == key(other) for other in concepts):
            raise ValueError(
                f'"{surrogate.value}" is the surrogate of "{concept}" and is itself to be forgotten: choose a '
                "surrogate that is kept"
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
    path = Path(text).expanduser()
    looks_like_path = text.startswith(("/", "./", "../", "~"))
    if looks_like_path or ("/" in text and path.is_dir()):
        if must_exist and not path.is_dir():
            raise ValueError(f'surrogate folder "{text}" does not exist')
        if must_exist and not image_files(path):
            raise ValueError(f'surrogate folder "{text}" holds no image ({", ".join(IMAGE_SUFFIXES)})')
        return Surrogate("images", str(path))
    return Surrogate("prompt", text)


def image_files(folder: str | Path) -> list[Path]:
    """The image files directly in a folder, by name."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def bare_name(text: str) -> str:
    """A phrase in small letters and without its article: what two names have in common that mean the same."""
    words = text.casefold().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in _ARTICLES else words)


def fill_template(template: str, concept: str) -> str:
    """Put a concept into a phrasing, with the article that fits.

    `a {}` becomes `an {}` before a vowel, and loses its article when the concept brings one.

    >>> fill_template("a photo of a {}", "ankle boot")
    'a photo of an ankle boot'
    >>> fill_template("a photo of a {}", "a middle aged man")
    'a photo of a middle aged man'
    """
    has_article = concept.casefold().split()[:1] and concept.casefold().split()[0] in _ARTICLES
    if has_article:
        template = re.sub(r"\b(a|an|the) \{\}", "{}", template, flags=re.IGNORECASE)
    elif concept[:1].casefold() in "aeiou":
        template = re.sub(r"\b([Aa]) \{\}", r"\1n {}", template)
    return template.replace("{}", concept)


def names_concept(prompt: str, concept: str) -> bool:
    """Whether a prompt names the concept as whole words, in any case, possessive and plural included.

    A hyphenated word is one word: "t-shirt" does not name "shirt".
    """
    words = bare_name(concept).split()
    pattern = r"\s+".join(re.escape(word) for word in words)
    return re.search(rf"(?<![\w-]){pattern}(?:'s|’s|s|es)?(?![\w-])", prompt.casefold()) is not None


def concept_parts(concept: str) -> list[str]:
    """The words of a concept that mean something by themselves: "Brad" and "Pitt"."""
    ignored = {*_ARTICLES, "of", "in", "on", "and", "with", "by", "at", "to", "style", "person", "photo"}
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
    """Prompts of a text file, one a line; empty lines do not count.

    Args:
        path: The file.
        concepts: What no prompt may name.
        stands_for: What `{}` stands for in the prompts, if for anything; it is told where the file is empty.

    Raises:
        ValueError: There is no such file, it is not text in UTF-8, it is empty, or a prompt names a concept.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(
            f"the file of prompts {path} does not exist and could not be read: give a text file in UTF-8"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the file of prompts {path} could not be read ({error}): give a text file in UTF-8"
        ) from error
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        form = f", with {{}} for the {stands_for}" if stands_for else ""
        raise ValueError(f"the file of prompts {path} is empty: give one prompt a line{form}")
    for prompt in prompts:
        for concept in concepts:
            if names_concept(prompt, concept):
                raise ValueError(f'{path}: "{prompt}" names "{concept}", which these prompts must not')
    return prompts


def read_templates(path: str | Path) -> list[str]:
    """Phrasings of a text file, one a line; see `read_prompts`.

    Raises:
        ValueError: A line has no `{}`.
    """
    templates = read_prompts(path, stands_for="concept")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f'{path}: "{template}" has no {{}} where the concept goes')
    return templates


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
        raise ValueError(f'"{text}" is the name of several classes: give one of the numbers {numbers}')
    shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
    raise ValueError(
        f'"{text}" is not a class of this model: give one of {shown}, or a number from 0 to {len(labels) - 1}'
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
        if Path(text).is_dir():
            raise ValueError(f"{error}. To name the folder of images, write ./{text}") from None
        raise


def class_replay_prompts(
    labels: Sequence[str], count: int, concepts: Sequence[str], unconditional_share: float = 0.0
) -> list[str]:
    """Every class but the concepts, as evenly as `count` allows; see `replay_prompts` for the empty prompt's share."""
    remembered = [label for label in labels if label not in concepts]
    captions = [remembered[place % len(remembered)] for place in range(count - round(count * unconditional_share))]
    return _with_empty_prompts(captions, count)


def replay_prompts(
    source: str, count: int, seed: int, concepts: Sequence[str], unconditional_share: float = 0.0
) -> list[str]:
    """Prompts to remember, for `count` replay images.

    Args:
        source: A built-in vocabulary (`"diverse"`, `"garments"`), a text file with one prompt a line, or a dataset's
            column as `NAME:COLUMN` or `NAME:COLUMN:SPLIT`, NAME being a repository on the Hub or a local folder.
        count: Number of prompts; a shorter list is repeated.
        seed: Order and draw.
        concepts: Concepts that are being forgotten.
        unconditional_share: Share of the images that belong to the empty prompt, spread evenly over the list.
            Classifier-free guidance extrapolates away from the empty prompt: if its prediction drifts while the concept
            is missing from replay, guidance pushes the concept's prompt back towards the concept.

    Raises:
        ValueError: There is no such source, it is empty, or a prompt names a concept (the message quotes the first).
    """
    captions = _captions(source, count - round(count * unconditional_share), seed, concepts)
    return _with_empty_prompts(captions, count)


def _with_empty_prompts(captions: list[str], count: int) -> list[str]:
    prompts = iter(captions)
    return [
        next(prompts) if len(captions) * (place + 1) // count > len(captions) * place // count else ""
        for place in range(count)
    ]


def _captions(source: str, count: int, seed: int, concepts: Sequence[str]) -> list[str]:
    if source in builtin_vocabularies():
        return generate_captions(load_vocabulary(source), count, seed, avoid=concepts)
    path = Path(source).expanduser()
    if path.is_file():
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif ":" in source:
        prompts = _dataset_column(source)
    else:
        raise ValueError(
            f'replay_prompts="{source}" is neither one of {", ".join(map(repr, builtin_vocabularies()))}, nor a file, '
            "nor a dataset's column written as NAME:COLUMN"
        )
    if not prompts:
        raise ValueError(f'replay_prompts="{source}" holds no prompt')
    check_replay_prompts(prompts, concepts)
    draw = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += draw.sample(prompts, len(prompts))
    return chosen[:count]


def check_replay_prompts(prompts: Sequence[str], concepts: Sequence[str]) -> None:
    """Refuse replay prompts that would teach the concept again.

    Raises:
        ValueError: A prompt names a concept; the message says which, and how many do.
    """
    for concept in concepts:
        naming = [prompt for prompt in prompts if names_concept(prompt, concept)]
        if naming:
            raise ValueError(
                f'{len(naming)} of {len(prompts)} replay prompts name the concept "{concept}", which replay would '
                f'teach again. The first is: "{naming[0]}". Remove them'
            )


def _dataset_column(source: str) -> list[str]:
    name, column, *split = source.split(":")
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split[0] if split else "train")
    except Exception as error:
        raise ValueError(f'replay_prompts="{source}": the dataset "{name}" could not be loaded ({error})') from error
    if column not in dataset.column_names:
        raise ValueError(
            f'replay_prompts="{source}": the dataset has no column "{column}"; it has {", ".join(dataset.column_names)}'
        )
    return [str(prompt).strip() for prompt in dataset[column] if str(prompt).strip()]
