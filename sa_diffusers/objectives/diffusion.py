"""What all diffusion models trained by noise prediction share."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr

from ..messages import shown, shown_error
from .base import Conditions, Denoiser, Objective, SamplingSettings

# Samples are not clipped to [-1, 1], and PNDM's first steps are left out as Stable Diffusion does.
_SAMPLERS: dict[str, tuple[type, dict[str, bool]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    # On pixels, steps equal in time end where much noise is left: what comes out is duller than the data.
    "dpmsolver++_logsnr": (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
}
# Schedulers that say by their betas which noise the model was trained with. Those of distilled models (LCM, TCD) are
# left out although they do: none of the samplers above suits such a model.
_KNOWN_SCHEDULERS = {
    f"{name}Scheduler"
    for name in (
        "DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete",
        "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep",
        "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver",
    )
}  # fmt: skip
PREDICTION_TYPES = ("epsilon", "v_prediction")


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
    if settings.get("use_flow_sigmas") or "flow" in str(settings.get("prediction_type")):
        raise ValueError(
            f"the model's {kind} is set to flow matching, which is not supported: use a model with epsilon or "
            "v-prediction"
        )
    if settings.get("rescale_betas_zero_snr") and not _rescales(getattr(diffusers, kind)):
        raise ValueError(
            f"the model's {kind} ignores rescale_betas_zero_snr, which its configuration sets: save the model with a "
            "DDIMScheduler"
        )


def _rescales(kind: type) -> bool:
    return "rescale_betas_zero_snr" in inspect.signature(kind).parameters


class DiffusionObjective(Objective):
    """The (reweighted) ELBO of a discrete-time diffusion model (paper, section 2.1).

    Args:
        scheduler: The model's own; its betas are those of the training.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Attributes:
        zero_terminal_snr: Whether the last timestep is noise alone (Lin et al., 2024).

    Raises:
        ValueError: The prediction type is another one, or the scheduler's noise is not known or contradicts it.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        check_scheduler(type(scheduler).__name__, scheduler.config)
        self.prediction_type = prediction_type or scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f'prediction_type="{self.prediction_type}" is not one of "epsilon", "v_prediction": other models are '
                "not supported"
            )
        self.zero_terminal_snr = bool(scheduler.config.get("rescale_betas_zero_snr"))
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "the model's scheduler sets rescale_betas_zero_snr, after which nothing of an image is left at the "
                "last timestep, but the model predicts epsilon, from which no image can be told there: give "
                "prediction_type v_prediction if it was trained so, or set rescale_betas_zero_snr to false in "
                "scheduler/scheduler_config.json"
            )
        try:
            self.noise_schedule = DDPMScheduler.from_config(scheduler.config, prediction_type=self.prediction_type)
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the model's scheduler cannot be used ({error}): correct its configuration") from error
        kept = self.noise_schedule.alphas_cumprod
        if not len(kept) or not ((kept >= 0) & (kept <= 1)).all():
            raise ValueError(
                "the model's scheduler has no betas, or betas outside of [0, 1]: correct its configuration"
            )
        self.num_train_timesteps = self.noise_schedule.config.num_train_timesteps
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset

    @property
    def device(self) -> torch.device:
        return self.module.device

    def make_sampler(self, name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The sampler of a name, on the betas of the model's own scheduler.

        Where the last timestep is noise alone, sampling begins there: steps are never spaced `"leading"`.

        Raises:
            ValueError: The sampler does not exist, or cannot follow these betas.
        """
        if name not in _SAMPLERS:
            raise ValueError(f'sampler="{name}" is not one of {", ".join(_SAMPLERS)}')
        kind, options = _SAMPLERS[name]
        if self.zero_terminal_snr and not _rescales(kind):
            able = ", ".join(other for other, (cls, _) in _SAMPLERS.items() if _rescales(cls))
            raise ValueError(
                f'sampler="{name}" ignores rescale_betas_zero_snr, which the model\'s scheduler sets: use one of {able}'
            )
        try:
            return kind.from_config(scheduler.config, **self._own_settings(scheduler), **options)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f'sampler="{name}" cannot follow the model\'s scheduler ({error}): use another sampler'
            ) from error

    def check_sampling(self, settings: SamplingSettings, scheduler: SchedulerMixin) -> None:
        """Refuse, before anything is sampled, a sampler that cannot follow the model's betas, or steps that it lacks.

        Raises:
            ValueError: As `make_sampler`, or there are more steps than the model was trained with.
        """
        sampler = self.make_sampler(settings.sampler, scheduler)
        if settings.num_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={settings.num_inference_steps} is more than the {self.num_train_timesteps} "
                "timesteps that the model was trained with: give fewer"
            )
        try:
            sampler.set_timesteps(settings.num_inference_steps)
        except Exception as error:  # samplers fail at their least number of steps in ways of their own
            raise ValueError(
                f'sampler="{settings.sampler}" cannot make num_inference_steps={settings.num_inference_steps} steps '
                f"({shown_error(error)}): give more"
            ) from error

    def own_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The model's scheduler with the prediction type in use, as a saved pipeline must carry it."""
        settings = self._own_settings(scheduler)
        if all(scheduler.config.get(name) == value for name, value in settings.items()):
            return scheduler
        return type(scheduler).from_config(scheduler.config, **settings)

    def save_with_own_scheduler(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        """Save a pipeline with `own_scheduler`; the pipeline itself stays as it is."""
        scheduler = self.own_scheduler(pipeline.scheduler)
        if scheduler is not pipeline.scheduler:
            pipeline = copy.copy(pipeline)
            pipeline.register_modules(scheduler=scheduler)
        pipeline.save_pretrained(folder)

    def _own_settings(self, scheduler: SchedulerMixin) -> dict[str, Any]:
        settings = {"prediction_type": self.prediction_type}
        if self.zero_terminal_snr and scheduler.config.get("timestep_spacing", "leading") == "leading":
            settings["timestep_spacing"] = "trailing"
        return settings

    def draw_noise(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(samples.shape, generator=generator)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn((*samples.shape[:2], 1, 1), generator=generator)
        return noise.to(samples.device)

    def predict(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        noisy = self.noise_schedule.add_noise(samples, noise, timesteps)
        return self.denoise(module, noisy, timesteps, conditions)

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Call the denoiser on noised samples."""
        return module(noisy, timesteps, **conditions, return_dict=False)[0]

    def negative_elbo(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        prediction = self.predict(module, samples, conditions, timesteps, noise)
        if target is None:
            target = self.target(samples, timesteps, noise)
        error = (prediction.float() - target.float()).square().flatten(1)
        error = error.sum(1) if self.reduction == "sum" else error.mean(1)
        if self.snr_gamma is None:
            return error
        snr = compute_snr(self.noise_schedule, timesteps)
        weight = snr.clamp(max=self.snr_gamma) / (snr + 1 if self.prediction_type == "v_prediction" else snr)
        return error * weight

    def target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "v_prediction":
            return self.noise_schedule.get_velocity(samples, noise, timesteps)
        return noise
