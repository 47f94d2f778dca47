"""Folders that hold what was trained alone; the rest of the pipeline is that of the base model, which they name."""

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

from ..files import Recorded, read_json, write_json
from ..messages import shown
from .names import TRAINED_NAME, resolved_revision
from .weight_files import list_files, only_variant, weights_digests

FORMAT_VERSION = 1


def holds_trained(folder: str | Path) -> bool:
    """Whether a folder holds what was trained alone."""
    folder = Path(folder)
    return (folder / TRAINED_NAME).is_file() and not (folder / DiffusionPipeline.config_name).is_file()


def read_trained(name_or_path: str, place: Mapping[str, Any]) -> Recorded | None:
    """What a folder or repository that holds what was trained alone says of the rest; None if it is none.

    Args:
        name_or_path: The folder, or the name on the Hub.
        place: Of the Hub: `revision`, `cache_dir`, `local_files_only`.

    Returns:
        `base_model`, `base_revision`, `variant`, `no_t5`; `components`, name -> library and class of what is there;
        `pipeline`, the index of the whole; `base_weights`, name -> digest of parts of a base model in a folder.

    Raises:
        ValueError: The file that says so is damaged.
    """
    file = Path(name_or_path) / TRAINED_NAME
    if Path(name_or_path).is_dir():
        if not holds_trained(name_or_path):
            return None
    else:
        with contextlib.suppress(Exception):  # a repository without it is an ordinary one; loading says what is wrong
            file = Path(hf_hub_download(name_or_path, TRAINED_NAME, **place))
        if not file.is_file():
            return None
    values = read_json(file)
    whole = isinstance(values, dict) and isinstance(values.get("base_model"), str)
    if not whole or not all(isinstance(values.get(name), dict) for name in ("components", "pipeline")):
        raise ValueError(f"{file} does not say what it belongs to: download or save the folder again")
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} is of format {shown(str(values.get('format_version')))}, and this version reads {FORMAT_VERSION}: "
            "update sa_diffusers, or save the folder again"
        )
    # Without any of them it would be the base model that is taken for the erased one.
    kinds = list(values["components"].values())
    if not kinds or not all(isinstance(kind, list) and len(kind) == 2 for kind in kinds):
        raise ValueError(f"{file} does not say what the folder holds: download or save the folder again")
    return Recorded(values)


def loads_in_diffusers(name_or_path: str) -> bool:
    """Whether plain diffusers loads a model by its name alone: no single file, and nothing that was trained alone."""
    if Path(name_or_path).is_file() or name_or_path.lower().endswith(".safetensors"):
        return False
    with contextlib.suppress(ValueError):
        return read_trained(name_or_path, {"local_files_only": True}) is None
    return True


def check_base(record: Recorded, variant: str | None) -> None:
    """Refuse a base model in a folder whose other parts are no longer those that the erasure was made with.

    Args:
        record: As of `read_trained`.
        variant: Of the base model's weights.

    Raises:
        ValueError: They are not.
    """
    base, recorded = Path(record["base_model"]), record["base_weights"]
    if not base.is_dir() or not isinstance(recorded, dict):
        return
    found = weights_digests(base, recorded, variant)
    if changed := [part for part, digest in recorded.items() if found.get(part) != digest]:
        held = "has" if len(changed) == 1 else "have"
        raise ValueError(
            f"its {' and '.join(changed)} {held} other weights now than when this was erased: give it those again, "
            f"or, to take it as it is, delete base_weights from {TRAINED_NAME}"
        )


def load_trained(name_or_path: str, record: Recorded, place: Mapping[str, Any], options: dict[str, Any]) -> dict:
    """Name -> part, of what is in the folder or repository.

    Raises:
        ValueError: A class is none of diffusers'.
    """
    parts = {}
    for name, (_, kind) in record["components"].items():
        known = getattr(diffusers, str(kind), None)
        if known is None:
            raise ValueError(f'{TRAINED_NAME} of "{shown(name_or_path)}": diffusers has no {shown(kind)}')
        own = options if issubclass(known, torch.nn.Module) else {}
        parts[name] = known.from_pretrained(name_or_path, subfolder=name, **own, **place)
    return parts


def check_apart(base: str, in_memory: bool, objective: Any = None) -> None:
    """Refuse to save what was trained alone where plain diffusers could not put it together with the rest again.

    Args:
        base: The base model's folder or name.
        in_memory: Whether it was handed in from Python.
        objective: Of the base model, once it is loaded.

    Raises:
        ValueError: It could not.
    """
    why = None
    if in_memory:
        why = "the base model was handed in from Python, and is on no disk that the folder could name"
    elif Path(base).is_file():
        why = "the base model is a single file, which plain diffusers puts together with no other denoiser"
    elif objective is not None and not hasattr(objective, "save_trained"):
        why = f"{objective.kind} is none of diffusers' text-to-image pipelines, and loads as a whole only"
    if why:
        raise ValueError(f'save_components="trained": {why}: leave it at "all"')


def save_trained(
    pipeline: DiffusionPipeline, module: torch.nn.Module, scheduler: Any, folder: Path, base: Mapping[str, Any]
) -> None:
    """Write what was trained, the scheduler where it differs from the base model's, and what they belong to.

    Args:
        pipeline: The whole, which is what is sampled from.
        module: The part of it that was trained.
        scheduler: As a saved pipeline would carry it.
        folder: Where to.
        base: As of `place_of_base`, and `no_t5`.
    """
    name = next(part for part, value in pipeline.components.items() if value is module)
    if Path(base["base_model"]).is_dir() and not base.get("base_weights"):
        # A commit on the Hub stays as it is; a folder need not.
        others = [part for part, value in pipeline.components.items()
                  if isinstance(value, torch.nn.Module) and part != name]  # fmt: skip
        base = {**base, "base_weights": weights_digests(base["base_model"], others, base["variant"])}
    components: dict[str, list[str]] = {name: ["diffusers", type(module).__name__]}
    module.save_pretrained(folder / name)  # type: ignore[operator]
    if scheduler is not pipeline.scheduler:
        components["scheduler"] = ["diffusers", type(scheduler).__name__]
        scheduler.save_pretrained(folder / "scheduler")
    index = {part: [None, None] if pipeline.components.get(part, value) is None else value
             for part, value in pipeline.config.items() if not part.startswith("_name")}  # fmt: skip
    index = {**index, "_class_name": type(pipeline).__name__}
    write_json(folder / TRAINED_NAME, {"format_version": FORMAT_VERSION, **base, "components": components,
                                       "pipeline": index})  # fmt: skip


def place_of_base(
    name_or_path: str, parts: Iterable[str], revision: str | None, variant: str | None, cache_dir: str | None
) -> dict[str, Any]:
    """The base model, as the folder of what was trained alone names it: that of a base which is such a folder itself.

    Args:
        name_or_path: The base model that was trained from; as for the others, see `load_pipeline`.
        parts: Of its pipeline.
    """
    known = {"revision": revision, "cache_dir": cache_dir, "local_files_only": True}
    place = {name: value for name, value in known.items() if value is not None}
    if (record := read_trained(name_or_path, place)) is not None:
        return {name: record[name] for name in ("base_model", "base_revision", "variant", "base_weights")}
    if variant is None:
        with warnings.catch_warnings():
            # Loading has said so.
            warnings.simplefilter("ignore")
            variant = only_variant(name_or_path, parts, list_files(name_or_path, place))
    return {
        "base_model": str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path,
        "base_revision": resolved_revision(name_or_path, revision, cache_dir),
        "variant": variant,
    }


def told_variant(
    name_or_path: str, parts: Iterable[str], revision: str | None, variant: str | None, cache_dir: str | None = None
) -> str | None:
    """What plain diffusers has to be told to load a base model: the variant that was asked for, or the only one.

    Args:
        name_or_path: As of `place_of_base`, and so are the others.
    """
    if variant or not loads_in_diffusers(name_or_path):
        return variant
    return place_of_base(name_or_path, parts, revision, None, cache_dir)["variant"]


def of_a_pipeline(folder: Path) -> list[str]:
    """What of a folder belongs to the pipeline that was saved in it, or to what was trained of one."""
    found = [name for name in (TRAINED_NAME, DiffusionPipeline.config_name) if (folder / name).is_file()]
    for name in tuple(found):
        with contextlib.suppress(ValueError, OSError):
            values = read_json(folder / name)
            values = values["components"] if name == TRAINED_NAME else values
            found += [part for part in values if isinstance(values[part], list) and (folder / part).is_dir()]
    return list(dict.fromkeys(found))
