"""Families of generative models, each in a file of its own, and the paths that they are trained on."""

from .base import Conditions, Family, Objective, SamplingSettings, TextEncoder
from .class_conditional import ClassConditionalObjective
from .conditional_vae import ConditionalVAEObjective
from .diffusion import DiffusionObjective
from .flow import FlowObjective
from .flux import FluxObjective
from .loading import checked_pipeline, family_in, load_pipeline, modules_of, objective_of, pipeline_name
from .paths import DiscretePath, FlowPath, OneStepPath, Path, PixelPath
from .registry import SUPPORTED_PIPELINES, family_of, objective_for, register
from .stable_diffusion import LatentDiffusionObjective
from .stable_diffusion_3 import StableDiffusion3Objective
from .stable_diffusion_xl import StableDiffusionXLObjective
from .text_to_image import TextToImageObjective

__all__ = [
    "SUPPORTED_PIPELINES",
    "ClassConditionalObjective",
    "ConditionalVAEObjective",
    "Conditions",
    "DiffusionObjective",
    "DiscretePath",
    "Family",
    "FlowObjective",
    "FlowPath",
    "FluxObjective",
    "LatentDiffusionObjective",
    "Objective",
    "OneStepPath",
    "Path",
    "PixelPath",
    "SamplingSettings",
    "StableDiffusion3Objective",
    "StableDiffusionXLObjective",
    "TextToImageObjective",
    "TextEncoder",
    "checked_pipeline",
    "family_in",
    "family_of",
    "load_pipeline",
    "modules_of",
    "objective_for",
    "objective_of",
    "pipeline_name",
    "register",
]
