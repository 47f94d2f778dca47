"""Stable Diffusion 1 and 2: a text-conditioned UNet on the latents of an autoencoder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr
from PIL import Image
from torch import nn

from .base import Conditions, Denoiser, Objective, SamplingSettings

# Latents are not confined to [-1, 1], and PNDM's first steps are left out as Stable Diffusion does.
_SAMPLERS: dict[str, tuple[type, dict[str, bool]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
# Eight images of 512x512: what a small GPU decodes at once.
_DECODED_LATENT_PIXELS = 8 * 64 * 64


class LatentDiffusionObjective(Objective):
    """The objective of a `StableDiffusionPipeline` (paper, sections 2.1 and 4.2).

    Args:
        pipeline: The frozen pipeline. Its UNet becomes the trainable module; a safety checker takes no part in
            generation and is saved unchanged.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the pipeline's scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Raises:
        ValueError: The prediction type is another one.
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
        self.prediction_type = prediction_type or pipeline.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f'prediction_type="{self.prediction_type}" is not one of "epsilon", "v_prediction"')
        self.noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=self.prediction_type)
        self.num_train_timesteps = self.noise_schedule.config.num_train_timesteps
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        pipeline.vae.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(False)

    @property
    def resolution(self) -> int:
        return self.module.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def device(self) -> torch.device:
        return self.module.device

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

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        vae = self.pipeline.vae
        generator = torch.Generator().manual_seed(seed)
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(vae.device)
        return ((posterior.mean + posterior.std * noise) * vae.config.scaling_factor).float()

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings) -> torch.Tensor:
        kind, options = _SAMPLERS[settings.sampler]
        scheduler = kind.from_config(self.pipeline.scheduler.config, prediction_type=self.prediction_type, **options)
        sampler = StableDiffusionPipeline(
            vae=self.pipeline.vae,
            text_encoder=self.pipeline.text_encoder,
            tokenizer=self.pipeline.tokenizer,
            unet=self.module,
            scheduler=scheduler,
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
        error = (prediction.float() - target.float()).square().flatten(1).mean(1)
        if self.snr_gamma is None:
            return error
        snr = compute_snr(self.noise_schedule, timesteps)
        weight = snr.clamp(max=self.snr_gamma) / (snr + 1 if self.prediction_type == "v_prediction" else snr)
        return error * weight

    def target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "v_prediction":
            return self.noise_schedule.get_velocity(samples, noise, timesteps)
        return noise

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)


def fingerprint_module(module: nn.Module) -> str:
    """A digest of a module's parameters and buffers: names, shapes, types and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()
