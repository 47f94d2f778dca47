"""Which files of a pipeline hold its weights, and of which variant."""

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import read_json
from ..identity import fingerprint
from .names import HUB_TIMEOUT_SECONDS


def list_files(name_or_path: str, place: dict[str, Any]) -> list[str]:
    """The files of a pipeline, as paths relative to it; none where they are not known."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        if not place.get("local_files_only"):
            try:
                info = HfApi().model_info(name_or_path, revision=place.get("revision"), timeout=HUB_TIMEOUT_SECONDS)
            except Exception:  # it has just answered; what is wrong now comes to light in loading
                return []
            return [file.rfilename for file in info.siblings or []]
        known = try_to_load_from_cache(
            name_or_path, DiffusionPipeline.config_name, place.get("cache_dir"), place.get("revision")
        )
        if not isinstance(known, str):
            return []
        folder = Path(known).parent
    return [path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*"))]


# diffusion_pytorch_model.fp16.safetensors, model-00001-of-00002.safetensors, model.fp16-00001-of-00002.safetensors, and
# as earlier versions wrote it, model-00001-of-00002.fp16.safetensors
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?"
    r"(?:\.(?P<earlier>[\w-]+))?\.(?P<kind>safetensors|bin)"
)


_SHARD = re.compile(r"-\d+-of-\d+\.")


def _weights_of(files: Sequence[str], part: str) -> dict[str | None, list[str]]:
    """The weight files of a part of a pipeline by variant; safetensors where there are any."""
    found: dict[str | None, dict[str, list[str]]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        if folder == part and (match := _WEIGHTS.fullmatch(name)):
            found.setdefault(match["variant"] or match["earlier"], {}).setdefault(match["kind"], []).append(file)
    return {variant: kinds.get("safetensors") or kinds["bin"] for variant, kinds in found.items()}


def chosen_files(files: Sequence[str], part: str, variant: str | None) -> list[str]:
    """The weight files of a part that are loaded, and those that the index of its shards names."""
    weights = _weights_of(files, part)
    return weights.get(variant) or weights.get(None) or []


def weights_digests(folder: str | Path, parts: Iterable[str], variant: str | None) -> dict[str, str]:
    """Digests of the weights that files of a pipeline hold, whatever precision they are loaded in.

    Args:
        folder: The pipeline's.
        parts: Names of those that are asked for.
        variant: Of its weights.

    Returns:
        Part -> digest of its tensors; without parts that have no safetensors.
    """
    folder, found = Path(folder), {}
    files = list_files(str(folder), {})
    for part in parts:
        names = [name for name in chosen_files(files, part, variant) if name.endswith(".safetensors")]
        tensors = {}
        for name in names:
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    value = file.get_tensor(key)
                    digest = hashlib.blake2b(f"{key} {tuple(value.shape)} {value.dtype}".encode(), digest_size=16)
                    digest.update(memoryview(value.flatten().view(torch.uint8).numpy()))
                    tensors[key] = digest.hexdigest()
        if tensors:
            found[part] = fingerprint(tensors)
    return found


def lacking(parts: Mapping[str, Any], folder: str | Path, files: Sequence[str], variant: str | None) -> str | None:
    """What was drawn at random, or left empty, while a pipeline was loaded, because its files do not hold it; in a
    sentence.

    Args:
        parts: Of a pipeline, by name, as they were loaded.
        folder: Where from.
        files: As of `list_files`.
        variant: Of its weights.
    """
    for part, module in parts.items():
        if isinstance(module, PreTrainedTokenizerBase) and (lost := _lacking_of_tokenizer(module, Path(folder) / part)):
            return (
                f"{Path(folder) / part} lacks {' and '.join(lost)}, so that no word of a prompt would be read: "
                "download it again, or save it again"
            )
        chosen = [Path(folder) / name for name in chosen_files(files, part, variant)
                  if name.endswith(".safetensors") and (Path(folder) / name).is_file()]  # fmt: skip
        # With the safety checker nothing here is sampled.
        if not chosen or part == "safety_checker":
            continue
        indices = (Path(folder) / part).glob("*.safetensors.index*.json")
        named = {name for index in indices for name in read_json(index)["weight_map"].values()}
        # A shard that the index does not name is not read.
        chosen = [path for path in chosen if path.name in named or not _SHARD.search(path.name)]
        held: dict[str, torch.Tensor] = {}
        for name in chosen:
            with safe_open(name, "pt") as file:
                held |= {
                    key: torch.empty(file.get_slice(key).get_shape(), device="meta")
                    for key in file.keys()  # noqa: SIM118
                }
        if isinstance(module, ModelMixin):
            lost = _lacking_of_diffusers(module, held)
        elif isinstance(module, PreTrainedModel):
            lost = _lacking_of_transformers(module, held)
        else:
            continue
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            do = "download it again, or save it again"
            if any(".base_layer." in name for name in held):
                do = (
                    "it was saved while adapters were loaded, and is no whole model. Load its pipeline anew where it "
                    "came from, then pipeline.fuse_lora() and pipeline.unload_lora_weights(), and save that"
                )
            return f"{Path(folder) / part} lacks {lost[0]}{more}: {do}"
    return None


def _lacking_of_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Files of its vocabulary: one for all, or those of earlier versions."""
    names = dict(tokenizer.vocab_files_names)
    whole = names.pop("tokenizer_file", "tokenizer.json")
    if not folder.parent.is_dir() or (folder / whole).is_file() or any(folder.glob("*.model")):
        return []
    return [name for name in names.values() if not (folder / name).is_file()] if names else [whole]


def _lacking_of_diffusers(module: ModelMixin, held: dict[str, torch.Tensor]) -> list[str]:
    # Attention of old autoencoders has other names in files.
    module._fix_state_dict_keys_on_load(held)
    # Of weights of 4 bits a state has scales and tables too, which no file of plain weights holds.
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    # An index that names too few shards leaves parameters without values.
    return [name for name, value in module.state_dict().items() if name in own and (name not in held or value.is_meta)]


def _lacking_of_transformers(module: PreTrainedModel, held: dict[str, torch.Tensor]) -> list[str]:
    """As transformers itself tells it, which knows what is tied, renamed or needed by no one, of tensors without
    values."""
    if held.keys() >= module.state_dict().keys():
        return []
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        _, told = type(module).from_pretrained(
            None, config=module.config, state_dict=held, device_map="meta", output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return sorted(told["missing_keys"])


def only_variant(place: str, parts: Iterable[str], files: Sequence[str]) -> str | None:
    """The variant to load where some part has no plain weights."""
    variants: set[str] | None = None
    for part in parts:
        weights = _weights_of(files, part)
        if weights and None not in weights:
            known = {str(variant) for variant in weights}
            variants = known if variants is None else variants & known
    if variants is None:
        return None
    if len(variants) != 1:
        names = " or ".join(f"--variant {variant}" for variant in sorted(variants))
        raise ValueError(f"{place} has weights of variants only: " + (f"give {names}" if names else "of several"))
    (variant,) = variants
    warnings.warn(
        f"{place} has weights of the variant {variant} only: loaded as with --variant {variant}",
        stacklevel=4,
    )
    return variant
