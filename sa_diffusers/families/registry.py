"""Which family knows which pipeline: one table, that everything which loads a pipeline asks."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..messages import shown
from ..quantization import kind_of
from .base import Family, Objective
from .fused import brings_adapters

# What diffusers calls pipelines of models that edit a picture, fill one in, or follow one.
_FROM_PICTURES = re.compile(
    "Fill|Kontext|Edit|Pix2Pix|Depth2Img|Upscale|ImageVariation|Redux|Layered|FluxControl(Img2Img|Inpaint)?Pipeline"
)
_FAMILIES: dict[str, type[Family]] = {}
# A live view: families registered later are in it too.
SUPPORTED_PIPELINES: Collection[str] = _FAMILIES.keys()


def register(*pipelines: str) -> Callable[[type], type]:
    """Class decorator: this family knows pipelines of these class names, as a pipeline's index gives them.

    A script registers a family of its own before it calls the package's commands; a later one replaces an earlier.
    """

    def decorate(family: type) -> type:
        _FAMILIES.update(dict.fromkeys(pipelines, family))
        return family

    return decorate


def family_of(pipeline: str) -> type[Family] | None:
    """The family of a pipeline's class name; None if none is registered for it."""
    return _FAMILIES.get(pipeline)


def objective_for(
    pipeline: DiffusionPipeline,
    prediction_type: str | None = None,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    weights_dtype: str = "float32",
) -> Objective:
    """The objective of a pipeline.

    Args:
        pipeline: Its parts.
        prediction_type: As of `Family.from_pipeline`, as the next two.
        snr_gamma: Min-SNR weighting of the loss.
        noise_offset: Of the noise.
        weights_dtype: `"float32"`, or the half precision that its weights are expected in. Weights in half precision
            are called under autocast, and trained as `sa_diffusers.training` does.

    Raises:
        ValueError: No family knows this kind of pipeline, its parts do not fit each other, it has adapters loaded, or
            its weights are not in that precision.
    """
    _check_modules(pipeline, weights_dtype)
    name = type(pipeline).__name__
    family = family_of(name)
    if family is None:
        raise ValueError(unsupported(name))
    parts = {
        part: [type(value).__module__.split(".")[0], type(value).__name__]
        for part, value in pipeline.components.items()
        if value is not None
    }
    family.check_parts(f"the {name}", parts, lambda part: configuration_of(getattr(pipeline, part)))
    own = family.own_pipeline
    if own and type(pipeline) is not own:
        # Loaded with the copy of the code that lies beside the weights.
        pipeline = rebuilt(family, pipeline.components, pipeline.config)
    return family.from_pipeline(pipeline, prediction_type, snr_gamma, noise_offset)  # type: ignore[return-value]


def configuration_of(part: Any) -> Mapping[str, Any]:
    """The configuration of a part of a pipeline in memory."""
    config = getattr(part, "config", {})
    return config if isinstance(config, Mapping) else config.to_dict()


def rebuilt(family: type[Family], parts: Mapping[str, Any], config: Mapping[str, Any]) -> DiffusionPipeline:
    """A family's own pipeline of parts, and of what else it takes from a saved configuration."""
    taken = inspect.signature(family.own_pipeline.__init__).parameters.keys() - parts.keys()
    return family.own_pipeline(**parts, **{name: config[name] for name in taken & config.keys()})


def unsupported(pipeline: str) -> str:
    """What is said of a pipeline's class that no family knows."""
    # Of each family the pipeline that draws from a prompt alone; those of diffusers first.
    named = {family: name for name, family in reversed(_FAMILIES.items())}
    families = sorted(named, key=lambda family: (family.own_pipeline is not None, family.title or named[family]))
    known = [f"{named[family]} ({family.title})" if family.title else named[family] for family in families]
    if _FROM_PICTURES.search(pipeline):
        return (
            f"{shown(pipeline)} is not supported: it draws from a picture beside the prompt, and surrogates, replay "
            "and Fisher samples are drawn from prompts alone; give the text-to-image model that it came from; "
            f"supported: {', '.join(known)}"
        )
    return (
        f"{shown(pipeline)} is not supported yet; supported: {', '.join(known)}. For another kind of model, write a "
        "family, as docs/new-family.md shows"
    )


def _check_modules(pipeline: DiffusionPipeline, weights_dtype: str) -> None:
    """Refuse adapters, whose weights a saved pipeline would not hold, and weights that cannot be trained."""
    types: set[str] = set()
    for name, module in pipeline.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        if brings_adapters(module):
            raise ValueError(
                f"the pipeline's {name} has LoRA adapters loaded, which the saved pipeline would not hold: have them "
                "fused into its weights, with fuse_adapters, or fuse and unload them first, with pipeline.fuse_lora() "
                "and pipeline.unload_lora_weights()"
            )
        projection = getattr(module, "encoder_hid_proj", None)
        if projection is not None and module.config.get("encoder_hid_dim_type") == "ip_image_proj":
            raise ValueError(f"the pipeline's {name} has an IP-Adapter loaded: call pipeline.unload_ip_adapter() first")
        if name == "safety_checker":
            continue
        # Layers that overflow stay float32 in any pipeline.
        found = {str(value.dtype)[6:] for value in module.parameters() if kind_of(value) is None}
        types |= found
        if others := ", ".join(sorted(found - {"float32", weights_dtype})):
            raise ValueError(
                f"the pipeline's {name} has weights in {others}: load it with dtype=torch.{weights_dtype}"
                + (" (for less memory, give mixed_precision, or weights_dtype)" if weights_dtype == "float32" else "")
            )
    if types and weights_dtype not in types:
        raise ValueError(
            f"the pipeline has no weights in {weights_dtype}, as weights_dtype says: load it with dtype="
            f"torch.{weights_dtype}, or leave weights_dtype out"
        )
