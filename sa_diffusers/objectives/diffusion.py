"""What all diffusion models trained by noise prediction share."""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr

from .base import Conditions, Denoiser, Objective

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


class DiffusionObjective(Objective):
    """The (reweighted) ELBO of a discrete-time diffusion model (paper, section 2.1).

    Args:
        scheduler: The model's own; its betas are those of the training.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Raises:
        ValueError: The prediction type is another one.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        self.prediction_type = prediction_type or scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f'prediction_type="{self.prediction_type}" is not one of "epsilon", "v_prediction"')
        self.noise_schedule = DDPMScheduler.from_config(scheduler.config, prediction_type=self.prediction_type)
        self.num_train_timesteps = self.noise_schedule.config.num_train_timesteps
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset

    @property
    def device(self) -> torch.device:
        return self.module.device

    def make_sampler(self, name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The sampler of a name, on the betas of the model's own scheduler."""
        kind, options = _SAMPLERS[name]
        return kind.from_config(scheduler.config, prediction_type=self.prediction_type, **options)

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
