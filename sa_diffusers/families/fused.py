"""Adapters that a pipeline brings along: found, and on request fused into its weights."""

from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..messages import shown_error
from ..quantization import kind_of


def brings_adapters(module: nn.Module) -> bool:
    """Whether a network has layers of adapters, switched on or off."""
    return bool(getattr(module, "_hf_peft_config_loaded", False)) or any(
        hasattr(layer, "lora_A") for layer in module.modules()
    )


def parts_with_adapters(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Name and network of a pipeline's parts that have adapters loaded."""
    return {name: part for name, part in pipeline.components.items()
            if isinstance(part, nn.Module) and brings_adapters(part)}  # fmt: skip


def fuse_adapters(pipeline: DiffusionPipeline) -> list[str]:
    """Add the adapters that a pipeline has loaded to its weights, in place and for good, and unload all of them.

    Those that are active are fused, each at the strength that it is set to. A pipeline whose adapters were fused and
    unloaded before is left as it is.

    Args:
        pipeline: With adapters in parts for which it loads them itself.

    Returns:
        What is in the weights now, see `fused_adapters`; with the strengths of what was fused here.

    Raises:
        ValueError: There are none, they are switched off, or diffusers cannot fuse them; what is wrong with their
            values is told before anything of that layer is changed.
    """
    parts: dict[str, Any] = parts_with_adapters(pipeline)
    if not parts:
        if told := fused_adapters(pipeline):
            return told
        raise ValueError(
            "fuse_adapters: the pipeline has no adapters, and its weights are those that it was loaded with: load them "
            "in Python first, with pipeline.load_lora_weights(), or leave it out"
        )
    for name in parts:
        if name not in getattr(pipeline, "_lora_loadable_modules", ()):
            raise ValueError(
                f"fuse_adapters: a {type(pipeline).__name__} neither loads nor fuses adapters of its {name}: merge "
                "them with peft, or leave them out"
            )
    layers = [layer for part in parts.values() for layer in part.modules() if isinstance(layer, BaseTunerLayer)]
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "fuse_adapters: the pipeline's adapters are switched off: switch them on, with pipeline.enable_lora(), or "
            "unload them, with pipeline.unload_lora_weights()"
        )
    strengths = _strengths(layers)
    try:
        pipeline.fuse_lora(components=list(parts), safe_fusing=True)  # type: ignore[attr-defined]
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"fuse_adapters: the pipeline's adapters could not be fused ({shown_error(error)}): load the pipeline "
            "anew, without them, or with others"
        ) from error
    pipeline.unload_lora_weights()  # type: ignore[attr-defined]
    for part in parts.values():
        for parameter in part.parameters():
            parameter.requires_grad_(kind_of(parameter) is None)
    earlier = [name for name in fused_adapters(pipeline) if name not in strengths]
    return sorted([*strengths.values(), *earlier])


def fused_adapters(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the adapters that are in a pipeline's weights, by its own account; nobody knows them of a pipeline that
    was saved and loaded since."""
    return sorted(getattr(pipeline, "fused_loras", ()))


def _strengths(layers: list[BaseTunerLayer]) -> dict[str, str]:
    """Name of an active adapter -> its name and strength in words."""
    found: dict[str, set[float]] = {}
    for layer in layers:
        for name in {*layer.active_adapters, *layer.merged_adapters}:
            scaling, rank = getattr(layer, "scaling", {}), getattr(layer, "r", {})
            alpha, by_root = getattr(layer, "lora_alpha", {}), getattr(layer, "use_rslora", {})
            strengths = found.setdefault(name, set())
            if name in scaling and alpha.get(name):
                usual = alpha[name] / (rank[name] ** (0.5 if by_root.get(name) else 1))
                strengths.add(round(scaling[name] / usual, 4))
    told = {}
    for name, strengths in found.items():
        least, most = min(strengths, default=None), max(strengths, default=None)
        text = f" at strength {least:g}" if least is not None else ""
        told[name] = name + (f" at strengths of {least:g} to {most:g}" if least != most else text)
    return told
