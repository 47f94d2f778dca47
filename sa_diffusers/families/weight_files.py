"""Which files of a pipeline hold its weights, and of which variant."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import safe_open

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


def lacking(parts: Mapping[str, Any], folder: str | Path, files: Sequence[str], variant: str | None) -> str | None:
    """What diffusers has drawn at random, because the files that it loaded a part from do not hold it; in a sentence.

    Args:
        parts: Of a pipeline, by name, as they were loaded.
        folder: Where from.
        files: As of `list_files`.
        variant: Of its weights.
    """
    for part, module in parts.items():
        chosen = [name for name in chosen_files(files, part, variant)
                  if name.endswith(".safetensors") and (Path(folder) / name).is_file()]  # fmt: skip
        if not isinstance(module, ModelMixin) or not chosen:
            continue
        held: dict[str, None] = {}
        for name in chosen:
            with safe_open(Path(folder) / name, "pt") as file:
                held |= dict.fromkeys(file.keys())
        # Attention of old autoencoders has other names in files.
        module._fix_state_dict_keys_on_load(held)
        # Of weights of 4 bits a state has scales and tables too, which no file of plain weights holds.
        own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        if lost := [name for name in module.state_dict() if name in own and name not in held]:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            do = "download it again, or save it again"
            if any(".base_layer." in name for name in held):
                do = (
                    "it was saved while adapters were loaded, and is no whole model. Load its pipeline anew where it "
                    "came from, then pipeline.fuse_lora() and pipeline.unload_lora_weights(), and save that"
                )
            return f"{Path(folder) / part} lacks {lost[0]}{more}: {do}"
    return None


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
