"""Stable Diffusion 1 and 2: a text-conditioned UNet on the latents of an autoencoder."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..messages import shown
from ..parameter_selection import UNET_SELECTIONS
from .base import Conditions, Denoiser, SamplingSettings
from .diffusion import DiffusionObjective
from .registry import register
from .text_to_image import TextToImageObjective


class UNetObjective(TextToImageObjective, DiffusionObjective):
    """What the text-conditioned UNets of Stable Diffusion share.

    Those of latent consistency models take guidance as a number, in training, replay, probes, Fisher information and
    sampling the same, and have no other beside it.

    Attributes:
        embedded_guidance: That number.
    """

    selections = UNET_SELECTIONS
    embedded_guidance = 8.0

    def __init__(self, pipeline: DiffusionPipeline, *settings: Any, **named: Any) -> None:
        super().__init__(pipeline, *settings, **named)
        for name, tokenizer, encoder in self._texts():
            read, limit = encoder.config.max_position_embeddings, tokenizer.model_max_length
            if not isinstance(limit, int) or limit > read:
                raise ValueError(
                    f"the text encoder reads {read} tokens, its {name} sets "
                    f"{'no limit' if limit == VERY_LARGE_INTEGER else f'model_max_length={shown(limit)}'}: set "
                    f"model_max_length to {read} in {name}/tokenizer_config.json, or download or save it again"
                )

    @classmethod
    def check_parts(cls, place: str, parts: Mapping[str, list], read: Callable[[str], Mapping[str, Any]]) -> None:
        super().check_parts(place, parts, read)
        unet, vae = read("unet"), read("vae")
        channels = vae.get("latent_channels", 4)
        taken = unet.get("in_channels", 4)
        for part, name, value in (("vae", "latent_channels", channels), ("unet", "in_channels", taken)):
            if not isinstance(value, int):
                raise ValueError(
                    f"{place}: {part}/config.json says {name}={shown(value)}, which is no number of channels: correct "
                    "it, or download or save the pipeline again"
                )
        if taken != channels:
            further = (
                "as for inpainting, where a mask and the masked picture stand beside the latents"
                if taken == 2 * channels + 1
                else "a depth, say, or a picture to edit"
            )
            raise ValueError(
                f"{place}: its UNet takes {shown(taken)} channels, its autoencoder makes {shown(channels)}: what it "
                f"takes beside them ({further}) no prompt draws, and surrogates, replay and Fisher samples are drawn "
                "from prompts alone: give the text-to-image model that it came from"
            )
        if unet.get("out_channels", 4) != channels:
            raise ValueError(
                f"{place}: its UNet gives {shown(unet.get('out_channels'))} channels, its autoencoder takes "
                f"{shown(channels)}: models that predict a variance too are not supported"
            )
        size, factor = unet.get("sample_size"), vae.get("scaling_factor", 1)
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{place}: its UNet says sample_size={shown(size)}, which is no height and width of square pictures: "
                "correct unet/config.json (64 for 512 pixels)"
            )
        if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(
                f"{place}: its autoencoder says scaling_factor={shown(factor)}, which is no number above 0: correct "
                "vae/config.json"
            )
        width, sizes = (
            unet.get("cross_attention_dim", 1280),
            [read(part).get("hidden_size") for _, part in cls.text_parts],
        )
        known = isinstance(width, int) and all(isinstance(size, int) for size in sizes)
        if known and width != sum(sizes) and not unet.get("encoder_hid_dim"):
            encoders = "its text encoder gives" if len(sizes) == 1 else "its text encoders give"
            raise ValueError(
                f"{place}: its UNet takes text embeddings of {width} numbers, {encoders} {sum(sizes)}: they "
                "belong to different models"
            )

    @classmethod
    def why_distilled(cls, read: Callable[[str | None], Mapping[str, Any]]) -> tuple[str, str] | None:
        if read("unet").get("time_cond_proj_dim"):
            return "its UNet takes guidance as a number, as latent consistency models do", "LCM"
        if read("scheduler").get("_class_name") == "LCMScheduler":
            return "its scheduler is that of latent consistency models", "LCM"
        return None

    @property
    def takes_guidance(self) -> bool:
        """Whether the UNet takes guidance as a number."""
        return self.module.config.time_cond_proj_dim is not None

    def guidance(self, noisy: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the UNet is told of guidance beside noised samples `[batch, ...]`, where it takes it as a number."""
        if not self.takes_guidance:
            return {}
        number = torch.full((len(noisy),), self.embedded_guidance - 1)
        embedded = self.pipeline.get_guidance_scale_embedding(number, self.module.config.time_cond_proj_dim)
        return {"timestep_cond": embedded.to(noisy.device, noisy.dtype)}

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        return module(noisy, timesteps, **conditions, **self.guidance(noisy), return_dict=False)[0]

    def check_sampling(self, settings: SamplingSettings, scheduler: Any = None) -> None:
        if self.takes_guidance and settings.guidance_scale > 1:
            raise ValueError(
                f"guidance_scale={settings.guidance_scale:g}: this model takes guidance as a number, "
                f"{self.embedded_guidance:g}, and has no other beside it: give 1"
            )
        super().check_sampling(settings, scheduler)

    def call(self, prompts: list[str], settings: SamplingSettings) -> dict[str, Any]:
        if not self.takes_guidance:
            return super().call(prompts, settings)
        # The pipeline's own guidance is what the UNet takes.
        unguided = super().call(prompts, replace(settings, guidance_scale=1.0))
        return {**unguided, "guidance_scale": self.embedded_guidance}

    def further_facts(self) -> list[str]:
        return [f"guidance {self.embedded_guidance:g}"] if self.takes_guidance else []

    def saved_scheduler(self) -> Any:
        return self.own_scheduler(self.pipeline.scheduler)

    def save(self, folder: Path) -> None:
        self.save_with_own_scheduler(self.pipeline, folder)


@register(
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline", "StableDiffusionAdapterPipeline", "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)  # fmt: skip
class LatentDiffusionObjective(UNetObjective):
    """The objective of a `StableDiffusionPipeline` (paper, sections 2.1 and 4.2), or of one that shares its parts
    (image to image, inpainting by the same network, ControlNet).

    Args:
        pipeline: The frozen pipeline. Its UNet becomes the trainable module; a safety checker takes no part in
            generation and is saved unchanged, in the text-to-image pipeline of its parts.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the pipeline's scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Raises:
        ValueError: As `DiffusionObjective`.
    """

    kind = "latent-diffusion"
    title = "Stable Diffusion 1 and 2"
    sampled_by = StableDiffusionPipeline
    undistilled = "CompVis/stable-diffusion-v1-4"
    unsampled = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def encode(self, prompts: list[str]) -> Conditions:
        embeddings, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings}
