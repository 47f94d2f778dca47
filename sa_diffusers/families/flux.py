"""FLUX.1: two streams, then one, of packed latents; guidance is an input of the transformer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline

from .base import Conditions, Denoiser, SamplingSettings
from .flow import JOINT_SELECTIONS, TransformerObjective
from .registry import register


@register(
    "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxControlNetPipeline",
    "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline",
)  # fmt: skip
class FluxObjective(TransformerObjective):
    """The objective of a `FluxPipeline`, of FLUX.1 dev.

    Samples are latents `[batch, 16, height / 8, width / 8]`; they are packed for the transformer alone. Conditions are
    the hidden states of T5, `[batch, 512, 4096]`, and CLIP's pooled embedding, `[batch, 768]`.

    FLUX.1 dev was distilled to draw in one pass what guidance draws in two, and takes the guidance as a number.
    Training, replay, probes and Fisher information give it the number that sampling gives it, `embedded_guidance`: what
    is trained is what is used. The settings' guidance is classifier-free, beside it, and 1 unless it is set. Elsewhere
    1 and 3 are trained with too; there is no consensus.

    Timesteps are uniform and weighted alike, as in diffusers' script. There is no cross-attention: `"xattn"` trains
    what projects the text's stream into the attention of the double blocks and out of it, `"noxattn"` the image's
    stream of these blocks. The single blocks have one set of weights for text and image, so that neither selection can
    have them; a regular expression can, and `full` does.

    Args:
        pipeline: The frozen pipeline. Its transformer becomes the trainable module.
        settings: None of those of `Family.from_pipeline` has a meaning here.

    Raises:
        ValueError: As `FlowObjective`.

    Attributes:
        embedded_guidance: What the transformer takes as guidance, in training and sampling.
    """

    kind = "flux"
    title = "FLUX.1 dev"
    sampled_by = FluxPipeline
    text_parts = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    packed = 4
    embedded_guidance = 3.5
    undistilled = "black-forest-labs/FLUX.1-dev"
    adapted = r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|ff(_context)?\.net\.(0\.proj|2))\.weight$"
    defaults = {"sampler": "flow_euler", "num_inference_steps": 28, "guidance_scale": 1.0}
    selections = {
        **JOINT_SELECTIONS,
        "noxattn": r"^x_embedder\.|^transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out|norm_[qk])|ff)\.",
        "text_embedding": r"^(context_embedder|time_text_embed\.text_embedder)\.",
    }

    @classmethod
    def why_distilled(cls, read: Callable[[str | None], Mapping[str, Any]]) -> tuple[str, str] | None:
        if not read("transformer").get("guidance_embeds"):
            return "its transformer takes no guidance, as that of FLUX.1-schnell", "FLUX.1-schnell"
        return None

    def further_facts(self) -> list[str]:
        return [f"guidance {self.embedded_guidance:g}"]

    @property
    def read_tokens(self) -> Mapping[str, int]:  # type: ignore[override]
        # Schnell was trained with half as many.
        return {"tokenizer_2": 512 if self.module.config.guidance_embeds else 256}

    def encode(self, prompts: list[str]) -> Conditions:
        hidden, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.read_tokens["tokenizer_2"]
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        (batch, channels, height, width), device = noisy.shape, noisy.device
        guidance = None
        if self.module.config.guidance_embeds:
            guidance = torch.full([batch], self.embedded_guidance, device=device)
        velocity = module(
            hidden_states=FluxPipeline._pack_latents(noisy.contiguous(), batch, channels, height, width),
            timestep=self.path.times.to(device)[timesteps] / 1000,
            guidance=guidance,
            txt_ids=torch.zeros(conditions["encoder_hidden_states"].shape[1], 3, device=device),
            # Places have no axis of the batch.
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, noisy.dtype),
            **conditions,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(velocity, height, width, 1)

    def call(self, prompts: list[str], settings: SamplingSettings) -> dict[str, Any]:
        # The pipeline's own guidance is what the transformer takes.
        guidance = {"guidance_scale": self.embedded_guidance, "true_cfg_scale": settings.guidance_scale}
        return {**self.embedded(prompts, settings), **guidance}

    def sample_batch(
        self, prompts: list[str], generators: Sequence[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        packed = super().sample_batch(prompts, list(generators), settings)
        size = settings.resolution or self.resolution
        return FluxPipeline._unpack_latents(packed, size, size, self.pipeline.vae_scale_factor)
