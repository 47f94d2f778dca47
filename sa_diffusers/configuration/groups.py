"""The settings of an erasure, in groups. What a user types is their flat sum, `SelectiveAmnesiaConfig`."""

import os
import re
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Literal, get_args

from ..messages import shown
from ..samplers import SAMPLERS as _SAMPLERS
from .fields import Settings, flag

if TYPE_CHECKING:
    Sampler = str
else:
    Sampler = Literal[tuple(_SAMPLERS)]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Tracker = Literal["tensorboard", "wandb", "none"]
Precision = Literal["no", "fp16", "bf16"]
Weights = Literal["float32", "bfloat16", "float16"]
FisherType = Literal["float32", "bfloat16"]
Prediction = Literal["epsilon", "v_prediction"]
Blur = Literal["auto", "yes", "no"]
Components = Literal["all", "trained"]
FisherKind = Literal["gradient", "jacobian"]
FisherForm = Literal["diagonal", "rows_by_columns"]
Adapter = Literal["lora"]
Quantization = Literal["nf4", "fp8", "int8"]
AdapterFormat = Literal["diffusers", "kohya"]
SAMPLERS = tuple(_SAMPLERS)
LR_SCHEDULERS = get_args(Schedule)


def _multiple_of_8(name: str, value: int) -> None:
    if value < 8 or value % 8:
        raise ValueError(f"{name}={shown(value)} must be a positive multiple of 8 pixels")


def _inside(name: str, value: str) -> None:
    place = PureWindowsPath(value)  # it knows the separators of all systems
    if place.anchor or ".." in place.parts or not place.parts:
        raise ValueError(f'{name}="{shown(value)}" must be a folder inside the output folder, such as "logs"')


def _plain_name(name: str, value: str) -> None:
    if any(letter in value for letter in "/\\:") or value.startswith(".") or value != value.strip():
        raise ValueError(f'{name}="{shown(value)}" must be a name without slashes, such as "selective-amnesia"')


def _revision(name: str, value: str, also: str = "", example: str = "main") -> None:
    # It becomes a part of paths in the Hub's cache; a branch may hold a slash.
    if re.search(r"^[/.]|\.\.|\\" + also, value):
        raise ValueError(f'{name}="{shown(value)}" must be a name, such as "{example}", not a path')


def _variant(name: str, value: str) -> None:
    _revision(name, value, "|/", "fp16")


def no_file(name: str, value: str | os.PathLike) -> None:
    """Refuse a file where a folder is to be, before hours have gone into what it should hold.

    Raises:
        ValueError: It is one.
    """
    if os.path.isfile(value):
        raise ValueError(f"{name}={shown(str(value), 200)} is a file: choose a folder")


@dataclass
class ConceptSettings(Settings):
    """What to forget."""

    concept: list[str] = flag([], "concept(s) to forget, each in quotes", own=True)
    surrogate: list[str] = flag(
        [],
        "what each concept turns into: a prompt, a folder of images (a path with a slash), or uniform_noise; "
        "one for all concepts, or one for each",
        path=True,
        own=True,
    )
    concept_templates: list[str] = flag(
        ["{}"], "phrasings in which the concept is forgotten; {} stands for it (the paper: the bare concept)"
    )


@dataclass
class ModelSettings(Settings):
    """Model."""

    pretrained_model_name_or_path: str = flag(
        "CompVis/stable-diffusion-v1-4",
        "the base model: a folder, a name on the Hub, or a single-file checkpoint (.safetensors)",
        path=True,
        own=True,
    )
    single_file_config: str | None = flag(
        None,
        "pipeline of a single-file checkpoint's kind, a folder or a name on the Hub, whose configurations, tokenizers "
        "and further parts it takes (default: the one that diffusers tells by its tensors)",
        path=True,
        own=True,
        check=no_file,
    )
    revision: str | None = flag(None, "branch, tag or commit of the base model on the Hub", own=True, check=_revision)
    variant: str | None = flag(None, "variant of the weight files, such as fp16", check=_variant)
    cache_dir: str | None = flag(
        None, "where models from the Hub are kept (default: the Hub's own cache)", path=True, own=True, check=no_file
    )
    prediction_type: Prediction | None = flag(
        None, "what the denoiser predicts (default: as the base model's scheduler says)"
    )
    weights_dtype: Weights = flag(
        "float32",
        "precision that the base model's weights are held and saved in; what is trained is float32 while it is, and "
        "half precision implies mixed_precision",
    )
    no_t5: bool = flag(
        False, "load Stable Diffusion 3 without its T5 text encoder, the largest of its parts, and save it so"
    )
    train_distilled: bool = flag(
        False,
        "train a model that is distilled to few steps (Turbo, Lightning, schnell, LCM), which blurs what it draws in "
        "few; all is sampled in the steps of its use",
        own=True,
    )
    fuse_adapters: bool = flag(
        False,
        "fuse the adapters that the pipeline brings, active and as strong as they are, into its weights before "
        "anything is made; else such a pipeline is refused",
        own=True,
    )
    train_method: str = flag(
        "full",
        "parameters to train: full, xattn (cross-attention only), noxattn (unconditional layers only), of transformers "
        "without cross-attention also text_qk, joint_kv, image_kv, attention or text_embedding, or a regular "
        "expression on parameter names",
    )
    adapter: Adapter | None = flag(
        None,
        "train a low-rank adapter on the selected linear and convolutional layers in place of their weights: a small "
        "file, which can be switched on and off",
        why_no_other="the update of DoRA and of other kinds is no product of two matrices, on which the penalty of "
        "elastic weight consolidation rests. Choose lora, or leave adapter out to train the weights themselves",
    )
    lora_rank: int = flag(8, "rank of the adapter, and its alpha", at_least=1, at_most=65_536)
    lora_format: AdapterFormat = flag(
        "diffusers",
        "kohya writes the adapter a second time, under the names that ComfyUI and AUTOMATIC1111 read (Stable "
        "Diffusion 1, 2 and SDXL)",
    )
    base_quantization: Quantization | None = flag(
        None,
        "hold the linear layers of the denoiser that an adapter is trained on in 4 bits (nf4, on CUDA) or 8, as they "
        "are loaded; all is sampled and measured on what is left of them",
    )
    resolution: int | None = flag(
        None, "height and width of images in pixels (default: the model's own)", at_most=10_000, check=_multiple_of_8
    )


@dataclass
class SampleSettings(Settings):
    """Samples from the frozen model."""

    num_surrogate_images: int = flag(200, "surrogate images, over all concepts", at_least=1, at_most=500_000)
    concept_share: float = flag(
        0.5,
        "share of the surrogate images in whose place the concept's own are taken, where the frozen model, or the mean "
        "of noise, says what is to be predicted on them too (0: the surrogate's alone, as in the paper)",
        at_least=0,
        at_most=1,
    )
    num_replay_images: int = flag(400, "replay images", at_least=0, at_most=1_000_000)
    num_neighbour_images: int = flag(
        100, "further replay images, of the replay prompts that drift most in a training's first steps", at_least=0,
        at_most=1_000_000,
    )  # fmt: skip
    replay_prompts: str = flag(
        "diverse",
        "prompts to remember: diverse, garments or icons (built in), a text file with one a line, a CSV, TSV, JSON, "
        "JSON lines or parquet file as FILE or FILE:COLUMN, or a dataset as NAME:COLUMN or NAME:COLUMN:SPLIT",
        path=True,
    )
    drop_naming_prompts: bool = flag(
        False, "leave out replay prompts that name the concept, and count them, in place of refusing them", own=True
    )
    replay_surrogates: bool = flag(
        True, "replay the surrogate's samples under the surrogate's own prompt too (the paper does not)"
    )
    replay_unconditional_share: float = flag(
        0.1,
        "share of the replay images that belong to the empty prompt, which guidance leans on at every step",
        at_least=0,
        below=1,
    )
    sampler: Sampler = flag(
        "ddim",
        "sampler; with _logsnr its steps are equal in log-SNR, not in time, which suits pixels (rectified flow: "
        "flow_euler; Sana: flow_dpmsolver++; models that are distilled to few steps: as they are used)",
    )
    num_inference_steps: int = flag(
        50, "steps of the sampler (SD3, FLUX.1: 28, Sana: 20, distilled models: 4 or 8)", at_least=1, at_most=10_000
    )
    guidance_scale: float = flag(
        7.5,
        "classifier-free guidance (SDXL: 5, SD3: 7, FLUX.1: 1, FLUX.2 klein and Qwen-Image: 4, Sana: 4.5, Z-Image: 6)",
        at_least=0,
        at_most=10_000,
    )
    surrogate_guidance_scale: float | None = flag(
        None, "guidance of the surrogate images (default: as above)", at_least=0, at_most=10_000
    )
    replay_guidance_scale: float | None = flag(
        None,
        "guidance of the replay images; 1 draws from the model's own distribution (default: as above)",
        at_least=0,
        at_most=10_000,
    )
    sample_batch_size: int = flag(8, "images sampled at once", at_least=1, at_most=65_536)
    artifacts_dir: str | None = flag(
        None,
        "where samples and Fisher information are kept and reused (default: $SA_DIFFUSERS_CACHE or "
        "~/.cache/sa_diffusers)",
        path=True,
        own=True,
        check=no_file,
    )


@dataclass
class FisherSettings(Settings):
    """Fisher information and elastic weight consolidation."""

    fisher: str | None = flag(None, "saved Fisher information to use: a folder or a name on the Hub", path=True)
    fisher_kind: FisherKind = flag(
        "gradient", "what is squared: the gradient of the ELBO (the paper), or the jacobian of the predictions"
    )
    fisher_form: FisherForm = flag(
        "diagonal",
        "how an adapter's penalty takes it: entry by entry, or as a product of rows and columns, which needs next to "
        "no memory and knows less",
    )
    num_fisher_samples: int = flag(
        50, "samples that the Fisher information is averaged over", at_least=1, at_most=1_000_000
    )
    fisher_timesteps: int | None = flag(
        5, "timesteps of each sample whose gradients are summed; 0 takes all", at_least=0, at_most=100_000
    )
    fisher_batch_size: int = flag(10, "timesteps in one backward pass", at_least=1, at_most=65_536)
    fisher_concept_share: float | None = flag(
        0.1,
        "share of the Fisher samples that are the concept's own; null (the paper) is uniform over all classes, or, "
        "where prompts are text, takes the replay prompts alone",
    )
    fisher_dtype: FisherType = flag(
        "float32", "precision that training holds the Fisher information in; bfloat16 takes half the memory"
    )
    fisher_on_cpu: bool = flag(
        False,
        "keep the Fisher information in the CPU's memory and bring each weight's part to the device when it is needed: "
        "no memory there, slower steps",
    )
    ewc: float = flag(
        1.0,
        "strength of elastic weight consolidation, calibrated for each model: at 1 its penalty counts as much as the "
        "rise of the remembered prompts' loss that it stands for; 0 leaves it out",
        at_least=0,
        at_most=10**9,
    )
    ewc_weight: float | None = flag(
        None,
        "weight of sum F (theta - theta*)^2 in place of the calibrated one; half of the paper's lambda, and of no "
        "meaning in another model",
        at_least=0,
        at_most=10**15,
    )
    replay_weight: float | None = flag(
        None,
        "weight of the replay loss (gamma); 0 leaves replay out (default: 1, and more while the rest drifts too far)",
        at_least=0,
        at_most=10**15,
    )


@dataclass
class TrainingSettings(Settings):
    """Training."""

    output_dir: str | None = flag(
        None, "output folder (default: named after the concept)", path=True, own=True, check=no_file
    )
    save_components: Components = flag(
        "all",
        "what is saved: the whole pipeline, or what was trained alone, which is loaded into the base model by the "
        "card's snippet",
        own=True,
    )
    overwrite_output_dir: bool = flag(False, "replace an earlier erasure in the output folder", own=True)
    seed: int = flag(0, "seed of everything random", at_least=0, at_most=2**64 - 1)
    max_train_steps: int = flag(
        2_000, "optimiser steps at the most; the training stops when it is done", at_least=1, at_most=100_000_000
    )
    forget_target: float | None = flag(
        0.5,
        "look at images, which say when the training stops, once the probes say that so much of the concept is "
        "forgotten, 1 being all, or after 120 steps; one above the default must be reached as well. null, in a file, "
        "trains all steps",
        above=0,
        at_most=1,
    )
    drift_tolerance: float | None = flag(
        0.1,
        "stop only while no more than a tenth of the remembered prompts, and no neighbour, has drifted farther than "
        "this, in units of what a prompt changes; null, in a file, trains all steps",
        above=0,
        at_most=1_000,
    )
    num_probe_images: int = flag(
        20,
        "held-out images of the concept, and of its surrogate, on which the training measures itself; 0 leaves the "
        "probes out, and with them all that goes by them",
        at_least=0,
        at_most=100_000,
    )
    timestep_draws: int = flag(
        3,
        "timesteps drawn for each sample of a batch, of which the noisiest is trained at: what an image shows is "
        "settled where there is most noise (1: the model's own density, as in the paper)",
        at_least=1,
        at_most=100,
    )
    train_batch_size: int = flag(
        4, "surrogate images and replay images, each, in a batch of one device", at_least=1, at_most=65_536
    )
    gradient_accumulation_steps: int = flag(2, "batches summed before an optimiser step", at_least=1, at_most=65_536)
    gradient_checkpointing: bool = flag(False, "trade time for memory in the backward pass")
    target: Literal["noise", "frozen"] = flag(
        "frozen",
        "regression target: the frozen model's own prediction for the surrogate prompt and for replay, or the noise "
        "(the paper)",
    )
    condition_dropout: float | None = flag(
        None,
        "share of images trained under the empty prompt: replay images, surrogates that no prompt drew (noise, say), "
        "and with the frozen target those that one did (default: 0.2 where the model has an empty prompt, on which "
        "guidance leans)",
        at_least=0,
        below=1,
    )
    naive: bool = flag(
        False,
        "lower the ELBO of the concept's own samples (eq. 3 of the paper, its negative example) in place of raising "
        "that of the surrogate's",
        own=True,
    )
    snr_gamma: float | None = flag(None, "min-SNR weighting of the losses; 5.0 is usual", above=0)
    noise_offset: float = flag(0.0, "offset of the noise, constant over an image's pixels", at_least=0, at_most=1_000)
    learning_rate: float | None = flag(
        None, "learning rate of AdamW (default: Prodigy, which finds one for each model)", above=0
    )
    scale_lr: bool = flag(False, "multiply the learning rate by devices x accumulation x batch size")
    lr_scheduler: Schedule = flag("constant", "schedule of the learning rate")
    lr_warmup_steps: int = flag(0, "steps of warm-up", at_least=0, at_most=100_000_000)
    lr_num_cycles: int = flag(1, "restarts of cosine_with_restarts", at_least=1, at_most=1_000_000)
    lr_power: float = flag(1.0, "power of polynomial", above=0, at_most=1_000)
    use_8bit_adam: bool = flag(False, "8-bit Adam of bitsandbytes")
    adam_beta1: float = flag(0.9, "beta 1 of Adam", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "beta 2 of Adam", at_least=0, below=1)
    adam_weight_decay: float = flag(
        0.0, "weight decay of AdamW (it pulls against the EWC term)", at_least=0, at_most=1_000
    )
    adam_epsilon: float = flag(1e-8, "epsilon of Adam", above=0, at_most=100)
    max_grad_norm: float | None = flag(
        None,
        "clip the gradient, the EWC term's included, to this norm (default: to three times its running median)",
        above=0,
    )
    use_ema: bool = flag(True, "average the weights over the steps and keep the average")
    ema_decay: float = flag(0.95, "decay of the average", at_least=0, below=1)
    ema_warmup: bool = flag(
        True,
        "let the decay grow from 0 over the first steps; without, the average starts at the base model's weights and "
        "decays at one rate (the paper)",
    )
    mixed_precision: Precision | None = flag(None, "no, fp16 or bf16 (default: as `accelerate config` says)")
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere GPUs and newer")
    enable_xformers_memory_efficient_attention: bool = flag(False, "attention of xformers")
    checkpointing_steps: int = flag(500, "steps between checkpoints", at_least=1, at_most=100_000_000)
    checkpointing_minutes: float = flag(
        5.0,
        "beside those, a checkpoint every tenth of the training, or every 25 steps where it stops by itself, if the "
        "last is so many minutes old or writing one takes next to nothing",
    )
    checkpoints_total_limit: int | None = flag(2, "checkpoints kept", at_least=1, at_most=100_000_000)
    resume_from_checkpoint: str | None = flag(
        "latest",
        "latest goes on where this very run stopped, no starts over, a checkpoint's folder goes on from that one",
        path=True,
        own=True,
    )


@dataclass
class ReportSettings(Settings):
    """Validation, evaluation and tracking."""

    validation_prompts: list[str] = flag([], "prompts sampled during training", own=True)
    validation_steps: int = flag(100, "steps between validation images", at_least=1, at_most=100_000_000)
    num_validation_images: int = flag(4, "validation images for each prompt", at_least=1, at_most=10_000)
    classifier: str | None = flag(
        None, "image classifier that scores the result: a folder or a name on the Hub", path=True
    )
    reference_features: str | None = flag(
        None, "file with the features of real images, for Fréchet distances in the classifier's features", path=True
    )
    clip: str | None = flag(
        None,
        "CLIP model that scores the result where there is no classifier: a folder, a name on the Hub, or none "
        "(default: openai/clip-vit-large-patch14 if it lies in the Hub's local cache)",
        path=True,
        own=True,
    )
    num_eval_images: int = flag(
        60,
        "images for each row of the evaluation; from 60 on a row of a concept has 100 at least, of which four may show "
        "it; fewer than 35 cannot show that it is gone",
        at_least=1,
        at_most=100_000,
    )
    eval_templates: list[str] = flag(
        [],
        "phrasings of the evaluation that no training saw; {} stands for the concept (default, where prompts are text: "
        "built-in ones)",
    )
    eval_seed: int = flag(1_000_000, "first seed of the evaluation's images", at_least=0, at_most=2**63)
    blur: Blur = flag(
        "auto", "blur every picture that is written: auto does where what is erased is nudity or of its kind", own=True
    )
    require_forgotten: bool = flag(
        False, "end with exit code 3, and push nothing, unless the verdict is that every concept is forgotten", own=True
    )
    report_to: Tracker | None = flag(
        None, "tracker of the losses (default: tensorboard if it is installed, else none)", own=True
    )
    logging_dir: str = flag(
        "logs", "folder of the tracker, inside the output folder", path=True, own=True, check=_inside
    )
    logging_steps: int = flag(10, "steps between entries of the tracker", at_least=1, at_most=100_000_000)
    tracker_project_name: str = flag("selective-amnesia", "project name of the tracker", own=True, check=_plain_name)


@dataclass
class HubSettings(Settings):
    """Hub."""

    push_to_hub: bool = flag(False, "upload the output folder to the Hub", own=True)
    hub_model_id: str | None = flag(None, "name on the Hub (default: the output folder's)", own=True)
    hub_private_repo: bool = flag(False, "make the repository on the Hub private", own=True)
