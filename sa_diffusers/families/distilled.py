"""Models that are distilled to few steps, which ordinary training breaks: how each is told, and how it is used."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline

from .base import Family
from .registry import configuration_of, family_of


class _Use(NamedTuple):
    """How a published model is used: without classifier-free guidance, all of them.

    Attributes:
        title: What it is called.
        name: Regular expression on its name.
        steps: Of its sampler, unless its name says how many.
        sampler: Of a UNet; transformers of rectified flow have their family's.
        base: The model to train in its place; None is the family's.
    """

    title: str
    name: str
    steps: int
    sampler: str | None = None
    base: str | None = None


def _word(name: str) -> str:
    return rf"(^|[-_./])({name})($|[-_./])"


_RENEWING = "euler_ancestral_trailing"
# By the publishers' own pages. SDXL-Turbo and SD-Turbo take one to four steps, and are best at four. Z-Image-Turbo's
# nine steps were eight, and one of no noise, before diffusers 0.40.
USES = (
    _Use("SDXL-Turbo", r"sdxl[-_]?turbo", 4, _RENEWING, "stabilityai/stable-diffusion-xl-base-1.0"),
    _Use("SD-Turbo", r"sd[-_]?turbo", 4, _RENEWING, "stabilityai/stable-diffusion-2-1-base"),
    _Use(
        "Stable Diffusion 3.5 Large Turbo", r"3\.5[-_]large[-_]turbo", 4, base="stabilityai/stable-diffusion-3.5-large"
    ),
    _Use("FLUX.1-schnell", r"flux.*schnell", 4, base="black-forest-labs/FLUX.1-dev"),
    _Use("FLUX.2 klein 4B", r"klein[-_]4b", 4, base="black-forest-labs/FLUX.2-klein-base-4B"),
    _Use("FLUX.2 klein 9B", r"klein[-_]9b", 4, base="black-forest-labs/FLUX.2-klein-base-9B"),
    _Use("Z-Image-Turbo", r"z[-_]image[-_]turbo", 8, base="Tongyi-MAI/Z-Image"),
    _Use("Lightning", _word("lightning"), 4, "euler_trailing"),
    _Use("Hyper", _word("hyper"), 8, "ddim_trailing"),
    _Use("LCM, DMD2", _word("lcm|dmd2?"), 4, "lcm"),
    _Use("Turbo, schnell", _word("turbo|schnell"), 4, _RENEWING),
)


@dataclass(frozen=True)
class Distilled:
    """A model that is distilled to few steps.

    Attributes:
        why: What says so.
        base: The model to train in its place, if it is known.
        defaults: The settings that it is sampled with where nobody says otherwise; none where its use is not known.
    """

    why: str
    base: str | None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """What it means for an erasure."""
        steps = self.defaults.get("num_inference_steps")
        return (
            f"The base model is distilled to few steps ({self.why}), and training takes these from it: what images "
            "lose may be the training's doing and not the erasure's, and only figures at the steps of its use "
            f"({steps or 'which nothing here says'}) count."
        )


def distilled(
    family: type[Family], names: Sequence[str | None], read: Callable[[str | None], Mapping[str, Any]]
) -> Distilled | None:
    """Whether a model is distilled to few steps, by its names, else by its configurations.

    Args:
        family: Of the model.
        names: What it and its index are called by; of a folder's path the last part counts, and in the Hub's
            cache the repository.
        read: From a part's name to its configuration, from None to the pipeline's own.
    """
    for name in map(str, filter(None, names)):
        for known in _called(name):
            if use := _use_of(known):
                return _distilled(family, use, f"as its name {known} says", known)
    if found := family.why_distilled(read):
        why, like = found
        return _distilled(family, _use_of(like), why, like)
    return None


def distilled_as_said(family: type[Family] | None) -> Distilled:
    """A model that nothing but `train_distilled` tells to be distilled."""
    return Distilled("as train_distilled says", family.undistilled if family else None)


def distilled_in_memory(pipeline: DiffusionPipeline) -> Distilled | None:
    """As `distilled`, of a pipeline in memory; None for one of no family."""
    family = family_of(type(pipeline).__name__)
    if family is None:
        return None

    def read(name: str | None) -> Mapping[str, Any]:
        part = pipeline if name is None else getattr(pipeline, name)
        return {**configuration_of(part), "_class_name": type(part).__name__}

    return distilled(family, [pipeline.name_or_path, pipeline.config.get("_name_or_path")], read)


def check_undistilled(told: Distilled | None, place: str) -> None:
    """Refuse a model that is distilled to few steps: trained as others are, it needs many again.

    Args:
        told: What is known of it.
        place: The pipeline, as messages name it.

    Raises:
        ValueError: It is distilled.
    """
    if told is not None:
        raise ValueError(
            f"{place} is distilled to few steps ({told.why}), which training breaks: erase from "
            f"{told.base or 'the model that it was distilled from'} in its place, or give --train_distilled"
        )


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
        check_undistilled(distilled_in_memory(pipeline), f"the {type(pipeline).__name__}")


def _called(name: str) -> list[str]:
    """What a name on the Hub, or a path, says that the model is called."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return [name]
    # In the Hub's cache the last part is a commit.
    cached = [part[8:].replace("--", "/") for part in Path(name).parts if part.startswith("models--")]
    return [Path(name).name, *cached]


def _use_of(name: str) -> _Use | None:
    return next((use for use in USES if re.search(use.name, name, re.IGNORECASE)), None)


def _distilled(family: type[Family], use: _Use, why: str, name: str) -> Distilled:
    steps = re.search(r"(\d+)[-_ ]?steps?(?![a-z])", name, re.IGNORECASE)
    defaults = {"num_inference_steps": int(steps[1]) if steps else use.steps, "guidance_scale": 1.0}
    if use.sampler and "sampler" not in family.defaults:
        defaults["sampler"] = use.sampler
    return Distilled(why, use.base or family.undistilled, defaults)
