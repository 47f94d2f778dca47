"""Families of generative models, each in a file of its own, and the paths that they are trained on."""

from .base import Conditions, Family, Objective, SamplingSettings, TextEncoder
from .class_conditional import ClassConditionalObjective
from .conditional_vae import ConditionalVAEObjective
from .diffusion import DiffusionObjective
from .loading import checked_pipeline, load_pipeline, modules_of, objective_of, pipeline_name
from .paths import DiscretePath, OneStepPath, Path, PixelPath
from .registry import SUPPORTED_PIPELINES, family_of, objective_for, register
from .stable_diffusion import LatentDiffusionObjective

__all__ = [
    "SUPPORTED_PIPELINES",
    "ClassConditionalObjective",
    "ConditionalVAEObjective",
    "Conditions",
    "DiffusionObjective",
    "DiscretePath",
    "Family",
    "LatentDiffusionObjective",
    "Objective",
    "OneStepPath",
    "Path",
    "PixelPath",
    "SamplingSettings",
    "TextEncoder",
    "checked_pipeline",
    "family_of",
    "load_pipeline",
    "modules_of",
    "objective_for",
    "objective_of",
    "pipeline_name",
    "register",
]
