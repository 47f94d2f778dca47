"""A few images before a training stops: do they agree with the probes?"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from accelerate import Accelerator
from PIL import Image

from ..data.generation import check_finite, sampled
from ..environment import precision_in_use
from ..families.base import Objective, SamplingSettings
from ..processes import say
from ..results.verdict import LEAST_KNOWN, MOST_LEFT

# Of pictures without a surrogate to compare with: two that share more than this are of the same thing.
_ALIKE = 0.5
# An image of the surrogate is so many times nearer to the surrogate's than to the concept's. Of those that were not
# yet, a classifier took every second one for the concept (coat into pullover).
_NEARER = 1.5
# Of several concepts one that shows in more of its own images than this is not lost in what all may show.
_MOST_OF_ONE = 0.05
# A classifier that takes more of the surrogate for the concept does not tell them apart.
_TELLS = 0.25


class Scores(Protocol):
    """What a classifier says of pictures.

    Attributes:
        probabilities: `[n, labels]`.
        features: `[n, d]`.
    """

    probabilities: torch.Tensor
    features: torch.Tensor


class Classifier(Protocol):
    """What says what pictures show, such as `sa_diffusers.evaluation.ImageClassifier`."""

    def __call__(self, pictures: Sequence[Image.Image]) -> Scores: ...

    def label_of(self, text: str) -> int | None:
        """The index of the label that a concept is; None if it is none of them."""
        ...


@dataclass(frozen=True)
class CheckedConcept:
    """What the base model has sampled of a concept, and of its surrogate.

    Attributes:
        concept: Its name.
        samples: `[n, ...]` on the CPU, of the concept.
        prompts: One for each.
        seeds: One for each.
        surrogates: Samples of the surrogate at the same seeds; None where no prompt samples it.
        wanted: Prompts of the surrogate, one for each of its samples; empty where no prompt samples it.
        shown: Samples that look as the surrogate does; None where there are none.
        fresh: First of the seeds that nothing else is sampled at.
        label: The classifier's of the concept, where it knows it and tells it from its surrogate.
        mistaken: The share of what looks as the surrogate does that it takes for the concept.
        centres: Where no prompt samples the surrogate and the labels do not tell the two apart, but the classifier's
            features do: the means `[2, d]` of the concept's and of the surrogate's.
    """

    concept: str
    samples: torch.Tensor
    prompts: list[str]
    seeds: list[int]
    surrogates: torch.Tensor | None
    wanted: list[str] = field(default_factory=list)
    shown: torch.Tensor | None = None
    fresh: int = 0
    label: int | None = None
    mistaken: float = 0.0
    centres: torch.Tensor | None = None

    def first(self, count: int) -> "CheckedConcept":
        """The first so many samples of it."""
        surrogates = None if self.surrogates is None else self.surrogates[:count]
        return replace(self, samples=self.samples[:count], prompts=self.prompts[:count], seeds=self.seeds[:count],
                       surrogates=surrogates)  # fmt: skip

    def is_known(self, classifier: Classifier | None, objective: Objective, label: int) -> bool:
        """Whether a classifier recognises what the base model makes of it: else that it sees none says nothing."""
        return _called(classifier, objective, self.samples, label) >= LEAST_KNOWN * len(self.samples)

    def labelled(self, classifier: Classifier | None, objective: Objective) -> "CheckedConcept":
        """With the classifier's label, or what its features say, if either tells the concept from its surrogate."""
        label = None if classifier is None else classifier.label_of(self.concept)
        if label is not None and not self.is_known(classifier, objective, label):
            label = None
        shown = self.surrogates if self.shown is None else self.shown
        if classifier is None or shown is None:
            return replace(self, label=label)
        mistaken = 1.0 if label is None else _called(classifier, objective, shown, label) / len(shown)
        if mistaken <= _TELLS:
            return replace(self, label=label, mistaken=mistaken)
        if self.surrogates is not None:
            return self
        # Noise may be an eight to a classifier that knows digits alone; nearer to its digits it is not.
        own, other = (_scored(classifier, objective, samples).features.float() for samples in (self.samples, shown))
        centres = torch.stack([own.mean(0), other.mean(0)])
        is_told = [
            (_shows(features, centres) == wanted).float().mean() for features, wanted in ((own, True), (other, False))
        ]
        return replace(self, centres=centres) if min(is_told) >= 1 - _TELLS else self


class SampledCheck:
    """Samples each concept from the model in training, and counts the images that still show it.

    Where a classifier is given, knows the concept and tells it from its surrogate, it decides, each time on other
    images; as many as it takes the surrogate itself for the concept are not counted. Where its labels do not tell and
    no prompt samples the surrogate, its features decide, if they do: an image shows the concept unless they are one and
    a half times nearer to the surrogate's mean than to the concept's. Else an image shows the concept unless, as a
    sample, it is one and a half times nearer to the base model's image of the surrogate at the same seed than to that
    of the concept (where no prompt samples the surrogate: if it correlates with the latter by more than one half).

    Args:
        objective: The model; now it is the base model still.
        settings: How images are sampled.
        classifier: What says what an image shows, if anything does.
        accelerator: Processes and precision.
        concepts: What is looked for.
        count: Images, over all concepts, where a classifier decides; else of the samples at hand as many as there are.
        last: As many where a training would stop by them.
    """

    def __init__(
        self,
        objective: Objective,
        settings: SamplingSettings,
        classifier: Classifier | None,
        accelerator: Accelerator,
        concepts: Sequence[CheckedConcept],
        count: int = 20,
        last: int | None = None,
    ) -> None:
        self.objective, self.settings, self.classifier = objective, settings, classifier
        self.accelerator = accelerator
        self.each = max(4, count // len(concepts))
        self.last = max(self.each, (last or count) // len(concepts))
        self.parts = [self._counted(concept.first(self.last).labelled(classifier, objective)) for concept in concepts]
        for part in self.parts:
            self._say_if_unknown(part)

    @property
    def mistaken(self) -> float:
        """The largest share of images, of a concept's, that are not counted."""
        return max((part.mistaken for part in self.parts if part.label is not None), default=0.0)

    def _counted(self, part: CheckedConcept) -> CheckedConcept:
        """With the share that is mistaken of as many images as are looked at in the end: one of few says little."""
        if part.label is None or not part.mistaken or not part.wanted:
            return part
        samples = self._sampled(part, part.wanted, 0, self.last)
        mistaken = _called(self.classifier, self.objective, samples, part.label) / self.last
        return replace(part, mistaken=mistaken, label=part.label if mistaken <= _TELLS else None)

    @torch.no_grad()
    def _sampled(self, part: CheckedConcept, prompts: list[str], turn: int, count: int) -> torch.Tensor:
        """So many samples at seeds of their own, the prompts in turn."""
        first = part.fresh + turn * self.last
        return self._samples([prompts[place % len(prompts)] for place in range(count)], range(first, first + count))

    @torch.no_grad()
    def _samples(self, prompts: list[str], seeds: Sequence[int]) -> torch.Tensor:
        with self.accelerator.autocast():
            samples = sampled(self.objective, prompts, list(seeds), self.settings).float().cpu()
        # Of what is no number nothing is near to anything: it would show no concept.
        check_finite(samples, prompts[0], precision_in_use(self.accelerator), self.settings)
        return samples

    def _say_if_unknown(self, part: CheckedConcept) -> None:
        """Say so before the training where its verdict can only be that nothing is measurable."""
        label = None if self.classifier is None else self.classifier.label_of(part.concept)
        if label is None:
            return
        known, count = _called(self.classifier, self.objective, part.samples, label), len(part.samples)
        if known < LEAST_KNOWN * count and self.accelerator.is_main_process:
            say(
                f'warning: the base model does not seem to know "{part.concept}": the classifier recognises it in '
                f"{known} of {count} of its images. Whether it is forgotten will not be measurable; give another name "
                "for it, or another classifier"
            )
        shown = part.surrogates if part.shown is None else part.shown
        if shown is None:
            return
        taken, count = _called(self.classifier, self.objective, shown, label), len(shown)
        if taken > MOST_LEFT * count and self.accelerator.is_main_process:
            say(
                f"warning: the classifier takes {taken} of {count} images of what is to stand in the place of "
                f'"{part.concept}" for it. Whether it is forgotten will hardly be measurable; choose another '
                "surrogate, or give another classifier"
            )

    def __call__(self, turn: int, is_last: bool = False) -> tuple[int, int]:
        """How many images still show a concept, and of how many; the same on all processes.

        They are those of all concepts together, but where one shows in more than a twentieth of its own: those of the
        one that shows most.

        Args:
            turn: How many times it was asked before.
            is_last: Whether the training would stop by them.
        """
        each, tallies = self.last if is_last else self.each, []
        for part in (part.first(each) for part in self.parts):
            if part.label is not None or part.centres is not None:
                samples = self._sampled(part, part.prompts, turn + 1, each)
            else:
                samples = self._samples(part.prompts, part.seeds)
            if part.label is not None:
                hits = _called(self.classifier, self.objective, samples, part.label)
                showing = max(0, hits - int(part.mistaken * len(samples)))
            elif part.centres is not None:
                features = _scored(self.classifier, self.objective, samples).features.float()
                showing = int(_shows(features, part.centres).sum())
            elif part.surrogates is not None:
                own, other = ((samples - those).flatten(1).norm(dim=1) for those in (part.samples, part.surrogates))
                showing = int((own < _NEARER * other).sum())
            else:
                first, second = ((value - value.mean(0)).flatten(1) for value in (samples, part.samples))
                alike = torch.nn.functional.cosine_similarity(first, second) > _ALIKE
                showing = int(alike.sum())
            tallies.append((showing, len(samples)))
        showing, count = max(tallies, key=lambda tally: tally[0] / tally[1])
        if showing <= _MOST_OF_ONE * count:
            showing, count = (sum(numbers) for numbers in zip(*tallies, strict=True))
        if self.accelerator.num_processes > 1:
            # All sample the same; the main process's word holds.
            own_word = torch.tensor([showing, count], dtype=torch.float32, device=self.accelerator.device)
            own_word *= self.accelerator.is_main_process
            showing, count = map(int, self.accelerator.reduce(own_word, reduction="sum").tolist())
        return showing, count


def _scored(classifier: Classifier | None, objective: Objective, samples: torch.Tensor) -> Scores:
    """What a classifier says of samples, as pictures."""
    assert classifier is not None
    return classifier(objective.decode(samples.to(objective.device)))


def _called(classifier: Classifier | None, objective: Objective, samples: torch.Tensor, label: int) -> int:
    """How many samples, as pictures, a classifier gives a label."""
    return int((_scored(classifier, objective, samples).probabilities.argmax(-1) == label).sum())


def _shows(features: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Which features `[n, d]` are not so many times nearer to the surrogate's mean as a surrogate's are."""
    own, other = (torch.linalg.vector_norm(features - centre.to(features), dim=1) for centre in centres)
    return own < _NEARER * other
