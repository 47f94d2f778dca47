"""Sana: true cross-attention on a plain transformer, whose latents are small and whose prompts carry instructions."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SanaPipeline

from .base import Conditions, Denoiser, SamplingSettings
from .flow import TransformerObjective
from .registry import register

_INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


@register("SanaPipeline", "SanaControlNetPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline")
class SanaObjective(TransformerObjective):
    """The objective of a `SanaPipeline`.

    Samples are latents `[batch, 32, height / 32, width / 32]`; this autoencoder has no posterior. Conditions are the
    hidden states of Gemma, `[batch, 300, 2304]`, and which of them count, `[batch, 300]`: of each prompt behind the
    instruction to enhance it, as the pipeline has it, and of the empty prompt alone, as the pipeline guides by it.

    Timesteps are uniform and weighted alike, as in diffusers' script: by the static shift of a
    `FlowMatchEulerDiscreteScheduler`, and without one where the model comes with a `DPMSolverMultistepScheduler`, whose
    `flow_shift` is for sampling alone. Sampling is at the settings' own resolution: the pipeline's
    `use_resolution_binning`, which draws what is small at its own size and shrinks it, is off.

    Cross-attention is `attn2`: `"xattn"` trains it, `"noxattn"` the rest of the blocks and the patches.

    Args:
        pipeline: The frozen pipeline. Its transformer becomes the trainable module.
        settings: None of those of `Family.from_pipeline` has a meaning here.

    Raises:
        ValueError: As `FlowObjective`.
    """

    kind = "sana"
    title = "Sana"
    sampled_by = SanaPipeline
    # The pipeline keeps 300: the first, one of the instruction's, and these, counted with the first.
    read_tokens = {"tokenizer": 299}
    undistilled = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
    samplers = ("flow_dpmsolver++", "flow_euler")
    defaults = {"sampler": "flow_dpmsolver++", "num_inference_steps": 20, "guidance_scale": 4.5}
    selections = {
        "xattn": r"\.attn2\.",
        "noxattn": r"^patch_embed\.|^transformer_blocks\.\d+\.(?!attn2\.)",
    }

    @classmethod
    def check_parts(cls, place: str, parts: Mapping[str, list], read: Callable[[str], Mapping[str, Any]]) -> None:
        if "transformer" in parts and read("transformer").get("guidance_embeds"):
            raise ValueError(
                f"{place} is a Sana Sprint, distilled to few steps along another path, which cannot be trained here: "
                f"erase from {cls.undistilled} in its place"
            )
        super().check_parts(place, parts, read)

    @property
    def multiple(self) -> int:
        # The pipeline asks for 32 whatever its autoencoder is.
        return max(32, self.pipeline.vae_scale_factor * self.module.config.patch_size)

    def further_facts(self) -> list[str]:
        return _INSTRUCTION

    def encode(self, prompts: list[str]) -> Conditions:
        rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for instruction in (None, _INSTRUCTION):
            places = [place for place, prompt in enumerate(prompts) if bool(prompt) == bool(instruction)]
            if places:
                hidden, mask, *_ = self.pipeline.encode_prompt(
                    [prompts[place] for place in places], False, device=self.device,
                    complex_human_instruction=instruction,
                )  # fmt: skip
                rows |= zip(places, zip(hidden, mask, strict=True), strict=True)
        hidden, mask = (torch.stack(parts) for parts in zip(*(rows[place] for place in sorted(rows)), strict=True))
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def to_samples(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        vae = self.pipeline.vae
        return vae.encode(images).latent * vae.config.scaling_factor

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        times = self.path.times.to(noisy.device)[timesteps] * self.module.config.timestep_scale
        return module(noisy, timestep=times, **conditions, return_dict=False)[0]

    def call(self, prompts: list[str], settings: SamplingSettings) -> dict[str, Any]:
        said = _named(self.encode_prompts(prompts))
        if settings.guidance_scale > 1:
            empty = _named(self.encode_prompts([""] * len(prompts)))
            said |= {f"negative_{name}": value for name, value in empty.items()}
        # Its default is an empty prompt, which embeddings do not go with.
        said |= {"negative_prompt": None, "guidance_scale": settings.guidance_scale, "use_resolution_binning": False}
        return said


def _named(conditions: Conditions) -> dict[str, torch.Tensor]:
    """Conditions as the pipeline takes them."""
    return {
        "prompt_embeds": conditions["encoder_hidden_states"],
        "prompt_attention_mask": conditions["encoder_attention_mask"],
    }
