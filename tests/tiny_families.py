"""A tiny pipeline of the real classes for each family, offline and seeded, and what its authors' tools do with it."""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .conftest import build_tiny_pipeline

SIZE = 16


@dataclass(frozen=True)
class Tiny:
    """What the suite needs to know of a family.

    Attributes:
        build: A pipeline of `SIZE` pixels, randomly initialised.
        part: The part that is trained.
        loss: By hand, as the family's published training script has it: a pipeline, samples, prompts, timesteps and
            noise, to the loss `[batch]`.
        sampled: Guidance -> what a user calls the pipeline with.
        shares: A scheduler -> how often the script draws each timestep, in units of a uniform draw; None is alike.
        settings: Of an erasure, beside those of every family.
        in_processes: Whether two processes are tried: each takes seconds to start, and two kinds of network are enough.
    """

    build: Callable[[], DiffusionPipeline]
    part: str
    loss: Callable[..., torch.Tensor]
    sampled: Callable[[float], Mapping[str, Any]] = lambda guidance: {"guidance_scale": guidance}
    shares: Callable[[Any], torch.Tensor] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    in_processes: bool = False


def stable_diffusion_loss(pipeline, samples, prompts, timesteps, noise):
    """As train_text_to_image.py."""
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    ids = pipeline.tokenizer(
        prompts, max_length=pipeline.tokenizer.model_max_length, padding="max_length", truncation=True,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    hidden = pipeline.text_encoder(ids, return_dict=False)[0]
    noisy = schedule.add_noise(samples, noise, timesteps)
    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(samples, noise, timesteps)
    prediction = pipeline.unet(noisy, timesteps, hidden, return_dict=False)[0]
    return (prediction.float() - target.float()).square().mean((1, 2, 3))


def clip_tokenizer(length=32):
    """One token a letter."""
    symbols = [*string.ascii_lowercase, *string.digits, "-", ",", "."]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def clip_encoder(width, projection=None, length=32):
    """A text encoder of two layers, as pipelines read the last but one."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id, projection_dim=projection or width,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def build_xl(prediction_type="epsilon", zeros=True):
    vae = build_tiny_pipeline().vae
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 12,
    ).eval()  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        prediction_type=prediction_type,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae, clip_encoder(8), clip_encoder(16, projection=12), clip_tokenizer(), clip_tokenizer(), unet, scheduler,
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip


def xl_loss(pipeline, samples, prompts, timesteps, noise):
    """As train_text_to_image_sdxl.py, of images that were neither larger nor cut."""
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    hidden, pooled = [], None
    for tokenizer, encoder in ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2,
                                                                             pipeline.text_encoder_2)):  # fmt: skip
        ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                        return_tensors="pt").input_ids  # fmt: skip
        output = encoder(ids, output_hidden_states=True, return_dict=False)
        pooled = output[0]
        hidden.append(output[-1][-2])
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * len(prompts))
    noisy = schedule.add_noise(samples, noise, timesteps)
    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(samples, noise, timesteps)
    prediction = pipeline.unet(
        noisy, timesteps, torch.cat(hidden, -1), added_cond_kwargs={"time_ids": sizes, "text_embeds": pooled},
        return_dict=False,
    )[0]  # fmt: skip
    return (prediction.float() - target.float()).square().mean((1, 2, 3))


def t5_tokenizer(length=256):
    """One token a letter, of scores that are all alike."""
    pieces = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase, *string.digits, "\u2581", "-", ",", "."]
    return T5TokenizerFast(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=length)


def t5_encoder(width):
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def flow_vae():
    """Its latents are shifted as well as scaled."""
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=SIZE, latent_channels=4,
        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip


def build_sd3(t5=True, **transformer):
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**{
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 32,
        "pooled_projection_dim": 20, "pos_embed_max_size": 12, **transformer,
    }).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), flow_vae(), clip_encoder(8, projection=8),
        clip_tokenizer(), clip_encoder(12, projection=12), clip_tokenizer(), t5_encoder(32) if t5 else None,
        t5_tokenizer() if t5 else None,
    )  # fmt: skip


def places_of(scheduler, timesteps):
    """Indices in a new scheduler's table, which begins with noise; timesteps begin with the least."""
    table = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    indices = len(table.timesteps) - 1 - timesteps
    return table.timesteps[indices], table.sigmas[indices].view(-1, 1, 1, 1)


def sd3_loss(pipeline, samples, prompts, timesteps, noise):
    """As train_dreambooth_lora_sd3.py, which preconditions the output."""
    hidden, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
    times, sigmas = places_of(pipeline.scheduler, timesteps)
    noisy = sigmas * noise + (1.0 - sigmas) * samples
    prediction = pipeline.transformer(
        hidden_states=noisy, timestep=times, encoder_hidden_states=hidden, pooled_projections=pooled, return_dict=False
    )[0]
    prediction = prediction * (-sigmas) + noisy
    return (prediction.float() - samples.float()).square().flatten(1).mean(1)


def logit_normal_shares(scheduler):
    """The mass of the sigmoid of a normal variable between the edges of as many bins as there are timesteps."""
    edges = torch.linspace(0, 1, scheduler.config.num_train_timesteps + 1, dtype=torch.float64)
    mass = torch.special.ndtr(torch.logit(edges)).diff()
    return (mass * len(mass)).float()


def build_flux(guidance_embeds=True):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(
        scheduler, flow_vae(), clip_encoder(16), clip_tokenizer(), t5_encoder(32), t5_tokenizer(512), transformer
    )


def flux_loss(pipeline, samples, prompts, timesteps, noise):
    """As train_dreambooth_lora_flux.py, whose guidance is 3.5 and whose weighting is none."""
    hidden, pooled, text_ids = pipeline.encode_prompt(prompts, prompts)
    times, sigmas = places_of(pipeline.scheduler, timesteps)
    noisy = (1.0 - sigmas) * samples + sigmas * noise
    count, channels, height, width = noisy.shape
    # Each place of the transformer holds a square of two by two latents, channel by channel.
    packed = torch.nn.functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2)
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
    prediction = pipeline.transformer(
        hidden_states=packed, timestep=times / 1000, guidance=torch.full((count,), 3.5), pooled_projections=pooled,
        encoder_hidden_states=hidden, txt_ids=text_ids, img_ids=image_ids, return_dict=False,
    )[0]  # fmt: skip
    prediction = torch.nn.functional.pixel_shuffle(
        prediction.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2
    )
    return (prediction.float() - (noise - samples).float()).square().flatten(1).mean(1)


def flux_call(guidance):
    """Classifier-free guidance stands beside what the transformer takes, which is the pipeline's own."""
    return {"true_cfg_scale": guidance, "negative_prompt": ["", ""]} if guidance > 1 else {}


# Everything is tried with these.
FAMILIES = {
    "stable diffusion": Tiny(build_tiny_pipeline, "unet", stable_diffusion_loss),
    "SDXL": Tiny(build_xl, "unet", xl_loss, in_processes=True),
    "SD3": Tiny(build_sd3, "transformer", sd3_loss, shares=logit_normal_shares, in_processes=True),
    "FLUX": Tiny(build_flux, "transformer", flux_loss, flux_call, settings={"resolution": SIZE}),
}
# Loss, sampling and Fisher information alone with these.
VARIANTS = {
    "stable diffusion, v": Tiny(lambda: build_tiny_pipeline("v_prediction"), "unet", stable_diffusion_loss),
    "SDXL, v": Tiny(lambda: build_xl("v_prediction"), "unet", xl_loss),
    "SDXL, guided by the empty prompt's words": Tiny(lambda: build_xl(zeros=False), "unet", xl_loss),
    "SD3.5 medium": Tiny(
        lambda: build_sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
        "transformer",
        sd3_loss,
        shares=logit_normal_shares,
    ),
    "SD3 without T5": Tiny(lambda: build_sd3(t5=False), "transformer", sd3_loss, shares=logit_normal_shares),
}
