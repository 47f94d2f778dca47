"""Prompts, and samples of the frozen model."""

from .captions import generate_captions
from .concepts import ErasurePair, Surrogate, pair_concepts
from .generation import SampleGenerator
from .replay import replay_prompts
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
