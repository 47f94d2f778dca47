"""What a text-to-image model still draws of a concept, and what else the erasure has changed."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from ..data.phrasings import fill_template
from ..families import Objective
from ..names import names_concept
from .classification import ImageClassifier
from .clip import Clip
from .comparison import Comparison, compare
from .groups import PromptGroup
from .protocols import NEIGHBOUR_SEEDS, Subject, draw_both, quality_of, stream_seeds
from .quality import FeatureNetwork
from .scoring import Measure, draw_groups

NAMING_TEMPLATES = ("{}", "a photo of {}", "a close-up of {}", "{} on a white background", "{} at night")
HELD_OUT_TEMPLATES = (
    "this is what {} looks like",
    "an old snapshot that shows {}",
    "{} on the cover of a magazine",
    "a pencil drawing of {}",
    "{} seen through a window",
)
_DATA = Path(__file__).parent.parent / "data"
NEIGHBOURS, UNRELATED = 5, 5
_PICTURES = 16


@dataclass
class ConceptPrompts:
    """What is asked for.

    Attributes:
        trained: Phrasings of the training; `{}` stands for the concept.
        held_out: Phrasings that no training saw.
        evoking: For each concept, prompts that bring it to mind without naming it (paper, Figure 16). Those of the
            concepts of the paper are built in.
        neighbours: What lies near the concept, where collateral damage comes first (paper, appendix E).
        unrelated: What lies far from it.
    """

    trained: Sequence[str] = ("{}",)
    held_out: Sequence[str] = NAMING_TEMPLATES[1:] + HELD_OUT_TEMPLATES
    evoking: dict[str, list[str]] = field(default_factory=dict)
    neighbours: Sequence[str] = ()
    unrelated: Sequence[str] = ()


def default_held_out(trained: Sequence[str]) -> list[str]:
    """The built-in phrasings but those of the training."""
    return [text for text in (*NAMING_TEMPLATES, *HELD_OUT_TEMPLATES) if text not in trained]


def evoking_prompts(concept: str) -> list[str]:
    """The built-in prompts that evoke a concept; none for most."""
    known = json.loads((_DATA / "evoking_prompts.json").read_text(encoding="utf-8"))
    return known.get(concept.casefold(), [])


def near_and_far(
    concepts: Sequence[str],
    surrogates: Sequence[str],
    embed: Callable[[Sequence[str]], torch.Tensor],
    candidates: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """The candidates that lie nearest to the concepts (a third of them, at most 5), and others spread over the rest.

    Args:
        concepts: What was erased.
        surrogates: What it turned into.
        embed: Names -> `[n, d]`; near is what has a high cosine. See `text_embeddings` and `picture_embeddings`.
        candidates: Names to choose from. Default: a built-in list of people, styles, bodies and things.
    """
    if not candidates:
        known = json.loads((_DATA / "neighbours.json").read_text(encoding="utf-8"))
        candidates = [name for names in known.values() for name in names]
    taken = [*concepts, *surrogates]
    candidates = [
        name
        for name in candidates
        if not any(names_concept(name, other) or names_concept(other, name) for other in taken)
    ]
    if not candidates:
        return [], []
    embedded = normalize(embed([*concepts, *candidates]).double(), dim=-1)
    closeness = (embedded[len(concepts) :] @ embedded[: len(concepts)].T).max(-1).values
    order = [candidates[index] for index in torch.argsort(closeness, descending=True, stable=True).tolist()]
    near = min(NEIGHBOURS, math.ceil(len(order) / 3))
    rest = order[near:]
    return order[:near], rest[:: -max(1, len(rest) // UNRELATED)][:UNRELATED]


def text_embeddings(objective: Objective) -> Callable[[Sequence[str]], torch.Tensor]:
    """The base model's own embeddings of names, averaged over their tokens."""
    return lambda names: objective.encode_prompts(names)["encoder_hidden_states"].mean(1).cpu()


def picture_embeddings(subject: Subject, classifier: ImageClassifier) -> Callable[[Sequence[str]], torch.Tensor]:
    """What the classifier sees in the base model's images of names: mean features, less their mean over all names."""

    def embed(names: Sequence[str]) -> torch.Tensor:
        seeds = stream_seeds(NEIGHBOUR_SEEDS, subject.first_seed, _PICTURES)
        groups = [PromptGroup(name, "remembered", (name,) * _PICTURES, seeds) for name in names]
        drawn = draw_groups(
            subject.base, groups, subject.settings, subject.artifacts_dir, subject.accelerator, classifier
        )
        means = torch.stack([seen.features[classifier.name].double().mean(0) for seen in drawn])
        return means - means.mean(0)

    return embed


def concept_groups(
    subject: Subject, prompts: ConceptPrompts, classifier: ImageClassifier | None = None
) -> list[PromptGroup]:
    """The rows of the protocol: concepts (as trained, held out, evoked), surrogates, neighbours, unrelated concepts."""
    label_of = classifier.label_of if classifier else lambda _: None
    rows: list[PromptGroup] = []

    def add(name: str, role: str, texts: Sequence[str], subject_name: str, **more: Any) -> None:
        first = subject.first_seed + len(rows) * subject.count
        prompts = tuple(texts[index % len(texts)] for index in range(subject.count))
        seeds = tuple(range(first, first + subject.count))
        rows.append(PromptGroup(name, role, prompts, seeds, label_of(subject_name), **more))

    for pair in subject.pairs:
        into = pair.surrogate.value if pair.surrogate.kind == "prompt" else None
        facts = {"surrogate_label": label_of(into) if into else None, "concept": pair.concept, "surrogate": into}
        evoking = prompts.evoking.get(pair.concept) or evoking_prompts(pair.concept)
        for suffix, phrasing, texts in (
            ("", "trained", [fill_template(template, pair.concept) for template in prompts.trained]),
            (" (held-out phrasings)", "held-out", [fill_template(text, pair.concept) for text in prompts.held_out]),
            (" (evoked)", "evoked", list(evoking)),
        ):
            if texts:
                add(pair.concept + suffix, "concept", texts, pair.concept, phrasing=phrasing, **facts)
    surrogates = dict.fromkeys(pair.surrogate.value for pair in subject.pairs if pair.surrogate.kind == "prompt")
    others = {"surrogate": surrogates, "neighbour": prompts.neighbours, "remembered": prompts.unrelated}
    for role, names in others.items():
        for name in names:
            add(name, role, [fill_template(template, name) for template in prompts.held_out], name)
    return rows


def concept_protocol(
    subject: Subject,
    prompts: ConceptPrompts,
    clip: Clip | None = None,
    classifier: ImageClassifier | None = None,
    measures: Sequence[Measure] = (),
    networks: Sequence[FeatureNetwork] = (),
    provenance: dict[str, Any] | None = None,
) -> Comparison | None:
    """Whether the concept is gone, in phrasings trained, held out and unnamed, and what became of everything else.

    Args:
        subject: A model whose conditions are prompts.
        prompts: What is asked for.
        clip: Gives CLIP scores and zero-shot classification among all names that are asked for, and the distance of
            remembered images from the base's at the same seeds.
        classifier: An image classifier that knows some of the names.
        measures: Score the images too.
        networks: Give features: for Fréchet distance, precision, recall, and the distance at the same seeds.
        provenance: Further fields of the report.

    Raises:
        ValueError: The model's conditions are classes, or there is nothing to score with.
    """
    if subject.base.labels is not None:
        raise ValueError("the concept protocol needs a model that takes prompts; this one knows classes: take class")
    if clip is None and classifier is None and not measures:
        raise ValueError("nothing scores the images: give a CLIP model, a classifier, or both")
    groups = concept_groups(subject, prompts, classifier)
    every: list[Measure] = list(measures)
    features = list(networks)
    if clip is not None:
        concepts = [pair.concept for pair in subject.pairs]
        surrogates = [group.name for group in groups if group.role == "surrogate"]
        clip.choose_among(concepts, surrogates, [*prompts.neighbours, *prompts.unrelated])
        every.insert(0, clip)
        features.insert(0, clip.feature_network())
    drawn = draw_both(subject, groups, classifier, (every, every), features)
    if drawn is None:
        return None
    before, after = drawn
    facts = {"evaluators": [measure.provenance() for measure in every], **(provenance or {})}
    comparison = compare(groups, before, after, subject.settings, classifier, facts)
    if classifier is not None:
        features.append(classifier.feature_network())
    quality = quality_of(groups, before, after, features)
    return replace(comparison, report=replace(comparison.report, quality=quality))
