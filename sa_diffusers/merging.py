"""From an adapter to a whole pipeline, and from the weights of an erased pipeline to an adapter."""

import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .configuration import (
    BASE_DEFAULTS_NAME,
    CONFIG_NAME,
    ENDING_NAME,
    FISHER_CONFIG_NAME,
    HISTORY_NAME,
    MERGED_NAME,
    inherited_defaults,
)
from .evaluation.erased import erasure_settings, fused_on_record, is_of_other_weights
from .families import SUPPORTED_PIPELINES, Objective, load_pipeline, objective_for
from .families.adapters import (
    adapter_layers,
    check_takes_adapters,
    find_adapter,
    fuse_adapter,
    header_list,
    load_adapter,
    read_header,
    save_adapter,
)
from .families.digests import fingerprint_module
from .families.trained import told_variant
from .files import check_writable, new_folder, write_json
from .hub import adapter_header, drop_local_names
from .output_folder import check_written, write_digests
from .publish import write_model_card
from .version import __version__


@dataclass(frozen=True)
class Extracted:
    """What an adapter holds of the difference between two models' weights.

    Attributes:
        layers: How many layers it is on.
        kept: The share of the whole difference, as a sum of squares, that is in it, in [0, 1].
        outside: The share in parameters that no adapter holds: biases, norms, embeddings, convolutions of groups.
        rank: Of the adapter: what was asked for, or the highest that any of the layers can have.
    """

    layers: int
    kept: float
    outside: float
    rank: int

    @property
    def sentence(self) -> str:
        text = f"{self.kept:.1%} of the update (sum of squares), at rank {self.rank} on {self.layers} layers"
        return text + (f"; {self.outside:.1%} is in parameters that take no adapter" if self.outside else "")


def merge_adapter(
    adapter: str | Path, output_dir: str | Path, base: str | None = None, single_file_config: str | None = None
) -> None:
    """Write the base model with an adapter fused into its weights, for `DiffusionPipeline.from_pretrained`, with a
    model card.

    Args:
        adapter: A folder that an erasure with an adapter wrote, or its name on the Hub.
        output_dir: Empty, or not there.
        base: The base model, not quantised. Default: as the adapter's settings say. It is loaded in the precision that
            the adapter was trained beside (`weights_dtype`), and written in it.
        single_file_config: What lends a base model that is a single file its configurations; see `load_pipeline`.
            Default: as the adapter's settings say.

    Raises:
        ValueError: There is no adapter of an erasure, no base model, or the two do not belong together; or the adapter
            is not as it was written, or the folder is not empty.
    """
    name, output_dir = str(adapter), Path(output_dir)
    _check_empty(output_dir)
    check_written(name)
    file = find_adapter(name)
    if file is None:
        raise ValueError(f"{name} holds no adapter (no pytorch_lora_weights.safetensors, or a whole pipeline)")
    header = read_header(file)
    if "sa_diffusers_version" not in header and not erasure_settings(name):
        # Its card would say that it was trained to forget.
        raise ValueError(
            f"{name} does not say that an erasure made it: fuse it in Python, with pipeline.load_lora_weights(), "
            "pipeline.fuse_lora(), pipeline.unload_lora_weights() and pipeline.save_pretrained()"
        )
    settings = _settings_of(name, base, single_file_config)
    objective = _base_of(settings, base, name, header_list(header, "fused_adapters"))
    so = "whether it forgets on these too, only an evaluation says"
    if held := settings.get("base_quantization"):
        warnings.warn(
            f"{name} was trained on the base model quantised to {held}, and goes into its own weights: {so}",
            stacklevel=2,
        )
    else:
        _warn_of_other_weights(objective, name, so)
    load_adapter(objective, file)
    fuse_adapter(objective)
    with new_folder(output_dir, shared=False) as staging:
        objective.save(staging)
        drop_local_names(staging)
        _tell(staging, settings, output_dir)
        for told in (HISTORY_NAME, ENDING_NAME, FISHER_CONFIG_NAME):
            if (Path(name) / told).is_file():
                shutil.copyfile(Path(name) / told, staging / told)
        # It may be published: no folder of this machine is named.
        write_json(staging / MERGED_NAME, {"adapter": Path(name).resolve().name if Path(name).is_dir() else name})
        write_model_card(staging, output_dir.resolve().name)
        write_digests(staging)


def extract_adapter(
    erased: str | Path,
    output_dir: str | Path,
    rank: int = 8,
    base: str | None = None,
    single_file_config: str | None = None,
) -> Extracted:
    """Write the difference between an erased pipeline and its base as an adapter: of each layer's difference the
    nearest matrix of a rank, by its singular values. A model card goes beside it.

    Args:
        erased: A folder that an erasure of weights wrote, or its name on the Hub.
        output_dir: Empty, or not there.
        rank: Of the adapter, at least 1; no higher one is written than some layer can have.
        base: The base model. Default: as the erased one's settings say.
        single_file_config: As of `merge_adapter`.

    Returns:
        How much of the difference it holds.

    Raises:
        ValueError: The models are not of one kind or do not differ, the erased one is not as it was written, or the
            folder is not empty.
    """
    name, output_dir = str(erased), Path(output_dir)
    if rank < 1:
        raise ValueError(f"lora_rank={rank} must be at least 1")
    _check_empty(output_dir)
    check_written(name)
    if find_adapter(name) is not None:
        raise ValueError(f"{name} holds an adapter already: give an erased pipeline")
    settings = _settings_of(name, base, single_file_config)
    before = _base_of(settings, base, name)
    check_takes_adapters(before)
    _warn_of_other_weights(before, name, "the difference to these is not the work of the erasure alone")
    after = _objective(name, settings)
    ours, theirs = (dict(objective.module.named_parameters()) for objective in (before, after))
    if {key: value.shape for key, value in ours.items()} != {key: value.shape for key, value in theirs.items()}:
        raise ValueError(f"{name} and its base model have other parameters: give the model that it came from as --base")
    sizes = adapter_layers(before.module, ours).sizes
    rank = min(rank, max(map(min, sizes.values())))
    state, extracted = _factorised(ours, theirs, list(sizes), rank)
    pipeline = before.pipeline  # type: ignore[attr-defined]
    place, revision = settings["pretrained_model_name_or_path"], settings.get("revision")
    header = adapter_header(
        settings.get("concept", []), settings.get("surrogate", []), place, revision, type(pipeline).__name__,
        told_variant(place, pipeline.components, revision, settings.get("variant")),
    )  # fmt: skip
    with new_folder(output_dir, shared=False) as staging:
        save_adapter(before, state, rank, staging, {**header, "share_of_update": f"{extracted.kept:.4f}"})
        # The erasure was one of weights, and is repeated so.
        _tell(staging, {**settings, "lora_rank": rank}, output_dir)
        write_model_card(staging, output_dir.resolve().name)
        write_digests(staging)
    return extracted


@torch.no_grad()
def _factorised(
    ours: dict[str, Any], theirs: dict[str, Any], layers: list[str], rank: int
) -> tuple[dict[str, torch.Tensor], Extracted]:
    """A and B of every layer that differs, and how much they hold."""
    state: dict[str, torch.Tensor] = {}
    whole, inside, kept = 0.0, 0.0, 0.0
    taking = {f"{name}.weight": name for name in layers}
    for key, value in ours.items():
        difference = theirs[key].float() - value.float()
        size = difference.double().square().sum().item()
        whole += size
        if key not in taking or not size:
            continue
        inside += size
        left, values, right = torch.linalg.svd(difference.flatten(1), full_matrices=False)
        count = min(rank, len(values))
        kept += values[:count].double().square().sum().item()
        roots = values[:count].sqrt()
        first, second = torch.zeros(rank, right.shape[1]), torch.zeros(len(left), rank)
        first[:count], second[:, :count] = roots[:, None] * right[:count], left[:, :count] * roots
        further = [1] * (difference.dim() - 2)
        state[f"{taking[key]}.lora_A.weight"] = first.view(rank, *difference.shape[1:])
        state[f"{taking[key]}.lora_B.weight"] = second.view(len(left), rank, *further)
    if not state:
        raise ValueError("the two models differ in no layer that takes an adapter: is it the right base model?")
    return state, Extracted(len(state) // 2, kept / whole, 1 - inside / whole, rank)


def _settings_of(name: str, base: str | None, single_file_config: str | None) -> dict[str, Any]:
    """Those of an erasure, but for what is told otherwise."""
    settings = erasure_settings(name)
    if base is not None and base != settings.get("pretrained_model_name_or_path"):
        # Another model's revision and variant are not known.
        settings |= {"pretrained_model_name_or_path": base, "revision": None, "variant": None}
    return {**settings, "single_file_config": single_file_config} if single_file_config else settings


def _base_of(settings: dict[str, Any], base: str | None, name: str, fused: Sequence[str] = ()) -> Objective:
    place = settings.get("pretrained_model_name_or_path")
    told = ", ".join(fused) or fused_on_record(name, settings)
    if base is None and told:
        raise ValueError(
            f"{name} was made from {place} with adapters fused into it ({told}), which is another model than "
            "the one of that name: fuse them there, save that pipeline, and give its folder as --base"
        )
    if place is None:
        raise ValueError(f"{name} does not say which model it was made from: give it as --base")
    own = {key: settings.get(key) for key in ("revision", "variant", "single_file_config")}
    try:
        return _objective(place, settings, **own, no_t5=bool(settings.get("no_t5")))
    except (ValueError, ConnectionError) as error:
        # In the words of these programs' flags.
        told = str(error).replace("--pretrained_model_name_or_path", "--base")
        raise type(error)(told.replace("pretrained_model_name_or_path=", "--base ")) from error


def _objective(place: str, settings: dict[str, Any], **options: Any) -> Objective:
    """A model as the erasure held it: in another precision each of its weights would be another."""
    dtype = {"weights_dtype": settings.get("weights_dtype") or "float32"}
    pipeline = load_pipeline(place, kinds=SUPPORTED_PIPELINES, **options, **dtype)
    return objective_for(pipeline, settings.get("prediction_type"), **dtype)


def _warn_of_other_weights(base: Objective, name: str, so: str) -> None:
    if is_of_other_weights(fingerprint_module(base.module), name):
        warnings.warn(
            f"{name} was made from other weights than those of this base model (by their digests): {so}", stacklevel=3
        )


def _check_empty(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"output_dir={folder} holds something already: choose an empty folder")
    if folder.is_mount():
        raise ValueError(f"output_dir={folder} is where a disk is mounted: choose a folder in it")
    # It is made beside, and renamed.
    check_writable(Path(os.path.realpath(folder)).parent, "output_dir")


def _tell(staging: Path, settings: dict[str, Any], folder: Path) -> None:
    """Write the erasure's settings, and what the base model's own folder recommends."""
    write_json(staging / CONFIG_NAME, {"sa_diffusers_version": __version__, **settings})
    defaults = inherited_defaults(settings["pretrained_model_name_or_path"], folder)
    if defaults:
        write_json(staging / BASE_DEFAULTS_NAME, defaults)
