"""From a name or a folder to the pipeline in it."""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

from ..files import read_json
from ..messages import near_paths, shown, shown_error
from ..weights import find_broken_weights
from .base import Family, Objective
from .distilled import check_undistilled
from .names import check_name, expanded, why_unreachable
from .registry import family_of, objective_for, rebuilt, unsupported
from .weight_files import chosen_files, list_files, only_variant


def load_pipeline(
    name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    kinds: Collection[str] | None = None,
    no_t5: bool = False,
    undistilled: bool = False,
) -> DiffusionPipeline:
    """Load a pipeline in float32 from a folder, the Hub, or, when the Hub does not answer, the Hub's local cache.

    What the pipeline's index and its configurations say is checked before weights are loaded.

    Args:
        name_or_path: A folder, or a name on the Hub.
        revision: Branch, tag or commit on the Hub.
        variant: Of the weight files, such as `"fp16"`. Default: none, or, where there are only files of one variant,
            that one, with a warning.
        cache_dir: Where models of the Hub are kept.
        kinds: Names of the pipeline classes that are accepted, such as `SUPPORTED_PIPELINES`. Default: all.
        no_t5: Leave out a T5 text encoder that the pipeline also works without.
        undistilled: Refuse what is distilled to few steps, as what is trained must not be.

    Raises:
        ValueError: There is no such model, no leave to read it, it is of another kind, its parts do not fit each other,
            its weights are missing or damaged, it has no T5 to leave out, or it is distilled.
        ConnectionError: The Hub does not answer within seconds and the cache does not hold the model.
    """
    name_or_path = expanded(name_or_path)
    check_name(name_or_path)
    if Path(name_or_path).is_dir():
        return _load(name_or_path, {}, variant, kinds, no_t5, undistilled)
    unreachable = why_unreachable(name_or_path, revision)
    place = {"revision": revision, "cache_dir": cache_dir, "local_files_only": unreachable is not None}
    try:
        return _load(name_or_path, place, variant, kinds, no_t5, undistilled)
    except _NotThere as error:
        if unreachable is None:
            raise ValueError(f'the model "{shown(name_or_path)}" {error}') from error
        raise ConnectionError(
            f'the model "{shown(name_or_path)}" is not in the local cache and the Hub cannot be reached '
            f"({unreachable}). With a connection, run `hf download {shown(name_or_path)}` once, or give the path of a "
            f"local folder with --pretrained_model_name_or_path{near_paths(name_or_path)}"
        ) from error


class _NotThere(ValueError):
    """A file of a model on the Hub cannot be had."""


def _load(
    name_or_path: str, place: dict[str, Any], variant: str | None, kinds: Collection[str] | None, no_t5: bool,
    undistilled: bool,
) -> DiffusionPipeline:  # fmt: skip
    place = {name: value for name, value in place.items() if value is not None}
    index = _settings(name_or_path, None, place)
    kind = _class_name(index)
    parts = {name: value for name, value in index.items()
             if name[:1] != "_" and isinstance(value, list) and len(value) == 2 and value[0] is not None}  # fmt: skip
    if kind is None or not parts:
        raise ValueError(
            f"{_place(name_or_path)}: {DiffusionPipeline.config_name} is not that of a pipeline: save or download the "
            "pipeline again"
        )
    if kinds is not None and kind not in kinds:
        raise ValueError(unsupported(kind))
    family = family_of(kind)
    optional = family.optional_parts if family is not None else ()
    if no_t5 and not optional:
        raise ValueError(f"no_t5 has no meaning for {shown(kind)}, which does not work without: leave it out")
    absent: dict[str, None] = {part: None for part in optional if no_t5 or part not in parts}
    parts = {name: value for name, value in parts.items() if name not in absent}
    if family is not None:

        def read(part: str | None) -> dict[str, Any]:
            return index if part is None else _settings(name_or_path, part, place)

        family.check_parts(_place(name_or_path), parts, read)
        if undistilled:
            names = [name_or_path, index.get("_name_or_path")]
            check_undistilled(family, _place(name_or_path), names, read)
    files = list_files(name_or_path, place)
    if variant is None:
        variant = only_variant(_place(name_or_path), parts, files)
    options = {"dtype": torch.float32, **({"variant": variant} if variant else {})}
    if Path(name_or_path).is_dir():
        chosen = [Path(name_or_path) / name for part in parts for name in chosen_files(files, part, variant)]
        if fault := find_broken_weights(name_or_path, chosen):
            raise ValueError(fault)
    folder = name_or_path
    try:
        if family and family.own_pipeline:
            if not Path(name_or_path).is_dir():
                folder = snapshot_download(name_or_path, **place)
            return _load_own(family, Path(folder), index, options)
        # diffusers takes no word of the index for it that such a part is left out.
        return DiffusionPipeline.from_pretrained(name_or_path, **options, **absent, **place)
    except Exception as error:  # each library has kinds of its own for files that are missing or damaged
        known = try_to_load_from_cache(
            name_or_path, DiffusionPipeline.config_name, place.get("cache_dir"), place.get("revision")
        ) if not Path(name_or_path).is_dir() else None  # fmt: skip
        folder = str(Path(known).parent) if isinstance(known, str) else folder
        fault = find_broken_weights(folder) if Path(folder).is_dir() else None
        if fault is None and place.get("local_files_only"):
            raise _NotThere(f"is not whole in the local cache ({shown_error(error)})") from error
        raise ValueError(
            fault or f"{_place(name_or_path)} could not be loaded ({shown_error(error)}): download or save it again"
        ) from error


def _place(name_or_path: str) -> str:
    return f'pretrained_model_name_or_path="{shown(name_or_path, 200)}"'


def _settings(name_or_path: str, part: str | None, place: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a pipeline (None) or of a part of it."""
    kind: Any = DiffusionPipeline
    if part is not None:
        kind = diffusers.SchedulerMixin if part == "scheduler" else diffusers.ModelMixin
    name = kind.config_name if kind.config_name else "config.json"
    file = Path(name_or_path) / (part or "") / name
    if not Path(name_or_path).is_dir():
        try:
            file = Path(hf_hub_download(name_or_path, name, subfolder=part, **place))
        except Exception as error:  # the kinds of network errors depend on huggingface_hub's HTTP library
            raise _NotThere(f"has no {part + '/' if part else ''}{name} ({shown_error(error)})") from error
    if not file.is_file():
        raise ValueError(f"{file} is missing: download or save the pipeline again")
    try:
        values = read_json(file)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read ({shown_error(error)}): download or save the pipeline again"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no configuration: download or save the pipeline again")
    return values


def _load_own(family: type[Family], folder: Path, index: dict[str, Any], options: dict[str, Any]) -> DiffusionPipeline:
    """A pipeline whose class the family brings, with that code and not with a copy that it was saved with."""
    components: dict[str, Any] = {}
    for name, value in index.items():
        if not isinstance(value, list) or name.startswith("_"):
            continue
        kind = family.own_models.get(value[1]) or getattr(
            transformers if value[0] == "transformers" else diffusers, value[1]
        )
        is_model = issubclass(kind, torch.nn.Module)
        components[name] = kind.from_pretrained(folder, subfolder=name, **(options if is_model else {}))
    return rebuilt(family, components, index)


def family_in(name_or_path: str, revision: str | None = None, cache_dir: str | None = None) -> type[Family] | None:
    """The family of a saved pipeline, by its index alone, or of a pipeline's class; None where neither is known."""
    place = {name: value for name, value in (("revision", revision), ("cache_dir", cache_dir)) if value is not None}
    with contextlib.suppress(ValueError, OSError):
        # Loading says what is wrong with it.
        folder = expanded(name_or_path)
        if (found := family_of(folder)) is not None:
            return found
        known = None if Path(folder).is_dir() else try_to_load_from_cache(
            folder, DiffusionPipeline.config_name, cache_dir, revision
        )  # fmt: skip
        index = read_json(Path(known)) if isinstance(known, str) else _settings(folder, None, place)
        return family_of(_class_name(index) or "")
    return None


def _class_name(index: dict[str, Any]) -> str | None:
    kind = index.get("_class_name")
    kind = kind[1] if isinstance(kind, list) and len(kind) == 2 else kind
    return kind if isinstance(kind, str) else None


def objective_of(model: Any) -> tuple[Objective, DiffusionPipeline | None]:
    """A model in whatever form a caller has it, and its pipeline.

    Args:
        model: An objective, a pipeline, or a pipeline's folder or name on the Hub.

    Raises:
        ValueError: As of `load_pipeline` and `objective_for`.
    """
    if isinstance(model, Objective):
        return model, None
    pipeline = load_pipeline(str(model)) if isinstance(model, (str, Path)) else checked_pipeline(model)
    return objective_for(pipeline), pipeline


def checked_pipeline(model: Any) -> DiffusionPipeline:
    """A pipeline in memory, or a sentence on what else it is.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(model, DiffusionPipeline):
        raise ValueError(
            f"a {type(model).__name__} is not a pipeline: give a DiffusionPipeline, its folder or its name"
        )
    return model


def pipeline_name(pipeline: DiffusionPipeline) -> str:
    """How a pipeline in memory is called: as it was loaded, else by its class."""
    return str(pipeline.name_or_path or type(pipeline).__name__)


def modules_of(pipeline: DiffusionPipeline) -> list[torch.nn.Module]:
    """The pipeline's networks."""
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
