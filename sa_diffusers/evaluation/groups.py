"""Which prompts and seeds are evaluated together: one row of a report each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..data.concepts import ErasurePair
from ..data.phrasings import fill_template
from ..names import names_concept

# A classifier's labels are not the model's world: with more of them not each has a row.
MOST_LABELS = 20
REMEMBERED_PROMPTS = 6
NAMING_TEMPLATES = ("{}", "a photo of {}", "a close-up of {}", "{} on a white background", "{} at night")
HELD_OUT_TEMPLATES = (
    "this is what {} looks like",
    "an old snapshot that shows {}",
    "{} on the cover of a magazine",
    "a pencil drawing of {}",
    "{} seen through a window",
)


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that are evaluated together, one row of the table.

    Attributes:
        name: What the row is called.
        role: `"concept"`, `"surrogate"`, `"neighbour"` (what lies near the concept) or `"remembered"`.
        prompts: One for each image.
        seeds: One for each image, the same before and after.
        label: The classifier's label that the prompts ask for, if it has one.
        surrogate_label: For a concept, its surrogate's label.
        concept: For a concept's row, which.
        phrasing: For a concept's row: `"trained"`, `"held-out"`, `"evoked"` or `"attack"`.
        surrogate: For a concept's row, the name of its surrogate's.
    """

    name: str
    role: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    label: int | None = None
    surrogate_label: int | None = None
    concept: str | None = None
    phrasing: str | None = None
    surrogate: str | None = None


def label_groups(
    labels: Sequence[str],
    pairs: Sequence[ErasurePair],
    label_of: Callable[[str], int | None],
    concept_templates: Sequence[str],
    eval_templates: Sequence[str],
    count: int,
    first_seed: int,
    remembered: Sequence[str] = (),
    neighbours: Sequence[str] = (),
    prompted: Sequence[str] | None = None,
    concept_count: int | None = None,
) -> list[PromptGroup]:
    """A group for each of a classifier's labels that a prompt can ask for, and two for each concept: in phrasings of
    the evaluation and in those that it was trained on. A concept or surrogate that the classifier does not know has its
    groups too.

    Of more than `MOST_LABELS` labels those have a group that are concepts, surrogates, or named by a prompt to
    remember, at most so many; without any of the latter, prompts to remember have groups of their own.

    Args:
        labels: The classifier's.
        pairs: What was erased.
        label_of: Text -> index of a label, or None.
        concept_templates: Phrasings of the training.
        eval_templates: Phrasings of the evaluation.
        count: Images for each group.
        first_seed: The first group's; each group has seeds of its own.
        remembered: Prompts to remember.
        neighbours: Labels that lie near a concept.
        prompted: Labels that a prompt can ask for. Default: all.
        concept_count: Images for each group of a concept, no fewer than `count`. Default: as many.
    """
    same = list(concept_templates) == list(eval_templates)
    concepts = {label_of(pair.concept): pair for pair in reversed(pairs)}
    surrogates = {label_of(pair.surrogate.value) for pair in pairs if pair.surrogate.kind == "prompt"}
    shown, others = _labels_shown(labels, {*concepts, *surrogates}, remembered, prompted)
    groups, taken = [], len(labels)
    # What concepts have beyond the others' number begins behind everybody's.
    more = max(0, (concept_count or count) - count)
    beyond = first_seed + (len(labels) + 3 * len(pairs) + len(others)) * count

    def seeds_of_concept(number: int) -> tuple[int, ...]:
        nonlocal beyond
        beyond += more
        return (*_seeds(first_seed, number, count), *range(beyond - more, beyond))

    for index in shown:
        pair = concepts.get(index)
        name = labels[index]
        if pair:
            phrasing = "trained" if same else "held-out"
            groups.append(_concept_group(name, pair, phrasing, eval_templates, seeds_of_concept(index), label_of))
        else:
            seeds = _seeds(first_seed, index, count)
            role = "surrogate" if index in surrogates else "neighbour" if name in neighbours else "remembered"
            groups.append(PromptGroup(name, role, _spread(eval_templates, name, count), seeds, index))
    for pair in pairs:
        if not same:
            name = f"{pair.concept} (trained phrasings)"
            seeds = seeds_of_concept(taken)
            groups.append(_concept_group(name, pair, "trained", concept_templates, seeds, label_of))
            taken += 1
    for pair in pairs:
        if label_of(pair.concept) is None:
            phrasing = "trained" if same else "held-out"
            seeds = seeds_of_concept(taken)
            groups.append(_concept_group(pair.concept, pair, phrasing, eval_templates, seeds, label_of))
            taken += 1
    foreign = [pair.surrogate.value for pair in pairs
               if pair.surrogate.kind == "prompt" and label_of(pair.surrogate.value) is None]  # fmt: skip
    for role, names in (("surrogate", dict.fromkeys(foreign)), ("remembered", others)):
        for name in names:
            texts = _spread(eval_templates, name, count) if role == "surrogate" else (name,) * count
            groups.append(PromptGroup(name, role, texts, _seeds(first_seed, taken, count)))
            taken += 1
    return groups


def _labels_shown(
    labels: Sequence[str], needed: set[int | None], remembered: Sequence[str], prompted: Sequence[str] | None
) -> tuple[list[int], list[str]]:
    """Which labels have a group, and the prompts that have one in place of the others."""
    # Two labels of one name, as ImageNet has, are one thing to ask for: the concept would stand beside itself.
    first: dict[str, int] = {}
    for index, label in enumerate(labels):
        first.setdefault(label, index)
    known = [index for label, index in first.items() if prompted is None or label in prompted or index in needed]
    if len(known) <= MOST_LABELS:
        return known, []
    named = [
        index
        for index in known
        if index not in needed and any(names_concept(prompt, labels[index]) for prompt in dict.fromkeys(remembered))
    ]
    # Spread over all of them, for neighbours in a list are often alike.
    named = named[:: max(1, -(-len(named) // (MOST_LABELS - len(needed))))]
    prompts = [] if named else [prompt for prompt in dict.fromkeys(remembered) if prompt][:REMEMBERED_PROMPTS]
    return sorted({*named, *(index for index in needed if index is not None)}), prompts


def _concept_group(
    name: str,
    pair: ErasurePair,
    phrasing: str,
    templates: Sequence[str],
    seeds: tuple[int, ...],
    label_of: Callable[[str], int | None] = lambda _: None,
) -> PromptGroup:
    into = pair.surrogate.value if pair.surrogate.kind == "prompt" else None
    # A label may be written otherwise than the concept; its rows ask for it as the classifier's other rows do.
    asked = name if phrasing != "trained" or name == pair.concept else pair.concept
    return PromptGroup(
        name, "concept", _spread(templates, asked, len(seeds)), seeds, label_of(pair.concept),
        label_of(pair.surrogate.value), pair.concept, phrasing, into,
    )  # fmt: skip


def prompt_groups(
    pairs: Sequence[ErasurePair],
    remembered: Sequence[str],
    templates: Sequence[str],
    count: int,
    first_seed: int,
    concept_templates: Sequence[str] | None = None,
) -> list[PromptGroup]:
    """Groups where there is no classifier: concepts, surrogates, and remembered prompts.

    Concepts and surrogates share their seeds, so that the images of one can be compared with those of the other.

    Args:
        pairs: What was erased.
        remembered: Prompts to remember, one row each.
        templates: Phrasings of the evaluation.
        count: Images for each group.
        first_seed: The first group's.
        concept_templates: Phrasings of the training, for a row of each concept's own where they are others.
    """
    same = concept_templates is None or list(concept_templates) == list(templates)
    shared = _seeds(first_seed, 0, count)
    groups = [
        _concept_group(pair.concept, pair, "trained" if same else "held-out", templates, shared) for pair in pairs
    ]
    if not same:
        groups += [
            _concept_group(f"{pair.concept} (trained phrasings)", pair, "trained", concept_templates or [],
                           _seeds(first_seed, 1, count))
            for pair in pairs
        ]  # fmt: skip
    for value in dict.fromkeys(pair.surrogate.value for pair in pairs if pair.surrogate.kind == "prompt"):
        groups.append(PromptGroup(value, "surrogate", _spread(templates, value, count), shared))
    for number, prompt in enumerate(remembered):
        groups.append(PromptGroup(prompt, "remembered", (prompt,) * count, _seeds(first_seed, 2 + number, count)))
    return groups


def _seeds(first_seed: int, number: int, count: int) -> tuple[int, ...]:
    """Each group has seeds of its own."""
    return tuple(range(first_seed + number * count, first_seed + (number + 1) * count))


def _spread(templates: Sequence[str], concept: str, count: int) -> tuple[str, ...]:
    return tuple(fill_template(templates[number % len(templates)], concept) for number in range(count))


def default_held_out(trained: Sequence[str]) -> list[str]:
    """The built-in phrasings but those of the training."""
    return [text for text in (*NAMING_TEMPLATES, *HELD_OUT_TEMPLATES) if text not in trained]
