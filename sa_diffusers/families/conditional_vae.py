"""Conditional variational autoencoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from ..models.conditional_vae import ConditionalVAE
from ..models.conditional_vae_pipeline import ConditionalVAEPipeline
from ..passes import count_rows
from .base import Conditions, Denoiser, Objective, SamplingSettings, digest_of, match_channels
from .paths import OneStepPath
from .registry import register


@register("ConditionalVAEPipeline")
class ConditionalVAEObjective(Objective):
    """The objective of a `ConditionalVAEPipeline`: the ELBO itself (paper, section 2.1 and appendix B.1).

    A sample's negative ELBO is the binary cross-entropy summed over pixels plus the KL divergence of its code. The
    original sums it over a batch of 256 too: its EWC weight is 256 times the one here. Conditions are names or
    numbers of classes. There is one timestep, and the noise `[batch, latent_size]` draws the code.

    Args:
        pipeline: The frozen pipeline. Its VAE becomes the trainable module.
    """

    kind = "conditional-vae"
    script = "train_sa.py"
    reduction = "sum"
    unconditional = False
    shows_means = True
    fixed_resolution = True
    own_pipeline = ConditionalVAEPipeline
    own_models = {"ConditionalVAE": ConditionalVAE}

    def __init__(self, pipeline: ConditionalVAEPipeline) -> None:
        self.pipeline = pipeline
        self.module = pipeline.vae
        self.labels = pipeline.labels
        self.channels = self.module.config.in_channels
        self.path = OneStepPath(self.module.config.latent_size)

    @classmethod
    def from_pipeline(cls, pipeline: ConditionalVAEPipeline, *settings: Any) -> "ConditionalVAEObjective":
        for name, value in zip(("prediction_type", "snr_gamma", "noise_offset"), settings, strict=False):
            if value:
                raise ValueError(f"{name}={value} has no meaning for a conditional VAE: leave it out")
        return cls(pipeline)

    def passes_of_sample(self, settings: SamplingSettings, scheduler: Any = None) -> int:
        return 1

    @property
    def resolution(self) -> int:
        return self.module.config.sample_size

    def to(self, device: torch.device | str) -> "ConditionalVAEObjective":
        self.module.to(device)
        return self

    def fingerprint(self) -> str:
        return digest_of([self.module], [repr(self.labels)])

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        indices = [self.pipeline.label_index(prompt) for prompt in prompts]
        return {"class_labels": torch.tensor(indices, device=self.device)}

    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        return (match_channels(images, self.channels).float() + 1) / 2

    def sample_batch(
        self, prompts: list[str], generators: list[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        """Decoder means in [0, 1]; sampler, steps and guidance have no meaning here."""
        # The decoder alone is called, not the module: such a row counts as one that went through the encoder too.
        count_rows(self.module, len(prompts))
        return self.pipeline(prompts, generator=generators, output_type="latent").images

    def decode(self, samples: torch.Tensor) -> list[Image.Image]:
        return self.pipeline.image_processor.postprocess(samples, "pil", [False] * len(samples))

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

    def answer(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Means of the pixels that codes of the prior decode to; the samples say nothing."""
        return module(None, noise=noise, **conditions)[0].sigmoid()

    def uniform_noise_target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The mean of each pixel, whatever the code: a code that told of the noise is not to be learned."""
        return torch.full_like(samples, 0.5)

    def deviation(self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The divergence of one Bernoulli distribution of pixels from another, summed over pixels."""
        prediction, target = (value.float().clamp(1e-6, 1 - 1e-6) for value in (prediction, target))
        entropies = [F.binary_cross_entropy(mean, target, reduction="none") for mean in (prediction, target)]
        return (entropies[0] - entropies[1]).clamp(min=0).flatten(1).sum(1)

    def root_weights(self, prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Those of the pixels' means, decoded from codes of the samples; the divergence of the code takes no part."""
        mean = prediction.float().clamp(1e-6, 1 - 1e-6)
        return (2 * mean * (1 - mean)).rsqrt()

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)
