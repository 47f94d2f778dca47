"""What is drawn and measured to show that a concept is gone: one function a protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from ..data.concepts import ErasurePair
from ..families import Objective, SamplingSettings
from ..results.schema import Quality, QualityEntry
from .classification import ImageClassifier
from .comparison import Comparison, compare
from .groups import PromptGroup, label_groups
from .quality import NEIGHBOURS, FeatureNetwork, image_quality
from .scoring import Drawn, Measure, sample_groups, score_groups


@dataclass
class Subject:
    """What is evaluated, and how its images are drawn.

    Attributes:
        base: The base model.
        erased: The erased model.
        pairs: What was erased, and into what.
        settings: Sampler, steps, guidance.
        count: Images for each prompt or class.
        first_seed: The first image's seed, the same before and after.
        artifacts_dir: Where drawn images are kept: what was drawn before is not drawn again.
        accelerator: The processes that share the drawing. The main one scores, and has a protocol's comparison; the
            others have None as soon as all is drawn, so that none waits for it.
    """

    base: Objective
    erased: Objective
    pairs: Sequence[ErasurePair]
    settings: SamplingSettings
    count: int
    first_seed: int
    artifacts_dir: Path
    accelerator: Accelerator


# Streams of seeds of their own: what an attack or a choice of names is drawn with is in no row of a report, and in no
# training. Each has room for the seeds of a million images.
ATTACK_SEEDS, NEIGHBOUR_SEEDS = 31_000_000, 32_000_000
_STREAM = 1_000_000


def stream_seeds(stream: int, first_seed: int, count: int) -> tuple[int, ...]:
    """Seeds of a stream, others for another first seed of the evaluation.

    Args:
        stream: `ATTACK_SEEDS` or `NEIGHBOUR_SEEDS`.
        first_seed: Of the evaluated images.
        count: Images, fewer than 500,000.
    """
    first = stream + first_seed % (_STREAM // 2)
    return tuple(range(first, first + count))


def draw_both(
    subject: Subject,
    groups: Sequence[PromptGroup],
    classifier: ImageClassifier | None = None,
    measures: Sequence[Sequence[Measure]] = ((), ()),
    networks: Sequence[FeatureNetwork] = (),
) -> list[list[Drawn]] | None:
    """What is known of the base model's images and of the erased one's; None in all processes but the main one.

    Args:
        subject: Both models.
        groups: What to draw.
        classifier: Scores the images if given.
        measures: Score them too, those of the base model and those of the erased one.
        networks: Give their features.
    """
    models = (subject.base, subject.erased)
    kept = [
        sample_groups(model, groups, subject.settings, subject.artifacts_dir, subject.accelerator) for model in models
    ]
    if not subject.accelerator.is_main_process:
        return None
    return [
        score_groups(model, groups, folders, classifier, mine, networks)
        for model, folders, mine in zip(models, kept, measures, strict=True)
    ]


def class_protocol(
    subject: Subject,
    classifier: ImageClassifier,
    networks: Sequence[FeatureNetwork] = (),
    real: Sequence[Image.Image] = (),
    provenance: dict[str, Any] | None = None,
) -> Comparison | None:
    """Table 1 of the paper: entropy and probability of the forgotten classes; Fréchet distance, precision and recall
    over the remembered ones; and recognition of every class before and after.

    Args:
        subject: A model whose conditions are classes.
        classifier: One of those classes.
        networks: What gives the features of images.
        real: Real images of the remembered classes. Without them the base model's own images are the only reference.
        provenance: Further fields of the report.

    Raises:
        ValueError: The model knows no classes, or the classifier knows others.
    """
    labels = subject.base.labels
    if labels is None:
        raise ValueError("the class protocol needs a model of classes; this one takes prompts")
    classifier.check_classes(labels, [pair.concept for pair in subject.pairs])
    groups = label_groups(
        classifier.labels, subject.pairs, classifier.label_of, ["{}"], ["{}"], subject.count, subject.first_seed
    )
    drawn = draw_both(subject, groups, classifier, networks=networks)
    if drawn is None:
        return None
    before, after = drawn
    comparison = compare(groups, before, after, subject.settings, classifier, provenance)
    quality = quality_of(groups, before, after, networks, real)
    return replace(comparison, report=replace(comparison.report, quality=quality))


def quality_of(
    groups: Sequence[PromptGroup],
    before: Sequence[Drawn],
    after: Sequence[Drawn],
    networks: Sequence[FeatureNetwork],
    real: Sequence[Image.Image] = (),
) -> list[QualityEntry]:
    """Fréchet distance, precision and recall over all groups but the concepts', in the features of each network."""
    kept = [number for number, group in enumerate(groups) if group.role != "concept"]
    measured = []
    for network in networks:
        features = {
            time: torch.cat([drawn[number].features[network.name] for number in kept])
            for time, drawn in (("before", before), ("after", after))
        }
        measured += _quality(network, features, real)
    return measured


def _quality(
    network: FeatureNetwork, features: dict[str, torch.Tensor], real: Sequence[Image.Image]
) -> list[QualityEntry]:
    """Before and after against real images, and after against before, in one network's features."""
    before, after = features["before"], features["after"]
    own = Quality(**image_quality(after, before))
    measured = [
        QualityEntry(network.name, "the base model's own images", len(after), len(before), NEIGHBOURS, after=own)
    ]
    if real:
        reference = network(real)
        both = [Quality(**image_quality(images, reference)) for images in (before, after)]
        measured.insert(0, QualityEntry(network.name, "real images", len(after), len(real), NEIGHBOURS, *both))
    return measured
