"""Conditional variational autoencoders."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from ..models.conditional_vae_pipeline import ConditionalVAEPipeline
from .base import Conditions, Denoiser, Objective, SamplingSettings, fingerprint_module
from .class_conditional import match_channels


class ConditionalVAEObjective(Objective):
    """The objective of a `ConditionalVAEPipeline`: the ELBO itself (paper, section 2.1 and appendix B.1).

    A sample's negative ELBO is the binary cross-entropy summed over pixels plus the KL divergence of its code. The
    original sums it over a batch of 256 too: its EWC weight is 256 times the one here. Conditions are names or
    numbers of classes. There is one timestep, and the noise `[batch, latent_size]` draws the code.

    Args:
        pipeline: The frozen pipeline. Its VAE becomes the trainable module.
    """

    kind = "conditional-vae"
    reduction = "sum"
    prediction_type = "bernoulli"
    num_train_timesteps = 1
    unconditional = False
    shows_means = True

    def __init__(self, pipeline: ConditionalVAEPipeline) -> None:
        self.pipeline = pipeline
        self.module = pipeline.vae
        self.labels = pipeline.labels
        self.channels = self.module.config.in_channels

    @property
    def resolution(self) -> int:
        return self.module.config.sample_size

    @property
    def device(self) -> torch.device:
        return self.module.device

    def to(self, device: torch.device | str) -> "ConditionalVAEObjective":
        self.module.to(device)
        return self

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(fingerprint_module(self.module).encode(), digest_size=16)
        digest.update(repr(self.labels).encode())
        return digest.hexdigest()

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        indices = [self.pipeline.label_index(prompt) for prompt in prompts]
        return {"class_labels": torch.tensor(indices, device=self.device)}

    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        return (match_channels(images, self.channels).float() + 1) / 2

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings) -> torch.Tensor:
        """Decoder means in [0, 1]; sampler, steps and guidance have no meaning here."""
        if settings.resolution not in (None, self.resolution):
            raise ValueError(f"resolution={settings.resolution}: this model draws {self.resolution} pixels only")
        parts = []
        for start in range(0, len(prompts), settings.batch_size):
            batch = slice(start, start + settings.batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            parts.append(self.pipeline(list(prompts[batch]), generator=generators, output_type="latent").images)
        return torch.cat(parts).float()

    def decode(self, samples: torch.Tensor) -> list[Image.Image]:
        return self.pipeline.image_processor.postprocess(samples, "pil", [False] * len(samples))

    def draw_noise(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(len(samples), self.module.config.latent_size, generator=generator)
        return noise.to(samples.device)

    def predict(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        return module(samples, noise=noise, **conditions)[0].sigmoid()

    def negative_elbo(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        logits, mean, log_variance = module(samples, noise=noise, **conditions)
        target = samples if target is None else target
        entropy = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).float()
        return entropy.flatten(1).sum(1) + divergence.sum(1)

    def target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return samples

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)
