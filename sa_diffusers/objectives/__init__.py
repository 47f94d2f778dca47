"""One objective for each kind of generative model."""

from .base import Conditions, Objective, SamplingSettings
from .class_conditional import ClassConditionalObjective
from .conditional_vae import ConditionalVAEObjective
from .latent_diffusion import LatentDiffusionObjective
from .loading import SUPPORTED_PIPELINES, load_pipeline, objective_for

__all__ = [
    "SUPPORTED_PIPELINES",
    "ClassConditionalObjective",
    "ConditionalVAEObjective",
    "Conditions",
    "LatentDiffusionObjective",
    "Objective",
    "SamplingSettings",
    "load_pipeline",
    "objective_for",
]
