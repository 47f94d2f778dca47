"""Stable Diffusion XL: two text encoders, a pooled embedding, and the sizes that an image had before it was cut."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from .base import Conditions, Denoiser
from .registry import register
from .stable_diffusion import UNetObjective


@register(
    "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline", "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline", "StableDiffusionXLControlNetUnionInpaintPipeline",
    "StableDiffusionXLAdapterPipeline",
)  # fmt: skip
class StableDiffusionXLObjective(UNetObjective):
    """The objective of a `StableDiffusionXLPipeline`, or of one that shares its parts (image to image, ControlNet).

    Conditions are the hidden states of both text encoders, `[batch, 77, 2048]`, and the second one's pooled embedding,
    `[batch, 1280]`. The UNet is told that an image was as large as it is and was not cut, as the pipeline tells it.
    The empty prompt is what the pipeline guides by: zeros, where it says `force_zeros_for_empty_prompt`.

    Args:
        pipeline: The frozen pipeline. Its UNet becomes the trainable module; saved is the text-to-image pipeline of its
            parts.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the pipeline's scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Raises:
        ValueError: As `DiffusionObjective`.
    """

    kind = "stable-diffusion-xl"
    title = "SDXL"
    sampled_by = StableDiffusionXLPipeline
    text_parts = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    defaults = {"guidance_scale": 5.0}
    undistilled = "stabilityai/stable-diffusion-xl-base-1.0"

    @classmethod
    def check_parts(cls, place: str, parts: Mapping[str, list], read: Callable[[str], Mapping[str, Any]]) -> None:
        if "text_encoder_2" in parts and "text_encoder" not in parts:
            raise ValueError(
                f"{place} has the second text encoder alone, as a refiner has, which paints over what another model "
                "has drawn: give the base model, such as stabilityai/stable-diffusion-xl-base-1.0"
            )
        super().check_parts(place, parts, read)
        if read("vae").get("latents_mean") is not None:
            raise ValueError(
                f"{place}: its latents are shifted and scaled channel by channel (latents_mean), which is not "
                "supported: give a model whose autoencoder has a scaling_factor alone"
            )

    @classmethod
    def why_distilled(cls, read: Callable[[str | None], Mapping[str, Any]]) -> tuple[str, str] | None:
        scheduler = read("scheduler")
        # What SDXL-Turbo has: noise anew at each of a few steps, the first of them at the last timestep.
        renews = scheduler.get("_class_name") == "EulerAncestralDiscreteScheduler"
        if renews and scheduler.get("timestep_spacing") == "trailing":
            return "its scheduler is that of SDXL-Turbo", "SDXL-Turbo"
        return super().why_distilled(read)

    def further_facts(self) -> list[str]:
        zeros = bool(self.pipeline.config.force_zeros_for_empty_prompt)
        return [f"zeros for the empty prompt: {zeros}", *super().further_facts()]

    def encode(self, prompts: list[str]) -> Conditions:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            kept = torch.tensor([float(prompt != "") for prompt in prompts], device=hidden.device)[:, None]
            hidden, pooled = hidden * kept[..., None], pooled * kept
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        height, width = (side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:])
        # Original size, where it was cut, and target size.
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=noisy.dtype, device=noisy.device)
        added = {"text_embeds": conditions["text_embeds"], "time_ids": sizes.expand(len(noisy), -1)}
        hidden = conditions["encoder_hidden_states"]
        further = self.guidance(noisy)
        return module(noisy, timesteps, hidden, added_cond_kwargs=added, **further, return_dict=False)[0]
