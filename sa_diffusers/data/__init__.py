"""Prompts, and samples of the frozen model."""

from .generation import SampleGenerator
from .prompts import ErasurePair, Surrogate, generate_captions, pair_concepts, replay_prompts
from .sample_set import SampleSet

__all__ = [
    "ErasurePair",
    "SampleGenerator",
    "SampleSet",
    "Surrogate",
    "generate_captions",
    "pair_concepts",
    "replay_prompts",
]
