"""Models that are distilled to few steps, which ordinary training breaks."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .base import Family
from .registry import configuration_of, family_of

# What a name says, and the model to train in its place.
_KNOWN = (
    (r"sdxl[-_]?turbo", "stabilityai/stable-diffusion-xl-base-1.0"),
    (r"sd[-_]?turbo", "stabilityai/stable-diffusion-2-1-base"),
    (r"3\.5[-_]large[-_]turbo", "stabilityai/stable-diffusion-3.5-large"),
    (r"flux.*schnell", "black-forest-labs/FLUX.1-dev"),
    (r"klein[-_]4b", "black-forest-labs/FLUX.2-klein-base-4B"),
    (r"klein[-_]9b", "black-forest-labs/FLUX.2-klein-base-9B"),
    (r"z[-_]image[-_]turbo", "Tongyi-MAI/Z-Image"),
    (r"(^|[-_./])(turbo|schnell|lightning|hyper|lcm|dmd2?)($|[-_./])", None),
)


def check_undistilled(
    family: type[Family], place: str, names: Sequence[str | None], read: Callable[[str | None], Mapping[str, Any]]
) -> None:
    """Refuse a model that is distilled to few steps: trained as others are, it needs many again.

    Args:
        family: Of the model.
        place: The pipeline, as messages name it.
        names: What it and its index are called by; of a folder's path the last part counts.
        read: From a part's name to its configuration, from None to the pipeline's own.

    Raises:
        ValueError: A name, or a part's configuration, says so.
    """
    for name in map(str, filter(None, names)):
        known = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else Path(name).name
        for pattern, base in _KNOWN:
            if re.search(pattern, known, re.IGNORECASE):
                raise ValueError(_refused(place, f"as its name {known} says", base or family.undistilled))
    if why := family.why_distilled(read):
        raise ValueError(_refused(place, why, family.undistilled))


def check_given(pipeline: DiffusionPipeline, no_t5: bool, undistilled: bool) -> None:
    """What loading would check of a pipeline in memory, by the same settings; one of no family passes.

    Raises:
        ValueError: It has the T5 that is to be left out, or is distilled to few steps.
    """
    family = family_of(type(pipeline).__name__)
    if family is None:
        return
    held = [part for part in family.optional_parts if getattr(pipeline, part, None) is not None]
    if no_t5 and (held or not family.optional_parts):
        said = ", ".join(f"{part}=None" for part in held)
        raise ValueError(
            f"no_t5 leaves the pipeline in memory as it is: load it with {said}"
            if held
            else f"no_t5 has no meaning for {type(pipeline).__name__}, which does not work without: leave it out"
        )
    if undistilled:
        parts = {None: pipeline, **pipeline.components}
        read = {name: configuration_of(part) for name, part in parts.items() if part is not None}
        names = [pipeline.name_or_path, pipeline.config.get("_name_or_path")]
        check_undistilled(family, f"the {type(pipeline).__name__}", names, read.__getitem__)


def _refused(place: str, why: str, base: str | None) -> str:
    return (
        f"{place} is distilled to few steps ({why}), which training breaks: erase from "
        f"{base or 'the model that it was distilled from'} in its place, or give --train_distilled"
    )
