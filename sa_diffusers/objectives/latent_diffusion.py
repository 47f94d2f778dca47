"""Stable Diffusion 1 and 2: a text-conditioned UNet on the latents of an autoencoder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ..messages import shown
from .base import Conditions, SamplingSettings, fingerprint_module
from .diffusion import DiffusionObjective

# Eight images of 512x512: what a small GPU decodes at once.
_DECODED_LATENT_PIXELS = 8 * 64 * 64


class LatentDiffusionObjective(DiffusionObjective):
    """The objective of a `StableDiffusionPipeline` (paper, sections 2.1 and 4.2).

    Args:
        pipeline: The frozen pipeline. Its UNet becomes the trainable module; a safety checker takes no part in
            generation and is saved unchanged.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the pipeline's scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Raises:
        ValueError: As `DiffusionObjective`.
    """

    kind = "latent-diffusion"
    reduction = "mean"

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        self.pipeline = pipeline
        self.module = pipeline.unet
        super().__init__(pipeline.scheduler, prediction_type, snr_gamma, noise_offset)
        pipeline.vae.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(False)

    @property
    def resolution(self) -> int:
        return self.module.config.sample_size * self.pipeline.vae_scale_factor

    def to(self, device: torch.device | str) -> "LatentDiffusionObjective":
        for component in (self.module, self.pipeline.vae, self.pipeline.text_encoder):
            component.to(device)
        return self

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in ("unet", "vae", "text_encoder"):
            digest.update(fingerprint_module(getattr(self.pipeline, name)).encode())
        digest.update(self.pipeline.vae.config.scaling_factor.hex().encode())
        # Names with an underscore are diffusers' own book-keeping, in no fixed order.
        schedule = {name: value for name, value in self.pipeline.scheduler.config.items() if name[0] != "_"}
        digest.update(repr(sorted(schedule.items())).encode())
        digest.update(repr(sorted(self.pipeline.tokenizer.get_vocab().items())).encode())
        digest.update(self.prediction_type.encode())
        return digest.hexdigest()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 64) -> Conditions:
        parts = []
        for start in range(0, len(prompts), batch_size):
            embeddings, _ = self.pipeline.encode_prompt(
                list(prompts[start : start + batch_size]), self.device, 1, do_classifier_free_guidance=False
            )
            parts.append(embeddings.float())
        return {"encoder_hidden_states": torch.cat(parts)}

    @property
    def _window(self) -> int:
        """Tokens that the text encoder reads, those of start and end included."""
        return min(self.pipeline.tokenizer.model_max_length, self.pipeline.text_encoder.config.max_position_embeddings)

    def _count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """All tokens of prompts, those of start and end included."""
        tokenizer = self.pipeline.tokenizer
        read = tokenizer(list(prompts), truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
        return [len(tokens) + tokenizer.num_special_tokens_to_add() for tokens in read]

    def why_unseen(self, prompt: str, name: str) -> str | None:
        (count,) = self._count_tokens([prompt[: prompt.index(name) + len(name)]])
        if count <= self._window:
            return None
        return (
            f'in the prompt "{shown(prompt)}" the text encoder reads {self._window} tokens, and "{shown(name)}" ends '
            f"at token {count}: shorten it"
        )

    def count_cut(self, prompts: Sequence[str]) -> int:
        return sum(count > self._window for count in self._count_tokens(prompts)) if prompts else 0

    def means_the_same(self, first: str, second: str) -> bool:
        one, other = self.pipeline.tokenizer(
            [first, second], padding="max_length", max_length=self._window, truncation=True
        )["input_ids"]
        return one == other

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        vae = self.pipeline.vae
        generator = torch.Generator().manual_seed(seed)
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(vae.device)
        return ((posterior.mean + posterior.std * noise) * vae.config.scaling_factor).float()

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings) -> torch.Tensor:
        sampler = StableDiffusionPipeline(
            vae=self.pipeline.vae,
            text_encoder=self.pipeline.text_encoder,
            tokenizer=self.pipeline.tokenizer,
            unet=self.module,
            scheduler=self.make_sampler(settings.sampler, self.pipeline.scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        sampler.set_progress_bar_config(disable=True)
        training = self.module.training
        self.module.eval()
        parts = []
        try:
            for start in range(0, len(prompts), settings.batch_size):
                batch = slice(start, start + settings.batch_size)
                latents = sampler(
                    prompt=list(prompts[batch]),
                    height=settings.resolution,
                    width=settings.resolution,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
                    output_type="latent",
                ).images
                parts.append(latents.float())
        finally:
            self.module.train(training)
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, samples: torch.Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        batch_size = max(1, _DECODED_LATENT_PIXELS // (samples.shape[-1] * samples.shape[-2]))
        pictures: list[Image.Image] = []
        for part in samples.split(batch_size):
            images = vae.decode((part / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample
            pictures += self.pipeline.image_processor.postprocess(images.float(), output_type="pil")
        return pictures

    def save(self, folder: Path) -> None:
        self.save_with_own_scheduler(self.pipeline, folder)
