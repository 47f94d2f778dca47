"""What a text-to-image model still samples of a concept, and what else the erasure has changed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ...data.phrasings import fill_template
from ...data.prompt_files import read_prompts
from ..classification import ImageClassifier
from ..comparison import Comparison, compare
from ..groups import HELD_OUT_TEMPLATES, NAMING_TEMPLATES, PromptGroup
from ..measures.clip import Clip
from ..neighbours import near_and_far, picture_embeddings, text_embeddings
from ..quality import FeatureNetwork, check_can_measure
from ..registry import register_protocol
from ..request import Evaluation, Request
from ..scoring import Measure
from ..subject import Subject, draw_both, quality_of
from .base import Protocol

_DATA = Path(__file__).parents[2] / "data"
NOTHING_SCORES = "nothing scores the images: give a CLIP model, a classifier, or both"


@register_protocol("concept")
class ConceptProtocol(Protocol):
    """See `concept_protocol`."""

    takes = "prompts"

    def __init__(self, request: Request) -> None:
        check_can_measure()
        check_something_scores(request)
        args = request.args
        self.prompts = ConceptPrompts(request.trained(), request.held_out())
        self.evoking = read_prompts(args.evoking_prompts, request.config.concept) if args.evoking_prompts else []
        self.clip = Clip.from_request(request)

    def run(self, evaluation: Evaluation) -> Comparison | None:
        subject = evaluation.subject
        near, far = self._near_and_far(evaluation)
        evoking = dict.fromkeys((pair.concept for pair in subject.pairs), self.evoking) if self.evoking else {}
        prompts = replace(self.prompts, evoking=evoking, neighbours=near, unrelated=far)
        return concept_protocol(
            subject, prompts, self.clip, evaluation.classifier, evaluation.measures, evaluation.networks,
            evaluation.provenance,
        )  # fmt: skip

    def _near_and_far(self, evaluation: Evaluation) -> tuple[list[str], list[str]]:
        args, subject, classifier = evaluation.args, evaluation.subject, evaluation.classifier
        near, far = args.neighbours, args.unrelated
        if near is not None and far is not None:
            return near, far
        concepts = [pair.concept for pair in subject.pairs]
        surrogates = [pair.surrogate.value for pair in subject.pairs if pair.surrogate.kind == "prompt"]
        if classifier:
            embed, candidates = picture_embeddings(subject, classifier), classifier.prompted
        else:
            embed, candidates = self.clip.embed_texts if self.clip else text_embeddings(subject.base), []
        # All processes ask for the same images: those that the first has chosen.
        nearest, farthest = broadcast_object_list(list(near_and_far(concepts, surrogates, embed, candidates)))
        if far is None:
            far = [name for name in farthest if name not in (near or [])]
        return nearest if near is None else near, far


def check_something_scores(request: Request) -> None:
    """Refuse an evaluation in which neither CLIP nor a classifier nor a measure looks at the images.

    Raises:
        ValueError: There is none.
    """
    if request.args.clip == "none" and not request.config.classifier and not request.args.measures:
        raise ValueError(NOTHING_SCORES)


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


def evoking_prompts(concept: str) -> list[str]:
    """The built-in prompts that evoke a concept; none for most."""
    known = json.loads((_DATA / "evoking_prompts.json").read_text(encoding="utf-8"))
    return known.get(concept.casefold(), [])


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
        evoking = prompts.evoking[pair.concept] if pair.concept in prompts.evoking else evoking_prompts(pair.concept)
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
        raise ValueError(NOTHING_SCORES)
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
    comparison = compare(groups, before, after, subject.sampling, classifier, facts)
    if classifier is not None:
        features.append(classifier.feature_network())
    quality = quality_of(groups, before, after, features)
    return replace(comparison, report=replace(comparison.report, quality=quality))
