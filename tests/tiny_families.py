"""A tiny pipeline of the real classes for each family, offline and seeded, and what its authors' tools do with it."""

import inspect
import json
import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .conftest import build_tiny_pipeline

SIZE = 16
SANA_INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def drawn_latents(vae, images, generator):
    """As most scripts: drawn from the posterior, shifted where the autoencoder says so, scaled."""
    latents = vae.encode(images).latent_dist.sample(generator)
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


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
        size: Of its images in pixels.
        latents: By hand, as the script has it: an autoencoder, images and a generator, to samples.
        settings: Of an erasure, beside those of every family.
        repository: The name on the Hub of the family's best-known base, under which the command is tried.
        shards: Part -> files that its weights are in there.
        variant: Of the weights, where the repository's plain ones are not tried.
    """

    build: Callable[[], DiffusionPipeline]
    part: str
    loss: Callable[..., torch.Tensor]
    sampled: Callable[[float], Mapping[str, Any]] = lambda guidance: {"guidance_scale": guidance}
    shares: Callable[[Any], torch.Tensor] | None = None
    size: int = SIZE
    latents: Callable[..., torch.Tensor] = drawn_latents
    settings: Mapping[str, Any] = field(default_factory=dict)
    repository: str | None = None
    shards: Mapping[str, int] = field(default_factory=dict)
    variant: str | None = None


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
    prediction = pipeline.unet(noisy, timesteps, hidden, **number(pipeline.unet, noisy), return_dict=False)[0]
    return (prediction.float() - target.float()).square().mean((1, 2, 3))


def number(unet, noisy):
    """Guidance of 8 as train_lcm_distill_sd_wds.py embeds it, for a UNet that takes it as a number."""
    width = unet.config.time_cond_proj_dim
    if width is None:
        return {}
    angles = 1000 * (8.0 - 1) * torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2 - 1))
    return {"timestep_cond": torch.cat([angles.sin(), angles.cos()]).expand(len(noisy), -1)}


def as_consistency_model(pipeline):
    """With a UNet that takes guidance as a number, and the scheduler of latent consistency models."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=16).eval()
    pipeline.register_modules(unet=unet, scheduler=LCMScheduler.from_config(pipeline.scheduler.config))
    return pipeline


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
        **number(pipeline.unet, noisy), return_dict=False,
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


def chat_tokenizer():
    """One token a byte, and Qwen's own; a chat template as short as one can be."""
    vocab = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab |= {token: len(vocab) + index for index, token in enumerate(special)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], unk_token=special[0], eos_token=special[2], pad_token=special[0],
        additional_special_tokens=special[1:], model_max_length=1024,
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen3(kind, width, layers, heads=2):
    config = Qwen3Config(
        vocab_size=len(chat_tokenizer()), hidden_size=width, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=1, head_dim=4, max_position_embeddings=1024,
    )  # fmt: skip
    return kind(config).eval()


def build_z_image(shift=6.0):
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=(4, 2, 2), axes_lens=(1024, 64, 64),
    ).eval()  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token, std=0.02)
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=shift), flow_vae(), qwen3(Qwen3Model, 16, 2), chat_tokenizer(),
        transformer,
    )  # fmt: skip


def z_image_loss(pipeline, samples, prompts, timesteps, noise):
    """As train_dreambooth_lora_z_image.py, whose weighting is none."""
    texts, _ = pipeline.encode_prompt([*prompts], do_classifier_free_guidance=False)
    times, sigmas = places_of(pipeline.scheduler, timesteps)
    noisy = (1.0 - sigmas) * samples + sigmas * noise
    frames = [sample[:, None] for sample in noisy]
    prediction = pipeline.transformer(frames, (1000 - times) / 1000, texts, return_dict=False)[0]
    prediction = -torch.cat([frame.movedim(1, 0) for frame in prediction])
    return (prediction.float() - (noise - samples).float()).square().flatten(1).mean(1)


def likeliest_latents(vae, images, generator):
    """As train_dreambooth_lora_z_image.py."""
    return (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor


def instruction_tokenizer():
    """Pieces of the instruction that Sana's pipeline puts before a prompt, so that it is short."""
    text = "\n".join(SANA_INSTRUCTION).replace(" ", "\u2581")
    tokenizer = Tokenizer(models.BPE())
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=[*string.ascii_lowercase, "\u2581"],
        max_token_length=12, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(text.split("\u2581"), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return GemmaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=2048,
        add_bos_token=True,
    )  # fmt: skip


def build_sana(scheduler=None):
    torch.manual_seed(0)
    tokenizer = instruction_tokenizer()
    encoder = Gemma2Model(Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=2048, query_pre_attn_scalar=8,
    )).eval()  # fmt: skip
    # Tokens that differ from one another more than an untrained encoder's do.
    torch.nn.init.normal_(encoder.embed_tokens.weight)
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    ).eval()  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8,
    ).eval()  # fmt: skip
    # Attention that picks a few tokens, as a trained one does: else prompts are nearly alike.
    for block in transformer.transformer_blocks:
        block.attn2.to_k.weight.data *= 16
    return SanaPipeline(tokenizer, encoder, vae, transformer, scheduler or sana_scheduler())


def sana_scheduler():
    """As it is published with the models."""
    return DPMSolverMultistepScheduler(
        beta_end=0.02, beta_schedule="linear", beta_start=0.0001, flow_shift=3.0, prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )  # fmt: skip


def sana_loss(pipeline, samples, prompts, timesteps, noise):
    """As train_dreambooth_lora_sana.py, which reads the scheduler as one of Euler's, and whose weighting is none."""
    hidden, mask, *_ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, complex_human_instruction=SANA_INSTRUCTION
    )
    times, sigmas = places_of(pipeline.scheduler, timesteps)
    noisy = (1.0 - sigmas) * samples + sigmas * noise
    prediction = pipeline.transformer(
        hidden_states=noisy, encoder_hidden_states=hidden, encoder_attention_mask=mask, timestep=times,
        return_dict=False,
    )[0]  # fmt: skip
    return (prediction.float() - (noise - samples).float()).square().flatten(1).mean(1)


def build_qwen():
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 2, 2),
    ).eval()  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0],
    ).eval()  # fmt: skip
    text = {
        "vocab_size": len(chat_tokenizer()), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
              "fullatt_block_indexes": [0]}  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(scheduler, vae, encoder, chat_tokenizer(), transformer)


def qwen_loss(pipeline, samples, prompts, timesteps, noise):
    """As train_dreambooth_lora_qwen_image.py, whose weighting is none."""
    hidden, mask = pipeline.encode_prompt(prompts, max_sequence_length=512)
    times, sigmas = places_of(pipeline.scheduler, timesteps)
    noisy = (1.0 - sigmas) * samples + sigmas * noise
    height, width = noisy.shape[-2:]
    packed = torch.nn.functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2)
    prediction = pipeline.transformer(
        hidden_states=packed, encoder_hidden_states=hidden, encoder_hidden_states_mask=mask, timestep=times / 1000,
        img_shapes=[(1, height // 2, width // 2)] * len(noisy), return_dict=False,
    )[0]  # fmt: skip
    prediction = torch.nn.functional.pixel_shuffle(
        prediction.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2
    )
    return (prediction.float() - (noise - samples).float()).square().flatten(1).mean(1)


def qwen_latents(vae, images, generator):
    """As train_dreambooth_lora_qwen_image.py, of one frame."""
    latents = vae.encode(images[:, :, None]).latent_dist.sample(generator)[:, :, 0]
    mean, deviation = (
        torch.tensor(values).view(-1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) * (1 / deviation)


def build_klein(distilled=False):
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    ).eval()  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=SIZE, latent_channels=4,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    # Hidden states 9, 18 and 27 are read.
    return Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae,
        qwen3(Qwen3ForCausalLM, 8, 27, heads=1), chat_tokenizer(), transformer, is_distilled=distilled,
    )  # fmt: skip


def klein_loss(pipeline, samples, prompts, timesteps, noise):
    """As train_dreambooth_lora_flux2_klein.py, whose weighting is none."""
    hidden, text_ids = pipeline.encode_prompt(prompts)
    times, sigmas = places_of(pipeline.scheduler, timesteps)
    noisy = (1.0 - sigmas) * samples + sigmas * noise
    height, width = noisy.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image_ids = torch.stack([0 * rows, rows, columns, 0 * rows], -1).flatten(0, 1).expand(len(noisy), -1, -1)
    prediction = pipeline.transformer(
        hidden_states=noisy.flatten(2).transpose(1, 2), timestep=times / 1000, guidance=None,
        encoder_hidden_states=hidden, txt_ids=text_ids, img_ids=image_ids, return_dict=False,
    )[0]  # fmt: skip
    target = (noise - samples).flatten(2).transpose(1, 2)
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def klein_latents(vae, images, generator):
    """As train_dreambooth_lora_flux2_klein.py: patches, then normalised as by the batch norm."""
    patches = torch.nn.functional.pixel_unshuffle(vae.encode(images).latent_dist.mode(), 2)
    norm = vae.bn
    return torch.nn.functional.batch_norm(patches, norm.running_mean, norm.running_var, eps=vae.config.batch_norm_eps)


# Everything is tried with these.
FAMILIES = {
    "stable diffusion": Tiny(
        build_tiny_pipeline, "unet", stable_diffusion_loss, repository="CompVis/stable-diffusion-v1-4"
    ),  # fmt: skip
    "SDXL": Tiny(
        build_xl,
        "unet",
        xl_loss,
        repository="stabilityai/stable-diffusion-xl-base-1.0",
        variant="fp16",
    ),  # fmt: skip
    "SD3": Tiny(
        build_sd3,
        "transformer",
        sd3_loss,
        shares=logit_normal_shares,
        repository="stabilityai/stable-diffusion-3.5-medium",
        shards={"text_encoder_3": 2},
    ),  # fmt: skip
    "FLUX": Tiny(
        build_flux,
        "transformer",
        flux_loss,
        flux_call,
        settings={"resolution": SIZE},
        repository="black-forest-labs/FLUX.1-dev",
        shards={"transformer": 3, "text_encoder_2": 2},
    ),  # fmt: skip
    "Z-Image": Tiny(
        build_z_image,
        "transformer",
        z_image_loss,
        # What guidance changes is added, in place of taken.
        lambda guidance: {"guidance_scale": guidance - 1},
        latents=likeliest_latents,
        settings={"resolution": SIZE},
        repository="Tongyi-MAI/Z-Image",
        shards={"transformer": 2, "text_encoder": 2},
    ),
    "Sana": Tiny(
        build_sana,
        "transformer",
        sana_loss,
        lambda guidance: {"guidance_scale": guidance, "use_resolution_binning": False},
        size=32,
        latents=lambda vae, images, generator: vae.encode(images).latent * vae.config.scaling_factor,
        repository="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        shards={"text_encoder": 2},
    ),
    "Qwen-Image": Tiny(
        build_qwen,
        "transformer",
        qwen_loss,
        lambda guidance: {"true_cfg_scale": guidance, **({"negative_prompt": [" ", " "]} if guidance > 1 else {})},
        latents=qwen_latents,
        settings={"resolution": SIZE},
        repository="Qwen/Qwen-Image",
        shards={"transformer": 2},
    ),
    "FLUX.2 klein": Tiny(
        build_klein,
        "transformer",
        klein_loss,
        latents=klein_latents,
        settings={"resolution": SIZE},
        repository="black-forest-labs/FLUX.2-klein-base-4B",
        shards={"text_encoder": 2},
    ),
}
# Of a family of transformers, the layers of its blocks that an adapter is trained on unless somebody says otherwise.
_OWN = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
_JOINT = [*_OWN, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
ADAPTED = {
    "SD3": _JOINT,
    "FLUX": [*_JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"],
    "Z-Image": [name.replace("attn", "attention") for name in _OWN],
    "Sana": [name.replace("attn", attention) for name in _OWN for attention in ("attn1", "attn2")],
    "Qwen-Image": _JOINT,
    "FLUX.2 klein": [*_JOINT, "attn.to_qkv_mlp_proj", "attn.to_out"],
}
# Loss, sampling and Fisher information alone with these.
VARIANTS = {
    "stable diffusion, v": Tiny(lambda: build_tiny_pipeline("v_prediction"), "unet", stable_diffusion_loss),
    "SDXL, v": Tiny(lambda: build_xl("v_prediction"), "unet", xl_loss),
    "SDXL, guided by the empty prompt's words": Tiny(lambda: build_xl(zeros=False), "unet", xl_loss),
    "stable diffusion, LCM": Tiny(
        lambda: as_consistency_model(build_tiny_pipeline()),
        "unet",
        stable_diffusion_loss,
        lambda guidance: {"guidance_scale": 8.0},
    ),
    "SDXL, LCM": Tiny(
        lambda: as_consistency_model(build_xl()), "unet", xl_loss, lambda guidance: {"guidance_scale": 8.0}
    ),
    "SD3.5 medium": Tiny(
        lambda: build_sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
        "transformer",
        sd3_loss,
        shares=logit_normal_shares,
    ),
    "Sana, by a scheduler of Euler's": Tiny(
        lambda: build_sana(FlowMatchEulerDiscreteScheduler(shift=3.0)),
        "transformer",
        sana_loss,
        FAMILIES["Sana"].sampled,
        size=32,
    ),
    "SD3 without T5": Tiny(lambda: build_sd3(t5=False), "transformer", sd3_loss, shares=logit_normal_shares),
}
