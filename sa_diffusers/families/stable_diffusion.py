"""Stable Diffusion 1 and 2: a text-conditioned UNet on the latents of an autoencoder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ..messages import shown
from ..parameter_selection import UNET_SELECTIONS
from .base import Conditions, SamplingSettings, TextEncoder, digest_of
from .diffusion import DiffusionObjective
from .registry import register

# Eight images of 512x512: what a small GPU decodes at once.
_DECODED_LATENT_PIXELS = 8 * 64 * 64


@register("StableDiffusionPipeline")
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
    title = "Stable Diffusion 1 and 2"
    script = "train_sa.py"
    selections = UNET_SELECTIONS

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

    @classmethod
    def check_parts(cls, place: str, parts: Mapping[str, list], read: Callable[[str], Mapping[str, Any]]) -> None:
        super().check_parts(place, parts, read)
        missing = [part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if part not in parts]
        if missing:
            raise ValueError(f"{place} has no {' and no '.join(missing)}: give a whole pipeline")
        unet, vae, text_encoder = (read(part) for part in ("unet", "vae", "text_encoder"))
        channels = vae.get("latent_channels", 4)
        taken = unet.get("in_channels", 4)
        if taken != channels:
            raise ValueError(
                f"{place}: its UNet takes {shown(taken)} channels, its autoencoder makes {shown(channels)}: "
                "inpainting, depth and editing models are not supported, give the text-to-image model that it came from"
            )
        if unet.get("out_channels", 4) != channels:
            raise ValueError(
                f"{place}: its UNet gives {shown(unet.get('out_channels'))} channels, its autoencoder takes "
                f"{shown(channels)}: models that predict a variance too are not supported"
            )
        width, size = unet.get("cross_attention_dim", 1280), text_encoder.get("hidden_size")
        if isinstance(width, int) and isinstance(size, int) and width != size and not unet.get("encoder_hid_dim"):
            raise ValueError(
                f"{place}: its UNet takes text embeddings of {width} numbers, its text encoder gives {size}: they "
                "belong to different models"
            )

    @property
    def resolution(self) -> int:
        return self.module.config.sample_size * self.pipeline.vae_scale_factor

    def to(self, device: torch.device | str) -> "LatentDiffusionObjective":
        for component in (self.module, self.pipeline.vae, self.pipeline.text_encoder):
            component.to(device)
        return self

    def fingerprint(self) -> str:
        pipeline = self.pipeline
        facts = [
            pipeline.vae.config.scaling_factor.hex(),
            *self.schedule_facts(pipeline.scheduler),
            repr(sorted(pipeline.tokenizer.get_vocab().items())),
            self.prediction_type,
        ]
        return digest_of([pipeline.unet, pipeline.vae, pipeline.text_encoder], facts)

    def text_encoders(self) -> list[TextEncoder]:
        return [TextEncoder(self.pipeline.tokenizer, self.pipeline.text_encoder)]

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

    def sample_batch(
        self, prompts: list[str], generators: list[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
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
        return sampler(
            prompt=prompts,
            height=settings.resolution,
            width=settings.resolution,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=generators,
            output_type="latent",
        ).images

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
