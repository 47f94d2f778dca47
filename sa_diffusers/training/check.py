"""A few images before a training stops: do they agree with the probes?"""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.concepts import ErasurePair

# Of pictures without a surrogate to compare with: two that share more than this are of the same thing.
_ALIKE = 0.5


class SampledCheck:
    """Samples each concept from the model in training, at seeds at which the base model's images of concept and
    surrogate are at hand, and counts those that still show the concept.

    Where a classifier is given and tells the concept from its surrogate, it decides; images of the base model's own
    surrogates that it takes for the concept are not counted. Else an image shows the concept if, as a sample, it is
    nearer to the base model's image of the concept at the same seed than to that of the surrogate (where no prompt
    samples the surrogate: if it correlates with the former by more than one half).

    Args:
        objective: The model.
        settings: How images are sampled.
        classifier: What says what an image shows, if anything does.
        parts: For each concept its label, how many surrogates the classifier takes for it, prompts, seeds, the base
            model's samples of it and of its surrogate.
    """

    def __init__(self, objective: Any, settings: Any, classifier: Any, accelerator: Any, parts: Sequence[Any]) -> None:
        self.objective, self.settings, self.classifier = objective, settings, classifier
        self.accelerator = accelerator
        self.parts = list(parts)

    @classmethod
    def of(cls, subject: Any, checked: Sequence[tuple], count: int) -> "SampledCheck":
        """The check of an erasure.

        Args:
            subject: The model and what it is to forget.
            checked: For each pair the base model's samples of the concept, their prompts and seeds, and its samples of
                the surrogate at the same seeds, or None.
            count: Images, over all concepts.
        """
        parts = []
        each = max(4, count // len(checked))
        for pair, samples, prompts, seeds, surrogates in checked:
            kept = slice(0, min(each, len(samples)))
            others = None if surrogates is None else surrogates[kept]
            label, mistaken = _label(subject.classifier, pair, others, subject.objective)
            parts.append((label, mistaken, prompts[kept], seeds[kept], samples[kept], others))
        return cls(subject.objective, subject.settings, subject.classifier, subject.accelerator, parts)

    @torch.no_grad()
    def __call__(self) -> tuple[int, int]:
        """How many images still show a concept, and of how many; the same on all processes."""
        showing = count = 0
        for label, mistaken, prompts, seeds, own, surrogates in self.parts:
            with self.accelerator.autocast():
                samples = self.objective.sample(prompts, seeds, self.settings).float().cpu()
            count += len(samples)
            if label is not None:
                found = self.classifier(self.objective.decode(samples.to(self.objective.device))).probabilities
                showing += max(0, int((found.argmax(-1) == label).sum()) - mistaken)
            elif surrogates is not None:
                near = (samples - own).flatten(1).norm(dim=1) < (samples - surrogates).flatten(1).norm(dim=1)
                showing += int(near.sum())
            else:
                first, second = ((value - value.mean(0)).flatten(1) for value in (samples, own))
                alike = torch.nn.functional.cosine_similarity(first, second) > _ALIKE
                showing += int(alike.sum())
        if self.accelerator.num_processes > 1:
            # All sample the same; the main process's word holds.
            own_word = torch.tensor(float(showing if self.accelerator.is_main_process else 0),
                                    device=self.accelerator.device)  # fmt: skip
            showing = int(self.accelerator.reduce(own_word, reduction="sum").item())
        return showing, count


def _label(
    classifier: Any, pair: ErasurePair, surrogates: torch.Tensor | None, objective: Any
) -> tuple[int | None, int]:
    """The classifier's label of a concept, None where it cannot tell it from its surrogate; and how many of the
    surrogates it takes for it."""
    label = None if classifier is None else classifier.label_of(pair.concept)
    if label is None or surrogates is None:
        return label, 0
    found = classifier(objective.decode(surrogates.to(objective.device))).probabilities.argmax(-1)
    mistaken = int((found == label).sum())
    return (None, 0) if mistaken > len(surrogates) / 4 else (label, mistaken)
