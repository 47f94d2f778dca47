"""One objective for each kind of generative model."""

from .base import Conditions, Objective, SamplingSettings
from .latent_diffusion import LatentDiffusionObjective
from .loading import load_pipeline, objective_for

__all__ = [
    "Conditions",
    "LatentDiffusionObjective",
    "Objective",
    "SamplingSettings",
    "load_pipeline",
    "objective_for",
]
