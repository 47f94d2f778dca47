"""From a name or a folder to the pipeline in it."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.utils import logging
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

from ..files import Recorded, read_json
from ..messages import near_paths, shown, shown_error
from ..quantization import quantization_config
from ..weights import find_broken_weights
from .base import Family, Objective
from .distilled import Distilled, check_undistilled, distilled
from .names import check_name, expanded, why_unreachable
from .registry import family_of, objective_for, rebuilt, unsupported
from .single_file import (
    configurations_of,
    denoiser_class,
    guessed_pipeline,
    holds_autoencoder,
    holds_whole_model,
    is_single_file,
    lacking_encoders,
    load_part,
    load_whole,
    tensors_of,
)
from .trained import check_base, holds_trained, load_trained, read_trained
from .weight_files import chosen_files, lacking, list_files, only_variant

# Numbers of a network that no list and no null stands for, and one that may be null.
_NUMBERS, _OR_NULL = ("norm_eps", "freq_shift", "downsample_padding"), ("shift_factor",)


def load_pipeline(
    name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    kinds: Collection[str] | None = None,
    no_t5: bool = False,
    undistilled: bool = False,
    single_file_config: str | None = None,
    weights_dtype: str = "float32",
    base_quantization: str | None = None,
) -> DiffusionPipeline:
    """Load a pipeline from a folder, the Hub, or, when the Hub does not answer, the Hub's local cache.

    What the pipeline's index and its configurations say is checked before weights are loaded. A folder of an erasure
    that holds what was trained alone is put together with its base model, and so is a single file that holds the
    denoiser alone with the pipeline that its configurations are from.

    Args:
        name_or_path: A folder, a name on the Hub, or a single-file checkpoint (.safetensors).
        revision: Branch, tag or commit on the Hub.
        variant: Of the weight files, such as `"fp16"`. Default: none, or, where there are only files of one variant,
            that one, with a warning.
        cache_dir: Where models of the Hub are kept.
        kinds: Names of the pipeline classes that are accepted, such as `SUPPORTED_PIPELINES`. Default: all.
        no_t5: Leave out a T5 text encoder that the pipeline also works without.
        undistilled: Refuse what is distilled to few steps, as what is trained must not be.
        single_file_config: Folder or name on the Hub of a pipeline of a single file's kind, whose configurations,
            tokenizers and further parts it takes. Default: as diffusers tells by the file's tensors.
        weights_dtype: Precision of its weights: `"float32"`, `"bfloat16"` or `"float16"`.
        base_quantization: How the denoiser is quantised meanwhile (`"nf4"`, `"fp8"`, `"int8"`), where diffusers loads
            it from a pipeline's own folder; what comes from a single file, or was trained alone, is not.

    Raises:
        ValueError: There is no such model, no leave to read it, it is of another kind, its parts do not fit each other,
            its weights are missing or damaged, it has no T5 to leave out, it is distilled, its denoiser is stored
            quantised, or it is a pickle.
        ConnectionError: The Hub does not answer within seconds and the cache does not hold the model.
    """
    name_or_path = expanded(name_or_path)
    check_name(name_or_path)
    asked = _Asked(variant, kinds, no_t5, undistilled, weights_dtype, base_quantization)
    if is_single_file(name_or_path):
        tensors = tensors_of(name_or_path)
        source = expanded(single_file_config) if single_file_config else guessed_pipeline(name_or_path, tensors)
        check_name(source, "single_file_config")
        asked = replace(asked, file=name_or_path, tensors=tensors)
        try:
            return _load_from(source, revision, cache_dir, asked)
        except ValueError as error:
            if single_file_config:
                raise
            raise ValueError(
                f"{error} (by its tensors the file is taken for one of {shown(source)}: if it is another's, name that "
                "with --single_file_config)"
            ) from error
    return _load_from(name_or_path, revision, cache_dir, asked)


@dataclass(frozen=True)
class _Asked:
    """How a pipeline is to be loaded.

    Attributes:
        given: Parts that are at hand, by name.
        file: A single-file checkpoint, to which the pipeline lends its configurations.
        tensors: Of the checkpoint, without values.
    """

    variant: str | None
    kinds: Collection[str] | None
    no_t5: bool
    undistilled: bool
    weights_dtype: str
    quantization: str | None
    given: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> dict[str, torch.dtype]:
        """What loaders are told of the weights' precision."""
        return {"dtype": getattr(torch, self.weights_dtype)}

    def quantized(self, family: type[Family] | None) -> dict[str, Any]:
        """What the pipelines' loader is told of how the denoiser is quantised."""
        part = getattr(family, "denoiser", None)
        if self.quantization is None or part is None or part in self.given:
            return {}
        return {"quantization_config": PipelineQuantizationConfig(
            quant_mapping={part: quantization_config(self.quantization, **self.dtype)})}  # fmt: skip


def _load_from(name_or_path: str, revision: str | None, cache_dir: str | None, asked: _Asked) -> DiffusionPipeline:
    """From a folder, the Hub or its cache."""
    if Path(name_or_path).is_dir():
        return _load(name_or_path, {"cache_dir": cache_dir} if holds_trained(name_or_path) else {}, asked)
    unreachable = why_unreachable(name_or_path, revision)
    place = {"revision": revision, "cache_dir": cache_dir, "local_files_only": unreachable is not None}
    try:
        return _load(name_or_path, place, asked)
    except _NotThere as error:
        source = f"{_place(asked.file)}: it takes its configurations from a pipeline, and " if asked.file else ""
        if unreachable is None:
            raise ValueError(f'{source}the model "{shown(name_or_path)}" {error}') from error
        flag = "--single_file_config" if asked.file else "--pretrained_model_name_or_path"
        raise ConnectionError(
            f'{source}the model "{shown(name_or_path)}" is not in the local cache and the Hub cannot be reached '
            f"({unreachable}). With a connection, run `hf download {shown(name_or_path)}` once, or give the path of a "
            f"local folder with {flag}{near_paths(name_or_path)}"
        ) from error


class _NotThere(ValueError):
    """A file of a model on the Hub cannot be had."""


def _load(name_or_path: str, place: dict[str, Any], asked: _Asked) -> DiffusionPipeline:
    place = {name: value for name, value in place.items() if value is not None}
    index = _index(name_or_path, place)
    if isinstance(index, Recorded):
        if asked.given:
            raise ValueError(
                f"{_place(name_or_path)} holds no whole pipeline, only what was trained: give another base"
            )
        return _load_over_base(name_or_path, index, place, asked)
    kind = _class_name(index)
    parts = {name: value for name, value in index.items()
             if name[:1] != "_" and isinstance(value, list) and len(value) == 2 and value[0] is not None}  # fmt: skip
    if kind is None or not parts:
        raise ValueError(
            f"{_place(name_or_path)}: {DiffusionPipeline.config_name} is not that of a pipeline: save or download the "
            "pipeline again"
        )
    if asked.kinds is not None and kind not in asked.kinds:
        raise ValueError(unsupported(kind))
    family = family_of(kind)
    optional = family.optional_parts if family is not None else ()
    if asked.no_t5 and not optional:
        raise ValueError(f"no_t5 has no meaning for {shown(kind)}, which does not work without: leave it out")
    if asked.weights_dtype != "float32" and family is not None and family.own_pipeline:
        raise ValueError(
            f'weights_dtype="{asked.weights_dtype}" is for pipelines of diffusers, and {shown(kind)} is none of them: '
            "leave it out"
        )
    absent: dict[str, None] = {part: None for part in optional if asked.no_t5 or part not in parts}
    parts = {name: value for name, value in parts.items() if name not in absent}
    named = asked.file or name_or_path
    if family is not None:

        def read(part: str | None) -> dict[str, Any]:
            return index if part is None else _settings(name_or_path, part, place)

        family.check_parts(_place(named), parts, read)
        _check_stored(family, _place(named), parts, read)
        _check_numbers(_place(named), parts, read)
        if asked.undistilled:
            check_undistilled(distilled(family, [named, index.get("_name_or_path")], read), _place(named))
    if asked.file:
        return _load_file(name_or_path, place, asked, kind, family, parts, absent)
    files, needed = list_files(name_or_path, place), [part for part in parts if part not in asked.given]
    variant = asked.variant or only_variant(_place(name_or_path), needed, files)
    options = {**asked.dtype, **({"variant": variant} if variant else {})}
    if Path(name_or_path).is_dir():
        chosen = [Path(name_or_path) / name for part in needed for name in chosen_files(files, part, variant)]
        if fault := find_broken_weights(name_or_path, chosen):
            raise ValueError(fault)
    folder = name_or_path
    try:
        if family and family.own_pipeline:
            if not Path(name_or_path).is_dir():
                folder = snapshot_download(name_or_path, **place)
            pipeline = _load_own(family, Path(folder), index, options)
        else:
            # diffusers takes no word of the index for it that such a part is left out.
            with _quietly(asked.quantization is not None):
                pipeline = DiffusionPipeline.from_pretrained(
                    name_or_path, **options, **absent, **asked.given, **place, **asked.quantized(family)
                )
    except Exception as error:  # each library has kinds of its own for files that are missing or damaged
        folder = _on_disk(name_or_path, place)
        fault = find_broken_weights(folder) if Path(folder).is_dir() else None
        if fault is None and place.get("local_files_only"):
            raise _NotThere(f"is not whole in the local cache ({shown_error(error)})") from error
        raise ValueError(
            fault or f"{_place(name_or_path)} could not be loaded ({shown_error(error)}): download or save it again"
        ) from error
    loaded = {part: value for part, value in pipeline.components.items() if part not in asked.given}
    if fault := lacking(loaded, _on_disk(name_or_path, place), files, variant):
        raise ValueError(fault)
    return pipeline


def _on_disk(name_or_path: str, place: Mapping[str, Any]) -> str:
    """A pipeline's folder; that in the Hub's cache where it is named so."""
    if Path(name_or_path).is_dir():
        return name_or_path
    known = try_to_load_from_cache(
        name_or_path, DiffusionPipeline.config_name, place.get("cache_dir"), place.get("revision")
    )
    return str(Path(known).parent) if isinstance(known, str) else name_or_path


def _load_file(
    source: str, place: dict[str, Any], asked: _Asked, kind: str, family: type[Family] | None,
    parts: Mapping[str, list], absent: Mapping[str, None],
) -> DiffusionPipeline:  # fmt: skip
    """A single file, with the configurations of a pipeline and with those of its parts that the file lacks."""
    assert asked.file is not None
    known = getattr(diffusers, kind, DiffusionPipeline)
    whole = holds_whole_model(asked.tensors, known)
    denoiser = None if whole else denoiser_class(asked.file, family, parts)
    given: dict[str, Any] = dict(absent)
    if whole and family and (lent := lacking_encoders(asked.tensors, parts)):
        held = {family.denoiser, "vae", *(name for name in parts if name.startswith("text_encoder"))} - {*lent}
        lender = _load(source, place, replace(asked, file=None, undistilled=False, given=dict.fromkeys(held)))
        given |= {name: getattr(lender, name) for name in lent}
    try:
        folder = configurations_of(source, place)
        if whole:
            pipeline = load_whole(asked.file, known, folder, given, asked.dtype)
        else:
            given = {family.denoiser: load_part(asked.file, denoiser, family.denoiser, folder, asked.dtype)}
            # Others than this one diffusers reads from no single file; they are the same in every model of their kind.
            if holds_autoencoder(asked.tensors) and parts["vae"][1] == "AutoencoderKL":
                given["vae"] = load_part(asked.file, diffusers.AutoencoderKL, "vae", folder, asked.dtype)
    except Exception as error:  # what does not fit shows itself in as many ways as there are kinds of models
        why = "it lacks some of its tensors" if "meta tensor" in str(error) else shown_error(error)
        raise ValueError(
            f"{_place(asked.file)} could not be loaded as a {shown(kind)} with the configurations of {shown(source)} "
            f"({why}): give with --single_file_config a pipeline of the same kind; a folder of a whole "
            "one lends what the file lacks"
        ) from error
    if whole:
        if fault := lacking(pipeline.components, folder, [], None):
            raise ValueError(fault)
    else:
        pipeline = _load(source, place, replace(asked, file=None, undistilled=False, given=given))
    pipeline.register_to_config(_name_or_path=asked.file)
    return pipeline


def _load_over_base(name_or_path: str, record: Recorded, place: dict[str, Any], asked: _Asked) -> DiffusionPipeline:
    """What was trained, in the pipeline of the base model that it belongs to."""
    try:
        given = load_trained(name_or_path, record, place, asked.dtype)
    except Exception as error:
        fault = find_broken_weights(name_or_path) if Path(name_or_path).is_dir() else None
        raise ValueError(
            fault or f"{_place(name_or_path)} could not be loaded ({shown_error(error)}): download or save it again"
        ) from error
    asked = replace(asked, variant=record["variant"], no_t5=bool(record["no_t5"]), given=given)
    base = record["base_model"]
    try:
        check_name(base)
        pipeline = _load_from(base, record["base_revision"], place.get("cache_dir"), asked)
        check_base(record, asked.variant)
    except (ValueError, ConnectionError) as error:
        raise type(error)(
            f"{_place(name_or_path)} holds {' and '.join(given)} alone; the rest is that of the base model, "
            f'"{shown(base)}": {error}'
        ) from error
    pipeline.register_to_config(_name_or_path=name_or_path)
    return pipeline


def _check_stored(family: type[Family], place: str, parts: Mapping[str, list], read: Any) -> None:
    """Refuse a denoiser whose weights are stored quantised."""
    part = getattr(family, "denoiser", None)
    method = (read(part).get("quantization_config") or {}).get("quant_method") if part in parts else None
    if method is not None:
        raise ValueError(
            f"{place}: its {part} is stored quantised ({shown(method)}), and this takes the weights themselves: give "
            "the model in its own precision (base_quantization quantises it while it is loaded, for an adapter)"
        )


def _check_numbers(place: str, parts: Mapping[str, list], read: Any) -> None:
    """Refuse what is no number where a network of diffusers takes one: it would be an error of torch's in the first
    batch."""
    for part, (library, kind) in parts.items():
        network = getattr(diffusers, str(kind), None) if library == "diffusers" else None
        if not (isinstance(network, type) and issubclass(network, diffusers.ModelMixin)):
            continue
        found = read(part)
        for name, taken in inspect.signature(network).parameters.items():
            value, wrong = found.get(name, taken.default), (str, dict)
            if name in _NUMBERS + _OR_NULL:
                wrong = (str, dict, list, bool, *((type(None),) if name in _NUMBERS else ()))
            elif type(taken.default) not in (int, float):
                continue
            if isinstance(value, wrong):
                raise ValueError(
                    f"{place}: {part}/config.json says {name}={shown(value)}, which is no number: correct it, or "
                    "download or save the pipeline again"
                )


@contextlib.contextmanager
def _quietly(asked: bool) -> Iterator[None]:
    """Without what diffusers says of quantising, which is as it should be: int8 is not for bfloat16 alone."""
    verbosity = logging.get_verbosity()
    if asked:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


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


def _index(name_or_path: str, place: dict[str, Any]) -> dict[str, Any] | Recorded:
    """A pipeline's index, or the record of what was trained alone."""
    if holds_trained(name_or_path):
        return read_trained(name_or_path, place) or Recorded()
    try:
        return _settings(name_or_path, None, place)
    except _NotThere:
        if (record := read_trained(name_or_path, place)) is None:
            raise
        return record


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


def family_in(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None, single_file_config: str | None = None
) -> type[Family] | None:
    """The family of a saved pipeline, by its index alone, or of a pipeline's class; None where neither is known.

    Args:
        name_or_path: As the others, see `load_pipeline`; or a class's name.
    """
    return kind_in(name_or_path, revision, cache_dir, single_file_config)[0]


def kind_in(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None, single_file_config: str | None = None
) -> tuple[type[Family] | None, Distilled | None]:
    """As `family_in`, and what says that the model is distilled to few steps, if anything does."""
    place = {name: value for name, value in (("revision", revision), ("cache_dir", cache_dir)) if value is not None}
    family = told = None
    with contextlib.suppress(ValueError, OSError):
        # Loading says what is wrong with it.
        named = folder = expanded(name_or_path)
        if (found := family_of(folder)) is not None:
            return found, None
        if is_single_file(folder):
            folder = expanded(single_file_config or guessed_pipeline(folder, tensors_of(folder)))
        known = None if Path(folder).is_dir() else try_to_load_from_cache(
            folder, DiffusionPipeline.config_name, cache_dir, revision
        )  # fmt: skip
        if isinstance(known, str):
            folder, place = str(Path(known).parent), {}
        index = _index(folder, place)
        if isinstance(index, Recorded):
            family = family_of(_class_name(index["pipeline"]) or "")
            return family, kind_in(index["base_model"], index["base_revision"], cache_dir)[1]
        family = family_of(_class_name(index) or "")
        if family is not None:

            def read(part: str | None) -> dict[str, Any]:
                return index if part is None else _settings(folder, part, place)

            told = distilled(family, [named, index.get("_name_or_path")], read)
    return family, told


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
