"""A saved pipeline against its base: what changed, with the figures' provenance."""

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from ..configuration import GRID_NAME, REPORT_NAME
from ..data.sensitive import blurred
from ..families import SamplingSettings
from ..files import disk_cause
from ..report import MARKDOWN_NAME, PAGE_NAME, write_report
from ..report.pictures import before_after_grid
from ..report.terminal import format_table
from ..results import SCHEMA_VERSION, Report, Row, Share, Summary, Times, decide
from ..results.schema import (
    Certainty,
    Change,
    ClassifierFacts,
    Distance,
    Paired,
    Quality,
    Remembered,
    RememberedFigures,
    Sampling,
    Towards,
)
from ..results.statistics import frechet_distance, moments
from ..results.verdict import evidence
from .classification import Classification, ImageClassifier
from .groups import PromptGroup
from .quality import NEIGHBOURS, can_measure, image_quality
from .scoring import Drawn

# Pixels of one colour are so close, in every channel.
_ONE_COLOUR = 3 / 255
_STAGING = ".report-writing"
_PACKAGES = ("torch", "diffusers", "transformers")


@dataclass
class Comparison:
    """The outcome: a report, and for each of its rows the first pictures before and after."""

    report: Report
    grid: list[tuple[str, list[Image.Image], list[Image.Image]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.report, dict):
            warnings.warn("a comparison takes a Report: write Report.from_dict(...)", DeprecationWarning, stacklevel=3)
            self.report = Report.from_dict(self.report)

    def save(self, folder: str | Path) -> None:
        """Write `before_after.png`, `report.md`, `report.html` and `report.json` into a folder that is there.

        Where the report's `blur` is true, every picture in them is blurred. `report.json` arrives last: where it is,
        the others are of the same comparison.

        Raises:
            OSError: The disk is full or the folder cannot be written; what was there before is unchanged.
        """
        folder = Path(folder)
        order = {row.name: row.role != "concept" for row in self.report.rows}
        grid = sorted(self.grid, key=lambda entry: order.get(entry[0], True))
        if self.report.blur:
            grid = [(name, *([blurred(picture) for picture in side] for side in sides)) for name, *sides in grid]
        staging = folder / _STAGING
        try:
            # A run that was killed here may have left one.
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            with (staging / GRID_NAME).open("wb") as file:
                before_after_grid(grid, file)
                file.flush()
                os.fsync(file.fileno())
            write_report(self.report, grid, staging, folder)
            self.report.save(staging / REPORT_NAME)
            # From here on the pages may be new: no earlier figures may vouch for them.
            (folder / REPORT_NAME).unlink(missing_ok=True)
            for name in (GRID_NAME, MARKDOWN_NAME, PAGE_NAME, REPORT_NAME):
                (staging / name).replace(folder / name)
        except OSError as error:
            raise OSError(
                f"the report could not be written into {folder} ({disk_cause(error)}): free some space on that disk or "
                "choose another folder, and run the same command again; the images that were sampled are kept"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def table(self) -> str:
        """The rows as aligned text."""
        return format_table(self.report)


def compare(
    groups: Sequence[PromptGroup],
    before: Sequence[Drawn],
    after: Sequence[Drawn],
    settings: SamplingSettings | Sampling,
    classifier: ImageClassifier | None = None,
    provenance: dict[str, Any] | None = None,
    surrogates: Mapping[int, Mapping[str, Classification]] | None = None,
) -> Comparison:
    """Compare the same groups' images before and after.

    Args:
        groups: What was sampled.
        before: The base model's images, one entry for each group.
        after: The erased model's, from the same seeds.
        settings: Sampler and guidance of both.
        classifier: What scored them, if anything did.
        provenance: Further fields of the report (base model, configuration, timings), as its JSON has them.
        surrogates: For each concept, by its label, what the classifier says of its surrogate's own `"samples"` and,
            where a model shows means, of their `"mean"`.
    """
    facts = Report.from_dict(provenance or {})
    sampling = settings if isinstance(settings, Sampling) else Sampling(**settings.to_dict())
    likenesses = _likenesses(groups, before, after)
    rows = [
        _row(group, old, new, likeness)
        for group, old, new, likeness in zip(groups, before, after, likenesses, strict=True)
    ]
    report = replace(
        facts,
        schema_version=SCHEMA_VERSION,
        sampling=sampling,
        versions={name: version(name) for name in _PACKAGES},
        interval="Wilson, 95 %",
        rows=rows,
        black_images=Times(sum(image.black for image in before), sum(image.black for image in after)),
    )
    if classifier is not None:
        own = {
            group.name: {name: _certainty(seen, group.label, True) for name, seen in surrogates[group.label].items()}
            for group in groups
            if group.role == "concept" and surrogates and group.label is not None and group.label in surrogates
        }
        report = replace(
            report,
            classifier=ClassifierFacts(classifier.name, list(classifier.labels)),
            remembered=_remembered(groups, before, after, classifier),
            surrogate_samples=own,
        )
    grid = [(group.name, old.shown, new.shown) for group, old, new in zip(groups, before, after, strict=True)]
    return Comparison(replace(report, verdict=decide(report)), grid)


def _row(group: PromptGroup, before: Drawn, after: Drawn, towards: Towards | None) -> Row:
    row = Row(
        name=group.name,
        role=group.role,
        images=len(group.prompts),
        prompts=list(dict.fromkeys(group.prompts)),
        seeds=_ranges(group.seeds),
        change=_change(before.small, after.small),
        black=Times(before.black, after.black),
        blank=Times(_blank(before.small), _blank(after.small)),
        concept=group.concept,
        phrasing=group.phrasing,
        distance={name: _distance(before.features[name], after.features[name]) for name in before.features},
        scores={name: Times(Summary.of(values), Summary.of(after.measured[name]))
                for name, values in before.measured.items()},
    )  # fmt: skip
    if before.scores is None or after.scores is None or group.label is None:
        return replace(row, towards=None if evidence(row) else towards)
    scores = Times(before.scores, after.scores)
    certainty = [_certainty(each, group.label) for each in scores]
    hits = [_hits(each, group.label) for each in scores]
    row = replace(
        row,
        recognised=Times(*(share_of(each, group.label) for each in scores)),
        probability=Times(*(each.probability for each in certainty)),
        entropy=Times(*(each.entropy for each in certainty)),
        paired=Paired(int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum())),
    )
    if group.surrogate_label is not None:
        row = replace(row, as_surrogate=Times(*(share_of(each, group.surrogate_label) for each in scores)))
    if group.role == "concept":
        # One by one, for a mean hides whether all images changed or half of them.
        single = [[round(value, 6) for value in each.probabilities[:, group.label].tolist()] for each in scores]
        row = replace(row, probabilities=Times(*single))
    return row


def _likenesses(groups: Sequence[PromptGroup], before: Sequence[Drawn], after: Sequence[Drawn]) -> list[Towards | None]:
    """For each concept's row, how far its images are from the base model's own of concept and surrogate."""
    found: list[Towards | None] = []
    for group, old, new in zip(groups, before, after, strict=True):
        if group.role != "concept":
            found.append(None)
            continue
        into = [
            images
            for other, images in zip(groups, before, strict=True)
            if (other.role, other.name, other.seeds) == ("surrogate", group.surrogate, group.seeds)
        ]
        change = _change(old.small, new.small)
        surrogate = _change(into[0].small, new.small).rmse if into else None
        found.append(Towards(change.rmse or 0.0, surrogate, change.rmse_between_seeds))
    return found


def _blank(pictures: np.ndarray) -> int:
    """How many of `[images, height, width, channels]` in [0, 1] are of one colour all over."""
    return int((np.ptp(pictures, axis=(1, 2)) < _ONE_COLOUR).all(-1).sum())


def _distance(before: torch.Tensor, after: torch.Tensor) -> Distance:
    return Distance(
        same_seed=float(1 - cosine_similarity(before, after).mean()),
        between_seeds=float(1 - cosine_similarity(before, before.roll(1, 0)).mean()) if len(before) > 1 else None,
    )


def _ranges(seeds: Sequence[int]) -> list[list[int]]:
    """Seeds as runs of first and last."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return runs


def _hits(scores: Classification, label: int) -> torch.Tensor:
    return scores.probabilities.argmax(-1) == label


def share_of(scores: Classification, label: int) -> Share:
    """The share of pictures that a classifier gives a label."""
    hits = _hits(scores, label)
    return Share.of(int(hits.sum()), len(hits))


def _certainty(scores: Classification, label: int, recognised: bool = False) -> Certainty:
    """Mean probability of a label and mean entropy in nats (paper, Table 1)."""
    probabilities = scores.probabilities.double()
    return Certainty(
        float(probabilities[:, label].mean()),
        float(-torch.xlogy(probabilities, probabilities).sum(-1).mean()),
        share_of(scores, label) if recognised else None,
    )


def _change(before: np.ndarray, after: np.ndarray) -> Change:
    """How far pictures of the same seed are apart, and how far those of different seeds are, before."""
    same = float(np.sqrt(((before - after) ** 2).mean()))
    other = float(np.sqrt(((before - np.roll(before, 1, axis=0)) ** 2).mean())) if len(before) > 1 else None
    return Change(same, other, same / other if other else None)


def _remembered(
    groups: Sequence[PromptGroup], before: Sequence[Drawn], after: Sequence[Drawn], classifier: ImageClassifier
) -> Remembered | None:
    """Of all labels but the concepts': mean recognition, Fréchet distance to real images, and how far the images are
    from the base model's own. None where the classifier knows none of them."""
    chosen = [number for number, group in enumerate(groups) if group.role != "concept" and group.label is not None]
    if not chosen:
        return None
    labels = [label for number in chosen if (label := groups[number].label) is not None]
    reference = classifier.reference_moments(labels)
    figures, seen = [], []
    for images in (before, after):
        scores = [score for number in chosen if (score := images[number].scores) is not None]
        hits = [share_of(score, label).share for score, label in zip(scores, labels, strict=True)]
        features = torch.cat([score.features for score in scores])
        seen.append(features)
        distance = frechet_distance(moments(features), reference) if reference else None
        figures.append(RememberedFigures(sum(hits) / len(hits), distance, len(features)))
    enough = len(seen[1]) > NEIGHBOURS and can_measure()
    against = Quality(**image_quality(seen[1], seen[0])) if enough else None
    return Remembered(figures[0], figures[1], [groups[number].name for number in chosen], against)
