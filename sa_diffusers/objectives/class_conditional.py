"""Class-conditional diffusion models on pixels."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..models.class_conditional_pipeline import ClassConditionalPipeline
from .base import Conditions, Denoiser, SamplingSettings, fingerprint_module
from .diffusion import DiffusionObjective


class ClassConditionalObjective(DiffusionObjective):
    """The objective of a `ClassConditionalPipeline` (paper, sections 2.1 and 4.1).

    The squared error is summed over channels and pixels, as in the original's class experiments, so that its EWC
    weights carry over. Conditions are names or numbers of classes; the empty prompt is the null class.

    Args:
        pipeline: The frozen pipeline. Its UNet becomes the trainable module.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the pipeline's scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Raises:
        ValueError: As `DiffusionObjective`.
    """

    kind = "class-conditional-diffusion"
    reduction = "sum"

    def __init__(
        self,
        pipeline: ClassConditionalPipeline,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        self.pipeline = pipeline
        self.module = pipeline.unet
        self.labels = pipeline.labels
        self.channels = self.module.config.in_channels
        super().__init__(pipeline.scheduler, prediction_type, snr_gamma, noise_offset)

    @property
    def resolution(self) -> int:
        return self.module.config.sample_size

    def to(self, device: torch.device | str) -> "ClassConditionalObjective":
        self.module.to(device)
        return self

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(fingerprint_module(self.module).encode(), digest_size=16)
        # Names with an underscore are diffusers' own book-keeping, in no fixed order.
        schedule = {name: value for name, value in self.pipeline.scheduler.config.items() if name[0] != "_"}
        digest.update(repr(sorted(schedule.items())).encode())
        digest.update(repr(self.labels).encode())
        digest.update(self.prediction_type.encode())
        return digest.hexdigest()

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        indices = [self.pipeline.label_index(prompt) for prompt in prompts]
        return {"class_labels": torch.tensor(indices, device=self.device)}

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        return module(noisy, timesteps, None, **conditions, return_dict=False)[0]

    def uniform_noise_target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Pixel by pixel, the sample given the noised one is a Gaussian cut off at -1 and 1, whose mean is known."""
        if self.noise_offset:
            # It ties the pixels to each other.
            return self.target(samples, timesteps, noise)
        shape = [-1, *[1] * (samples.dim() - 1)]
        keep = self.noise_schedule.alphas_cumprod.to(samples.device)[timesteps].double().view(shape)
        signal, spread = keep.sqrt(), (1 - keep).sqrt()
        noisy = signal * samples + spread * noise
        # Where nothing of the sample is left, its mean is that of all samples.
        left = signal > 0
        mean = truncated_normal_mean(noisy / signal.where(left, 1), spread / signal.where(left, 1)) * left
        noise = (noisy - signal * mean) / spread
        return (signal * noise - spread * mean if self.prediction_type == "v_prediction" else noise).float()

    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        return match_channels(images, self.channels).float()

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings) -> torch.Tensor:
        if settings.resolution not in (None, self.resolution):
            raise ValueError(f"resolution={settings.resolution}: this model draws {self.resolution} pixels only")
        sampler = ClassConditionalPipeline(
            self.module, self.make_sampler(settings.sampler, self.pipeline.scheduler), self.pipeline.config.id2label
        )
        sampler.set_progress_bar_config(disable=True)
        training = self.module.training
        self.module.eval()
        parts = []
        try:
            for start in range(0, len(prompts), settings.batch_size):
                batch = slice(start, start + settings.batch_size)
                parts.append(
                    sampler(
                        list(prompts[batch]),
                        num_inference_steps=settings.num_inference_steps,
                        guidance_scale=settings.guidance_scale,
                        generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
                        output_type="latent",
                    ).images.float()
                )
        finally:
            self.module.train(training)
        return torch.cat(parts)

    def decode(self, samples: torch.Tensor) -> list[Image.Image]:
        return self.pipeline.image_processor.postprocess(samples.float(), output_type="pil")

    def save(self, folder: Path) -> None:
        self.save_with_own_scheduler(self.pipeline, folder)


def truncated_normal_mean(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The mean of a normal distribution that is cut off at -1 and 1; all float64."""
    # On one side of zero, where the difference of the tails loses no digits.
    sign, size = torch.where(mean < 0, -1.0, 1.0), mean.abs()
    low, high = (-1 - size) / std, (1 - size) / std
    density = torch.exp(-low.square() / 2) - torch.exp(-high.square() / 2)
    mass = torch.special.ndtr(high) - torch.special.ndtr(low)
    cut = size + std * density / (mass * math.sqrt(2 * math.pi)).clamp(min=torch.finfo(mass.dtype).tiny)
    return sign * cut.clamp(-1, 1)


def match_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Images `[batch, 3 or channels, height, width]` as a model of so many channels takes them: themselves, or grey."""
    if channels == images.shape[1]:
        return images
    if channels == 1:
        return images.mean(1, keepdim=True)
    raise ValueError(f"images have {images.shape[1]} channels, the model takes {channels}")
