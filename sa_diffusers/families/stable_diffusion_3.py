"""Stable Diffusion 3 and 3.5: a transformer of two streams, text and image, trained by rectified flow."""

import torch
from diffusers import StableDiffusion3Pipeline

from .base import Conditions, Denoiser, SamplingSettings
from .flow import JOINT_SELECTIONS, TransformerObjective
from .registry import register


@register(
    "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline",
    "StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline",
)  # fmt: skip
class StableDiffusion3Objective(TransformerObjective):
    """The objective of a `StableDiffusion3Pipeline`, of 3 or 3.5.

    Conditions are the hidden states of two CLIPs and of T5, one behind the other, `[batch, 77 + 256, 4096]`, and the
    CLIPs' pooled embeddings, `[batch, 2048]`. Without T5 its states are zeros, as the pipeline has them.

    Its loss is that of diffusers' script: timesteps are logit-normal, and the velocity's error is weighted by the
    square of the noise's share. There is no cross-attention: both streams attend to one another. `"xattn"` trains what
    projects the text's stream into that attention and out of it, `"noxattn"` the image's own stream, but for what is
    modulated by the prompt (the norms) and the last layers. The second attention of 3.5 medium (`attn2`) is the
    image's own.

    Args:
        pipeline: The frozen pipeline. Its transformer becomes the trainable module.
        settings: None of those of `Family.from_pipeline` has a meaning here.

    Raises:
        ValueError: As `FlowObjective`.
    """

    kind = "stable-diffusion-3"
    title = "Stable Diffusion 3 and 3.5"
    sampled_by = StableDiffusion3Pipeline
    text_parts = (
        ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3"),
    )  # fmt: skip
    optional_parts = ("tokenizer_3", "text_encoder_3")
    undistilled = "stabilityai/stable-diffusion-3.5-large"
    read_tokens = {"tokenizer_3": 256}
    density = "logit_normal"
    weighting = "sigma_squared"
    samplers = ("flow_euler", "flow_dpmsolver++")
    defaults = {"sampler": "flow_euler", "num_inference_steps": 28, "guidance_scale": 7.0}
    selections = {
        **JOINT_SELECTIONS,
        "noxattn": r"^pos_embed\.|\.(attn\.(to_[qkv]|to_out|norm_[qk])|attn2|ff)\.",
        "text_embedding": r"^(context_embedder|time_text_embed\.text_embedder)\.",
    }

    def check_sampling(self, settings: SamplingSettings, scheduler: object = None) -> None:
        config = self.module.config
        largest = config.pos_embed_max_size * config.patch_size * self.pipeline.vae_scale_factor
        if settings.resolution and settings.resolution > largest:
            raise ValueError(f"resolution={settings.resolution}: this model draws {largest} pixels at the most")
        super().check_sampling(settings, scheduler)

    def encode(self, prompts: list[str]) -> Conditions:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        times = self.path.times.to(noisy.device)[timesteps]
        return module(hidden_states=noisy, timestep=times, **conditions, return_dict=False)[0]
