"""Samples of what lies near a concept, once a training has found it."""

from collections.abc import Sequence

from ..data.sample_set import SampleSet
from ..seeds import STREAMS, first_seed
from ..training.probes import ProbeSet
from .samples import PromptedSamples
from .subject import Subject


class Neighbourhood:
    """Samples, from the frozen model, what drifts first when a concept is forgotten: to replay it, and to probe it.

    Args:
        subject: The model, at theta* whenever it is asked.
        replayed: How many samples of the replay set there are, whose seeds these follow.
        each: Samples for the probes, for each prompt.
    """

    def __init__(self, subject: Subject, replayed: int, each: int) -> None:
        self.subject = subject
        self._first = first_seed("replay", subject.config.seed) + replayed
        self._each = each
        self._prompted = PromptedSamples(subject)

    def replay(self, prompts: Sequence[str]) -> SampleSet | None:
        count = self.subject.config.num_neighbour_images
        if not count or not prompts:
            return None
        return self._prompted.made("neighbours", [prompts[place % len(prompts)] for place in range(count)], self._first)

    def probes(self, prompts: Sequence[str]) -> list[ProbeSet]:
        count, stream = self._each, STREAMS["probe"]
        start = first_seed("probe", self.subject.config.seed) + 3 * stream.length // 8
        texts = [prompt for prompt in prompts for _ in range(count)]
        seeds = list(range(start, start + len(texts)))
        generator = self.subject.generator
        drawn = generator.drawn("probe", texts, texts, seeds, self.subject.settings, preview=False).samples
        return [ProbeSet(prompt, "neighbour", samples, [prompt] * count, [prompt] * count)
                for prompt, samples in zip(prompts, drawn.split(count), strict=True)]  # fmt: skip
