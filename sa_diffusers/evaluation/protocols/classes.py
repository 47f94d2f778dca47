"""The paper's Table 1, for models of classes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from ...configuration import EvaluationConfig
from ...data.image_datasets import load_labelled_images
from ...families import Objective
from ..classification import ImageClassifier
from ..comparison import Comparison, compare
from ..erased import takes_classes
from ..groups import label_groups
from ..quality import FeatureNetwork, check_can_measure
from ..registry import register_protocol
from ..request import Evaluation, Request
from ..scoring import Measure
from ..subject import Subject, draw_both, quality_of
from .base import Protocol

_OF_PROMPTS = "the class protocol needs a model of classes; this one takes prompts"


@register_protocol("class")
class ClassProtocol(Protocol):
    """See `class_protocol`."""

    def __init__(self, request: Request) -> None:
        check_can_measure()
        if not request.config.classifier:
            raise ValueError("the class protocol needs --classifier: a folder or a Hub name of an image classifier")
        if takes_classes(request.args.base, request.config.revision) is False:
            raise ValueError(_OF_PROMPTS)

    def run(self, evaluation: Evaluation) -> Comparison | None:
        args, subject, classifier = evaluation.args, evaluation.subject, evaluation.classifier
        if classifier is None:
            raise ValueError("the class protocol needs a classifier")
        real = real_images(args, subject.base, [pair.concept for pair in subject.pairs])
        networks = [classifier.feature_network(), *evaluation.networks]
        source = args.real and f"{args.real}, split {args.real_split}"
        provenance = {**evaluation.provenance, "real_images": source}
        return class_protocol(subject, classifier, networks, real, provenance, evaluation.measures)


def class_protocol(
    subject: Subject,
    classifier: ImageClassifier,
    networks: Sequence[FeatureNetwork] = (),
    real: Sequence[Image.Image] = (),
    provenance: dict[str, Any] | None = None,
    measures: Sequence[Measure] = (),
) -> Comparison | None:
    """Table 1 of the paper: entropy and probability of the forgotten classes; Fréchet distance, precision and recall
    over the remembered ones; and recognition of every class before and after.

    Args:
        subject: A model whose conditions are classes.
        classifier: One of those classes.
        networks: What gives the features of images.
        real: Real images of the remembered classes. Without them the base model's own images are the only reference.
        provenance: Further fields of the report.
        measures: Score the images too.

    Raises:
        ValueError: The model knows no classes, or the classifier knows others.
    """
    labels = subject.base.labels
    if labels is None:
        raise ValueError(_OF_PROMPTS)
    classifier.check_classes(labels, [pair.concept for pair in subject.pairs])
    groups = label_groups(
        classifier.labels, subject.pairs, classifier.label_of, ["{}"], ["{}"], subject.count, subject.first_seed,
        prompted=classifier.prompted,
    )  # fmt: skip
    drawn = draw_both(subject, groups, classifier, (measures, measures), networks)
    if drawn is None:
        return None
    before, after = drawn
    facts = {"evaluators": [measure.provenance() for measure in measures], **(provenance or {})}
    comparison = compare(groups, before, after, subject.sampling, classifier, facts)
    quality = quality_of(groups, before, after, networks, real)
    return replace(comparison, report=replace(comparison.report, quality=quality))


def real_images(args: EvaluationConfig, objective: Objective, forgotten: list[str]) -> list[Image.Image]:
    """The real images of the remembered classes, in the model's format."""
    if not args.real:
        return []
    data = load_labelled_images(args.real, args.real_split)
    try:
        data = data.under(objective.labels or [])
    except ValueError as error:
        raise ValueError(f"--real {args.real} does not fit the model: {error}") from error
    pixels = data.without(forgotten).fitted(objective.resolution, 3).pixels
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
