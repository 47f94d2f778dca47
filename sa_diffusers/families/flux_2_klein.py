"""FLUX.2 klein: two streams, then one, of patches whose channels are normalised; true guidance, no number for it."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import Flux2KleinPipeline

from .base import Conditions, Denoiser, SamplingSettings
from .flow import JOINT_SELECTIONS, TransformerObjective
from .registry import register


@register("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
class Flux2KleinObjective(TransformerObjective):
    """The objective of a `Flux2KleinPipeline`, of FLUX.2 klein base.

    Samples are patches of two by two latents, `[batch, 128, height / 16, width / 16]`, the most likely of an image,
    normalised by the running statistics of the autoencoder's batch norm. Conditions are hidden states of three layers
    of Qwen3, `[batch, 512, 3 * 2560]` of 4B, none of them left out: the transformer sees padding too.

    Guidance is classifier-free. Timesteps are uniform and weighted alike, as in diffusers' script. Selections are those
    of FLUX.1: in neither are the single blocks, in which text and image share one projection to queries, keys, values
    and feed-forward layer, nor the modulation, which all blocks share.

    Args:
        pipeline: The frozen pipeline. Its transformer becomes the trainable module.
        settings: None of those of `Family.from_pipeline` has a meaning here.

    Raises:
        ValueError: As `FlowObjective`.
    """

    kind = "flux-2-klein"
    title = "FLUX.2 klein"
    sampled_by = Flux2KleinPipeline
    # The norms of its batches.
    samples_with = ("vae",)
    # Of 512, those of the chat template before a prompt left out.
    read_tokens = {"tokenizer": 509}
    packed = 4
    takes_mode = True
    undistilled = "black-forest-labs/FLUX.2-klein-base-4B"
    # In single blocks attention and feed-forward layer are one projection.
    adapted = r"\.(to_[qkv]|to_out(\.0)?|to_qkv_mlp_proj|add_[qkv]_proj|to_add_out)\.weight$"
    defaults = {"sampler": "flow_euler", "num_inference_steps": 50, "guidance_scale": 4.0}
    selections = {
        **{name: meaning for name, meaning in JOINT_SELECTIONS.items() if name != "image_kv"},
        "noxattn": r"^x_embedder\.|^transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out|norm_[qk])|ff)\.",
        "text_embedding": r"^context_embedder\.",
    }

    @classmethod
    def why_distilled(cls, read: Callable[[str | None], Mapping[str, Any]]) -> tuple[str, str] | None:
        return ("its index says is_distilled", "FLUX.2-klein-4B") if read(None).get("is_distilled") else None

    @classmethod
    def card_snippet(cls, condition: str | int) -> str:
        # What comes first is an image to edit.
        return f"image = pipeline(prompt={json.dumps(condition, ensure_ascii=False)}).images[0]"

    def latent_facts(self) -> list[str]:
        return [self.pipeline.vae.config.batch_norm_eps.hex()]

    def further_facts(self) -> list[str]:
        return [f"distilled: {bool(self.pipeline.config.is_distilled)}"]

    def encode(self, prompts: list[str]) -> Conditions:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(prompts, self.device)[0]}

    def to_samples(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self._normalised(self.chosen(self.pipeline.vae.encode(images).latent_dist, generator))

    def _normalised(self, latents: torch.Tensor) -> torch.Tensor:
        """Samples of latents."""
        mean, deviation = self._scale(latents)
        return (Flux2KleinPipeline._patchify_latents(latents) - mean) / deviation

    def to_images(self, samples: torch.Tensor) -> torch.Tensor:
        mean, deviation = self._scale(samples)
        latents = Flux2KleinPipeline._unpatchify_latents(samples * deviation + mean)
        return self.pipeline.vae.decode(latents).sample

    def _scale(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the patches' channels."""
        norm, eps = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        mean, variance = (values.to(like).view(1, -1, 1, 1) for values in (norm.running_mean, norm.running_var))
        return mean, (variance + eps).sqrt()

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        hidden, device = conditions["encoder_hidden_states"], noisy.device
        velocity = module(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy),
            timestep=self.path.times.to(device)[timesteps] / 1000,
            encoder_hidden_states=hidden,
            # Places have no axis of the batch.
            txt_ids=Flux2KleinPipeline._prepare_text_ids(hidden[:1])[0].to(device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy)[0].to(device),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, noisy.shape[2:])

    def call(self, prompts: list[str], settings: SamplingSettings) -> dict[str, Any]:
        said = {"prompt_embeds": self.encode_prompts(prompts)["encoder_hidden_states"]}
        if settings.guidance_scale > 1:
            said["negative_prompt_embeds"] = self.encode_prompts([""] * len(prompts))["encoder_hidden_states"]
        return {**said, "guidance_scale": settings.guidance_scale}

    def sample_batch(
        self, prompts: list[str], generators: list[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        # The pipeline gives latents as the autoencoder takes them.
        return self._normalised(super().sample_batch(prompts, generators, settings))
