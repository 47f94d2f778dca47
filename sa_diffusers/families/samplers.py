"""Which schedulers of a model the samplers can follow, and the samplers' own classes."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from ..messages import shown
from ..samplers import SAMPLERS

# Schedulers that say by their betas which noise the model was trained with. That of TCD does too, and is left out: no
# sampler suits its models.
_KNOWN_SCHEDULERS = {
    f"{name}Scheduler"
    for name in (
        "DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete",
        "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep",
        "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver", "LCM",
    )
}  # fmt: skip

# Models have 1,000; a scheduler makes tables of so many numbers as soon as it is loaded.
_MOST_TIMESTEPS = 100_000
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def sampler_class(name: str) -> tuple[type, dict[str, bool | str]]:
    """The scheduler's class behind a sampler's name, and its settings.

    Raises:
        ValueError: There is no such sampler.
    """
    if name not in SAMPLERS:
        raise ValueError(f'sampler="{name}" is not one of {", ".join(SAMPLERS)}')
    kind, settings = SAMPLERS[name]
    return getattr(diffusers, kind), settings


def check_scheduler(kind: str, settings: Mapping[str, Any]) -> None:
    """Refuse a scheduler that does not say by its betas which noise the model was trained with.

    Args:
        kind: Name of its class.
        settings: Its configuration.

    Raises:
        ValueError: It is of another kind, or its settings ask for another noise.
    """
    if kind not in _KNOWN_SCHEDULERS:
        raise ValueError(
            f"{shown(kind)}, the model's scheduler, does not say by betas which noise the model was trained with, or "
            "belongs to a distilled model: use a model whose scheduler is of another kind, such as DDIMScheduler or "
            "PNDMScheduler"
        )
    _check_timesteps(kind, settings)
    if settings.get("use_flow_sigmas") or "flow" in str(settings.get("prediction_type")):
        raise ValueError(
            f"the model's {kind} is set to flow matching, which is not supported: use a model with epsilon or "
            "v-prediction"
        )
    if settings.get("rescale_betas_zero_snr") and not rescales(getattr(diffusers, kind)):
        raise ValueError(
            f"the model's {kind} ignores rescale_betas_zero_snr, which its configuration sets: save the model with a "
            "DDIMScheduler"
        )


def check_flow_scheduler(kind: str, settings: Mapping[str, Any]) -> None:
    """Refuse a scheduler that does not say by its shift which noise a model of rectified flow was trained with.

    A `DPMSolverMultistepScheduler` that is set to rectified flow does.

    Args:
        kind: Name of its class.
        settings: Its configuration.

    Raises:
        ValueError: It is of another kind, or its noise runs the other way.
    """
    solver = kind == "DPMSolverMultistepScheduler" and settings.get("prediction_type") == "flow_prediction"
    if kind not in _FLOW_SCHEDULERS and not (solver and settings.get("use_flow_sigmas")):
        raise ValueError(
            f"{shown(kind)}, the model's scheduler, does not say by a shift which noise the model was trained with: "
            "save the model with a FlowMatchEulerDiscreteScheduler"
        )
    _check_timesteps(kind, settings)
    if settings.get("invert_sigmas"):
        raise ValueError(
            f"the model's {kind} sets invert_sigmas, so that its noise shrinks as time grows, which is not supported: "
            "use a model without"
        )


def _check_timesteps(kind: str, settings: Mapping[str, Any]) -> None:
    count = settings.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or not 1 <= count <= _MOST_TIMESTEPS:
        raise ValueError(
            f"the model's {kind} says num_train_timesteps={shown(count)}, which is no whole number from 1 to "
            f"{_MOST_TIMESTEPS:,}: correct scheduler/scheduler_config.json (1000, mostly)"
        )


def is_of_flow(kind: type, options: Mapping[str, Any]) -> bool:
    """Whether a scheduler, with these settings, samples from models of rectified flow."""
    return kind.__name__ in _FLOW_SCHEDULERS or bool(options.get("use_flow_sigmas"))


def scheduler_of(kind: type, like: diffusers.SchedulerMixin, **others: Any) -> diffusers.SchedulerMixin:
    """A scheduler with the settings of another, as far as it knows them, and with others."""
    known = inspect.signature(kind).parameters
    return kind(**{**{name: value for name, value in like.config.items() if name in known}, **others})


def shift_name(kind: type) -> str:
    """What a scheduler of rectified flow calls its static shift."""
    return "shift" if kind.__name__ in _FLOW_SCHEDULERS else "flow_shift"


def other_samplers() -> str:
    """Names of the samplers for models that are not of rectified flow."""
    return ", ".join(name for name in SAMPLERS if not is_of_flow(*sampler_class(name)))


def rescales(kind: type) -> bool:
    """Whether a scheduler knows betas whose last timestep is noise alone."""
    return "rescale_betas_zero_snr" in inspect.signature(kind).parameters
