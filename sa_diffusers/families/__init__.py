"""Families of generative models, each in a file of its own, and the paths that they are trained on."""

from .base import Conditions, Family, Objective, SamplingSettings, TextEncoder
from .class_conditional import ClassConditionalObjective
from .conditional_vae import ConditionalVAEObjective
from .diffusion import DiffusionObjective
from .flow import FlowObjective
from .flux import FluxObjective
from .flux_2_klein import Flux2KleinObjective
from .loading import checked_pipeline, family_in, kind_in, load_pipeline, modules_of, objective_of, pipeline_name
from .paths import DiscretePath, FlowPath, OneStepPath, Path, PixelPath
from .qwen_image import QwenImageObjective
from .registry import SUPPORTED_PIPELINES, family_of, objective_for, register
from .sana import SanaObjective
from .stable_diffusion import LatentDiffusionObjective
from .stable_diffusion_3 import StableDiffusion3Objective
from .stable_diffusion_xl import StableDiffusionXLObjective
from .text_to_image import TextToImageObjective
from .z_image import ZImageObjective

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
    "Flux2KleinObjective",
    "FluxObjective",
    "LatentDiffusionObjective",
    "Objective",
    "OneStepPath",
    "Path",
    "PixelPath",
    "QwenImageObjective",
    "SamplingSettings",
    "SanaObjective",
    "StableDiffusion3Objective",
    "StableDiffusionXLObjective",
    "TextToImageObjective",
    "TextEncoder",
    "ZImageObjective",
    "checked_pipeline",
    "family_in",
    "family_of",
    "kind_in",
    "load_pipeline",
    "modules_of",
    "objective_for",
    "objective_of",
    "pipeline_name",
    "register",
]
