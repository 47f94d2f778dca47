"""Qwen-Image: two streams of packed latents all the way, and an autoencoder of videos."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImagePipeline

from .base import Conditions, Denoiser, SamplingSettings
from .flow import JOINT_SELECTIONS, TransformerObjective
from .registry import register

# Tokens of a prompt and of what the template puts behind it.
_READ = 512
# The pipeline guides by a prompt that is not empty; this one is what its authors give.
_EMPTY = " "


@register(
    "QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageControlNetPipeline",
    "QwenImageControlNetInpaintPipeline",
)  # fmt: skip
class QwenImageObjective(TransformerObjective):
    """The objective of a `QwenImagePipeline`.

    Samples are latents `[batch, 16, height / 8, width / 8]`: one frame, without the axis of frames that the autoencoder
    has, and packed for the transformer alone. Conditions are the hidden states of Qwen2.5-VL, `[batch, 512, 3584]`, and
    which of them are there, `[batch, 512]`. The empty prompt is a space, as its authors guide by.

    Guidance is classifier-free, two passes, the pipeline's `true_cfg_scale`; the pipeline scales what comes of it to
    the length that it has without. Timesteps are uniform and weighted alike, as in diffusers' script. There is no
    cross-attention: `"xattn"` trains what projects the text's stream into the joint attention and out of it,
    `"noxattn"` the image's own stream, but for what time modulates and the last layers.

    Args:
        pipeline: The frozen pipeline. Its transformer becomes the trainable module.
        settings: None of those of `Family.from_pipeline` has a meaning here.

    Raises:
        ValueError: As `FlowObjective`.
    """

    kind = "qwen-image"
    title = "Qwen-Image"
    sampled_by = QwenImagePipeline
    read_tokens = {"tokenizer": _READ}
    lengths = ("mask",)
    packed = 4
    undistilled = "Qwen/Qwen-Image"
    defaults = {"sampler": "flow_euler", "num_inference_steps": 50, "guidance_scale": 4.0}
    selections = {
        **JOINT_SELECTIONS,
        "noxattn": r"^img_in\.|^transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out|norm_[qk])|img_mlp)\.",
        "text_embedding": r"^txt_(in|norm)\.",
    }

    @classmethod
    def card_snippet(cls, condition: str | int) -> str:
        asked = json.dumps(condition, ensure_ascii=False)
        return f'image = pipeline({asked}, negative_prompt="{_EMPTY}").images[0]'

    def latent_facts(self) -> list[str]:
        vae = self.pipeline.vae.config
        return [value.hex() for value in map(float, [*vae.latents_mean, *vae.latents_std])]

    def encode(self, prompts: list[str]) -> Conditions:
        hidden, there = self.pipeline.encode_prompt(
            [prompt or _EMPTY for prompt in prompts], self.device, max_sequence_length=_READ
        )
        # The pipeline says nothing where all are there.
        there = hidden.new_ones(hidden.shape[:2]) if there is None else there
        missing = _READ - hidden.shape[1]
        pad = torch.nn.functional.pad
        return {"encoder_hidden_states": pad(hidden, (0, 0, 0, missing)), "mask": pad(there, (0, missing))}

    def to_samples(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        vae = self.pipeline.vae
        latents = self.chosen(vae.encode(images.unsqueeze(2)).latent_dist, generator).squeeze(2)
        mean, deviation = self._scale(latents)
        return (latents - mean) / deviation

    def to_images(self, samples: torch.Tensor) -> torch.Tensor:
        mean, deviation = self._scale(samples)
        return self.pipeline.vae.decode((samples * deviation + mean).unsqueeze(2)).sample.squeeze(2)

    def _scale(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Mean and deviation of the autoencoder's latents, channel by channel."""
        vae = self.pipeline.vae.config
        return [like.new_tensor(values).view(1, -1, 1, 1) for values in (vae.latents_mean, vae.latents_std)]

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        batch, channels, height, width = noisy.shape
        hidden, there = _read(conditions)
        velocity = module(
            hidden_states=QwenImagePipeline._pack_latents(noisy.contiguous(), batch, channels, height, width),
            timestep=self.path.times.to(noisy.device)[timesteps] / 1000,
            encoder_hidden_states=hidden,
            # Nothing where all are there, as the pipeline gives it: faster kernels take no mask.
            encoder_hidden_states_mask=None if there.all() else there,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return QwenImagePipeline._unpack_latents(velocity, height, width, 1).squeeze(2)

    def call(self, prompts: list[str], settings: SamplingSettings) -> dict[str, Any]:
        hidden, there = _read(self.encode_prompts(prompts))
        said = {"prompt_embeds": hidden, "prompt_embeds_mask": there, "true_cfg_scale": settings.guidance_scale}
        if settings.guidance_scale > 1:
            hidden, there = _read(self.encode_prompts([""] * len(prompts)))
            said |= {"negative_prompt_embeds": hidden, "negative_prompt_embeds_mask": there}
        return said

    def sample_batch(
        self, prompts: list[str], generators: Sequence[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        packed = super().sample_batch(prompts, list(generators), settings)
        size = settings.resolution or self.resolution
        return QwenImagePipeline._unpack_latents(packed, size, size, self.pipeline.vae_scale_factor).squeeze(2)


def _read(conditions: Conditions) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states as long as the longest text of a batch, and which of them are there."""
    there = conditions["mask"].bool()
    length = int(there.sum(1).max())
    return conditions["encoder_hidden_states"][:, :length], there[:, :length]
