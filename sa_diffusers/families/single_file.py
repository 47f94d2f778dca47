"""Checkpoints that are one file: which pipeline they are of, and what of it they hold."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from safetensors import safe_open

from ..messages import shown
from ..weights import weights_fault
from .base import Family

# How checkpoints of whole models call their autoencoder.
_AUTOENCODERS = ("first_stage_model.", "vae.")
_DENOISERS = ("model.diffusion_model.", "diffusion_model.")
# And their text encoders: CLIPs as they come in their pipelines, and a T5.
_CLIPS = (
    ("cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    ("conditioner.embedders.1.model.", "text_encoders.clip_g."),
)
_T5 = ("text_encoders.t5xxl.",)
_ADAPTERS = (".lora_A.", ".lora_down.", ".lora_up.", ".lora.down.", "lora_unet_", "lora_te")
_CONFIGURATIONS = ("*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model")
SUFFIX = ".safetensors"


def is_single_file(name_or_path: str) -> bool:
    """Whether a model is a file that is read as a checkpoint."""
    return name_or_path.lower().endswith(SUFFIX) and Path(name_or_path).is_file()


def tensors_of(path: str) -> dict[str, torch.Tensor]:
    """Name -> tensor without values, of a checkpoint whose weights are not read.

    Raises:
        ValueError: The file is damaged, or holds an adapter.
    """
    if fault := weights_fault(path):
        raise ValueError(fault)
    with safe_open(path, framework="pt") as file:
        tensors = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    if any(mark in name for name in tensors for mark in _ADAPTERS):
        raise ValueError(
            f"{path} is an adapter (LoRA), not a model: load the model, then call pipeline.load_lora_weights, "
            "pipeline.fuse_lora and pipeline.save_pretrained, and give the folder that is saved so"
        )
    return tensors


def guessed_pipeline(path: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """The name on the Hub of a pipeline whose configurations a checkpoint has, as diffusers tells it by its tensors.

    Raises:
        ValueError: It cannot be told.
    """
    try:
        name = fetch_diffusers_config(dict(tensors))["pretrained_model_name_or_path"]
    except Exception:  # it looks for tensors, and compares sizes and values, of dozens of kinds
        name = None
    # What diffusers does not know it takes for Stable Diffusion 1.
    known = "stable-diffusion-v1" not in str(name) or any(key.startswith(_DENOISERS) for key in tensors)
    if name is None or not known:
        some = shown(", ".join(list(tensors)[:3]))
        raise ValueError(
            f'pretrained_model_name_or_path="{shown(path, 200)}": which model it is cannot be told from its tensors '
            f"({some}): give with --single_file_config the folder, or the name on the Hub, of a pipeline of the same "
            "kind, or the folder of a whole pipeline in place of the file"
        )
    return name


def holds_whole_model(tensors: Mapping[str, torch.Tensor], kind: type[DiffusionPipeline]) -> bool:
    """Whether a pipeline's class reads the file by itself; else it holds the denoiser, beside an autoencoder or not."""
    texts = tuple(prefix for prefixes in (*_CLIPS, _T5) for prefix in prefixes)
    has_text = any(name.startswith(texts) for name in tensors)
    return hasattr(kind, "from_single_file") and holds_autoencoder(tensors) and has_text


def holds_autoencoder(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint holds an autoencoder."""
    return any(name.startswith(_AUTOENCODERS) for name in tensors)


def lacking_encoders(tensors: Mapping[str, torch.Tensor], parts: Mapping[str, list]) -> list[str]:
    """Names of a pipeline's text encoders that a checkpoint does not hold, whole as it is else."""
    encoders = sorted(name for name in parts if name.startswith("text_encoder"))
    names: dict[str, tuple[str, ...]] = {name: _T5 for name in encoders if parts[name][1].startswith("T5")}
    names |= zip((name for name in encoders if parts[name][1].startswith("CLIPText")), _CLIPS, strict=False)
    return [name for name in encoders if not any(key.startswith(names.get(name, ())) for key in tensors)]


def load_whole(
    path: str, kind: type[DiffusionPipeline], configurations: Path, given: Mapping[str, Any], options: dict[str, Any]
) -> DiffusionPipeline:
    """The pipeline of a checkpoint.

    Args:
        path: The checkpoint.
        kind: The pipeline's class.
        configurations: A folder with those of such a pipeline, and with its tokenizers.
        given: Parts that come from elsewhere, or are left out.
        options: How weights are loaded.
    """
    taken = inspect.signature(kind.__init__).parameters
    # Checkpoints hold no safety checker, and this package draws without.
    left_out = {name: None for name in ("safety_checker", "feature_extractor") if name in taken}
    if "requires_safety_checker" in taken:
        left_out["requires_safety_checker"] = False  # type: ignore[assignment]
    return kind.from_single_file(
        path, config=str(configurations), local_files_only=True, **options, **left_out, **given
    )


def denoiser_class(path: str, family: type[Family] | None, parts: Mapping[str, list]) -> Any:
    """The class of the part that a checkpoint holds which holds no more.

    Raises:
        ValueError: diffusers reads no single file of it.
    """
    name = parts.get(getattr(family, "denoiser", ""), [None, ""])[1]
    kind = getattr(diffusers, name, None)
    if not hasattr(kind, "from_single_file"):
        raise ValueError(
            f'pretrained_model_name_or_path="{shown(path, 200)}": diffusers reads no single file of '
            f"{shown(name) if name else 'this kind of model'}: give the folder of a pipeline, or its name on the Hub"
        )
    return kind


def load_part(path: str, kind: Any, part: str, configurations: Path, options: dict[str, Any]) -> torch.nn.Module:
    """A part that a checkpoint holds.

    Args:
        path: The checkpoint.
        kind: Its class.
        part: What its pipeline calls it.
        configurations: A folder with those of such a pipeline.
        options: How weights are loaded.
    """
    return kind.from_single_file(path, config=str(configurations), subfolder=part, local_files_only=True, **options)


def configurations_of(name_or_path: str, place: Mapping[str, Any]) -> Path:
    """The folder with a pipeline's configurations and tokenizers; of one on the Hub these alone are fetched."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    return Path(snapshot_download(name_or_path, allow_patterns=list(_CONFIGURATIONS), **place))
