"""Sampling the images of groups, and scoring them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..data.generation import SampleGenerator, count_black
from ..families import Objective, SamplingSettings
from ..passes import Passes
from ..processes import check_stop
from .classification import Classification, ImageClassifier
from .groups import PromptGroup
from .memory import in_batches
from .quality import FeatureNetwork

GRID_COLUMNS = 6
CHANGE_PIXELS = 64
_CHUNK = 128


class Measure(Protocol):
    """Scores pictures one by one. A class under `@register_measure("name")` is one that `--measures` can name."""

    def provenance(self) -> dict[str, Any]:
        """What a figure depends on: the evaluator's `"name"`, its version or weights, threshold, label set."""
        ...

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float | None]]:
        """Columns of figures, each with one for each picture; None where a picture has none (no face, say)."""
        ...


@dataclass
class Drawn:
    """What is known of one model's images for one group.

    Attributes:
        shown: The first pictures.
        black: How many pictures are black all over.
        small: `[n, h, w, 3]` in [0, 1], at most `CHANGE_PIXELS` wide, for the change between before and after.
        scores: What the classifier says.
        measured: Column -> a figure for each picture.
        features: Network -> `[n, d]`.
    """

    shown: list[Image.Image]
    black: int
    small: np.ndarray
    scores: Classification | None = None
    measured: dict[str, list[float | None]] = field(default_factory=dict)
    features: dict[str, torch.Tensor] = field(default_factory=dict)


def draw_groups(
    objective: Objective,
    groups: Sequence[PromptGroup],
    settings: SamplingSettings,
    artifacts_dir: str | Path,
    accelerator: Accelerator,
    classifier: ImageClassifier | None = None,
    measures: Sequence[Measure] = (),
    networks: Sequence[FeatureNetwork] = (),
) -> list[Drawn]:
    """Sample every group's images from one model, and score them; see `sample_groups` and `score_groups`.

    For one process. Of several, only the main one has samples to score: let all sample, and that one score.

    Args:
        objective: The model.
        groups: What to draw.
        settings: Sampler, steps, guidance.
        artifacts_dir: Where samples are kept.
        accelerator: The processes that share the drawing.
        classifier: Scores the images if given.
        measures: Score them too.
        networks: Give their features.
    """
    kept = sample_groups(objective, groups, settings, artifacts_dir, accelerator)
    return score_groups(objective, groups, kept, classifier, measures, networks)


def sample_groups(
    objective: Objective,
    groups: Sequence[PromptGroup],
    settings: SamplingSettings,
    artifacts_dir: str | Path,
    accelerator: Accelerator,
    fingerprint: str | None = None,
    made: list[Passes | None] | None = None,
) -> list[list[torch.Tensor]]:
    """Sample every group's images from one model: the part in which processes wait for each other.

    Samples go to disk in parts, and what was drawn before is read: a run that was killed goes on where it stopped.

    Args:
        objective: The model.
        groups: What to sample.
        settings: Sampler, steps, guidance.
        artifacts_dir: Where samples are kept.
        accelerator: The processes that share the sampling.
        fingerprint: Of the model (default: computed).
        made: What each set took of the network when it was sampled is appended to it.

    Returns:
        For each group its samples, set by set, in the main process: another run may delete what is on disk.
    """
    generator = SampleGenerator(objective, artifacts_dir, accelerator, fingerprint)
    kept = []
    for group in groups:
        parts = []
        for part in parts_of(group):
            prompts, seeds = group.prompts[part], group.seeds[part]
            # No clear pictures on disk: they may be of what nobody wants to see.
            drawn = generator.drawn("evaluation", prompts, prompts, seeds, settings, preview=False)
            parts.append(drawn.samples if accelerator.is_main_process else drawn.samples[:0])
            if made is not None:
                made.append(drawn.passes)
        kept.append(parts)
    return kept


def parts_of(group: PromptGroup) -> list[slice]:
    """A set of samples each, whatever the batch size is: that may be another when a killed run goes on."""
    return [slice(start, start + _CHUNK) for start in range(0, len(group.prompts), _CHUNK)]


def score_groups(
    objective: Objective,
    groups: Sequence[PromptGroup],
    kept: Sequence[Sequence[torch.Tensor]],
    classifier: ImageClassifier | None = None,
    measures: Sequence[Measure] = (),
    networks: Sequence[FeatureNetwork] = (),
) -> list[Drawn]:
    """Decode and score what `sample_groups` has kept; no process waits for another.

    Args:
        objective: The model that drew the samples.
        groups: What was drawn.
        kept: For each group its samples, as `sample_groups` gives them.
        classifier: Scores the images if given.
        measures: Score them too.
        networks: Give their features.
    """
    drawn = []
    for group, sets in zip(groups, kept, strict=True):
        scored = []
        for part, samples in zip(parts_of(group), sets, strict=True):
            check_stop()
            decoded = in_batches(samples, len(samples), lambda batch: objective.decode(batch.to(objective.device)))
            pictures = [picture for batch in decoded for picture in batch]
            scored.append(look_at(pictures, group.prompts[part], classifier, measures, networks))
        drawn.append(_joined(scored))
    return drawn


def look_at(
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    classifier: ImageClassifier | None = None,
    measures: Sequence[Measure] = (),
    networks: Sequence[FeatureNetwork] = (),
) -> Drawn:
    """Score pictures, and keep of them what a comparison needs."""
    measured: dict[str, list[float | None]] = {}
    for measure in measures:
        measured |= measure(pictures, prompts)
    scores = classifier(pictures) if classifier else None
    features = {classifier.name: scores.features} if classifier and scores else {}
    for network in networks:
        if network.name not in features:
            features[network.name] = network(pictures)
    small = np.stack([_small(picture) for picture in pictures])
    return Drawn(list(pictures[:GRID_COLUMNS]), count_black(pictures), small, scores, measured, features)


def _small(picture: Image.Image) -> np.ndarray:
    picture = picture.convert("RGB")
    if max(picture.size) > CHANGE_PIXELS:
        picture.thumbnail((CHANGE_PIXELS, CHANGE_PIXELS), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32) / 255


def _joined(parts: Sequence[Drawn]) -> Drawn:
    first = parts[0]
    scores = None
    if first.scores is not None:
        scores = Classification(*(torch.cat([getattr(part.scores, name) for part in parts])
                                  for name in ("probabilities", "features")))  # fmt: skip
    return Drawn(
        [picture for part in parts for picture in part.shown][:GRID_COLUMNS],
        sum(part.black for part in parts),
        np.concatenate([part.small for part in parts]),
        scores,
        {name: [value for part in parts for value in part.measured[name]] for name in first.measured},
        {name: torch.cat([part.features[name] for part in parts]) for name in first.features},
    )
