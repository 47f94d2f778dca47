"""What an evaluation is about, and what its protocols have in common: images of both models, and their quality."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image

from ..data.concepts import ErasurePair
from ..families import Objective, SamplingSettings
from ..families.digests import digested_once, fingerprint_module
from ..processes import warn_once
from ..results.schema import DECODER, Quality, QualityEntry, Sampling
from ..seeds import STREAMS, met
from .classification import ImageClassifier
from .groups import PromptGroup
from .quality import NEIGHBOURS, FeatureNetwork, image_quality
from .scoring import Drawn, Measure, sample_groups, score_groups


class Digests(NamedTuple):
    """What a model is told by: the digest of its trained module, and that of all that its samples depend on."""

    module: str
    whole: str


@dataclass
class Subject:
    """What is evaluated, and how its images are sampled.

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
        erasure_seed: The seed of the erasure.
        trained_on: Stream of seeds -> how many samples of it the erasure took.
    """

    base: Objective
    erased: Objective
    pairs: Sequence[ErasurePair]
    settings: SamplingSettings
    count: int
    first_seed: int
    artifacts_dir: Path
    accelerator: Accelerator
    erasure_seed: int = 0
    trained_on: Mapping[str, int] = field(default_factory=dict)
    _digests: dict[int, tuple[Objective, Digests]] = field(default_factory=dict, init=False, repr=False)

    def digests(self, model: Objective) -> Digests:
        """The digests of a model, which nothing changes while it is evaluated: they are computed once."""
        if id(model) not in self._digests:
            with digested_once():
                self._digests[id(model)] = model, Digests(fingerprint_module(model.module), model.fingerprint())
        return self._digests[id(model)][1]

    def sample(self, model: Objective, groups: Sequence[PromptGroup], digest: str | None = None) -> list:
        """Every group's images from a model; see `sample_groups`.

        Args:
            model: Any.
            groups: What is asked for.
            digest: What the samples are kept under. Default: the model's own.
        """
        self._warn_of_seeds(groups)
        return sample_groups(
            model, groups, self.settings, self.artifacts_dir, self.accelerator, digest or self.digests(model).whole
        )

    def _warn_of_seeds(self, groups: Sequence[PromptGroup]) -> None:
        """What the erased model makes of noise that it was trained on says little of other noise."""
        for group in groups:
            first, count = group.seeds[0], len(group.seeds)
            # Others come with their prompts, or are of a stream of their own.
            if group.seeds[-1] != first + count - 1 or not 0 <= first - self.first_seed < STREAMS["evaluation"].length:
                continue
            found = met(first, count, self.erasure_seed, self.trained_on)
            if found and self.accelerator.is_main_process:
                stream, first = found
                warn_once(
                    f"--seed {self.first_seed}: images have the seeds of {stream} samples of an erasure with seed "
                    f"{self.erasure_seed} ({first} to {first + self.trained_on[stream] - 1}): leave it at "
                    f"{STREAMS['evaluation'].first}"
                )

    @property
    def sampling(self) -> Sampling:
        """How images are sampled, as reports tell it: of a model that has one step, nothing is denoised."""
        if self.erased.num_train_timesteps == 1:
            return Sampling(DECODER, 1, 1.0)
        return Sampling(**self.settings.to_dict())


# Streams of seeds of their own: what an attack or a choice of names is drawn with is in no row of a report, and in no
# training.
ATTACK_SEEDS, NEIGHBOUR_SEEDS = STREAMS["attack"].first, STREAMS["neighbour"].first


def stream_seeds(stream: int, first_seed: int, count: int) -> tuple[int, ...]:
    """Seeds of a stream, others for another first seed of the evaluation.

    Args:
        stream: `ATTACK_SEEDS` or `NEIGHBOUR_SEEDS`.
        first_seed: Of the evaluated images.
        count: Images, fewer than 250,000.
    """
    first = stream + first_seed % (STREAMS["attack"].length // 2)
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
    kept = [subject.sample(model, groups) for model in models]
    if not subject.accelerator.is_main_process:
        return None
    return [
        score_groups(model, groups, folders, classifier, mine, networks)
        for model, folders, mine in zip(models, kept, measures, strict=True)
    ]


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
