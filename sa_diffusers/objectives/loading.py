"""From a name or a folder to the objective of the model in it."""

import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from ..files import read_json
from ..messages import near_paths, shown, shown_error
from ..models.class_conditional_pipeline import ClassConditionalPipeline
from ..models.conditional_vae import ConditionalVAE
from ..models.conditional_vae_pipeline import ConditionalVAEPipeline
from ..weights import WEIGHT_SUFFIXES, find_broken_weights
from .base import Objective
from .class_conditional import ClassConditionalObjective
from .conditional_vae import ConditionalVAEObjective
from .diffusion import check_scheduler
from .latent_diffusion import LatentDiffusionObjective

HUB_TIMEOUT_SECONDS = 10
_OWN_PIPELINES: dict[str, type] = {kind.__name__: kind for kind in (ClassConditionalPipeline, ConditionalVAEPipeline)}
_OWN_MODELS: dict[str, type] = {"ConditionalVAE": ConditionalVAE}
# What `objective_for` knows an objective of.
SUPPORTED_PIPELINES = ("StableDiffusionPipeline", *_OWN_PIPELINES)
_EXAMPLE = "CompVis/stable-diffusion-v1-4"
_PATH_SIGNS = ("/", "./", "../", "~", ".\\", "..\\", "\\")


def load_pipeline(
    name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    kinds: Collection[str] | None = None,
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

    Raises:
        ValueError: There is no such model, no leave to read it, it is of another kind, its parts do not fit each other,
            or its weights are missing or damaged.
        ConnectionError: The Hub does not answer within seconds and the cache does not hold the model.
    """
    name_or_path = expanded(name_or_path)
    _check_name(name_or_path)
    if Path(name_or_path).is_dir():
        return _load(name_or_path, {}, variant, kinds)
    unreachable = _why_unreachable(name_or_path, revision)
    place = {"revision": revision, "cache_dir": cache_dir, "local_files_only": unreachable is not None}
    try:
        return _load(name_or_path, place, variant, kinds)
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


def expanded(name_or_path: str) -> str:
    """A path with its `~` expanded; anything else as it is.

    Raises:
        ValueError: There is no such user.
    """
    if not str(name_or_path).startswith("~"):
        return str(name_or_path)
    try:
        return str(Path(name_or_path).expanduser())
    except RuntimeError as error:
        raise ValueError(f'"{shown(name_or_path)}": there is no such user: give the whole path') from error


def looks_like_path(text: str) -> bool:
    """Whether a text can only be meant as a path, and not as a name on the Hub."""
    return (
        text.startswith(_PATH_SIGNS)
        or "\\" in text
        or text.endswith("/")
        or text.count("/") > 1
        or text.lower().endswith((*WEIGHT_SUFFIXES, ".json", ".yaml", ".yml", ".zip", ".gguf"))
        or re.match(r"[A-Za-z]:[\\/]", text) is not None
    )


def _check_name(name_or_path: str) -> None:
    """What can be said of a name without looking at the Hub."""
    name = f'pretrained_model_name_or_path="{shown(name_or_path, 200)}"'
    try:
        path = Path(name_or_path)
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is not a name: give a folder, or a name such as {_EXAMPLE}") from error
    if not name_or_path.strip():
        raise ValueError(f"pretrained_model_name_or_path is empty: give a folder, or a name such as {_EXAMPLE}")
    if is_folder:
        if not (path / DiffusionPipeline.config_name).is_file():
            inner = [entry for entry in sorted(path.iterdir()) if (entry / DiffusionPipeline.config_name).is_file()]
            hint = f"; did you mean {inner[0]}?" if inner else ""
            if (path.parent / DiffusionPipeline.config_name).is_file():
                hint = f"; did you mean {path.parent}?"
            raise ValueError(
                f"{name} is a folder without {DiffusionPipeline.config_name}: give the folder of a saved pipeline{hint}"
            )
    elif is_file and path.suffix.lower() in WEIGHT_SUFFIXES:
        raise ValueError(
            f"{name} is a single file, where the folder of a pipeline is needed: convert it with python -c "
            f"\"from diffusers import StableDiffusionPipeline as P; P.from_single_file('{shown(name_or_path, 200)}')"
            ".save_pretrained('FOLDER')\" and give FOLDER"
        )
    elif is_file and path.name == DiffusionPipeline.config_name:
        raise ValueError(f"{name} is a file of a pipeline: give its folder, {path.parent}")
    elif is_file:
        raise ValueError(f"{name} is a file: give the folder of a saved pipeline, or a name such as {_EXAMPLE}")
    elif looks_like_path(name_or_path):
        raise ValueError(f"{name}: there is no such file or folder{near_paths(path)}")


def _load(
    name_or_path: str, place: dict[str, Any], variant: str | None, kinds: Collection[str] | None
) -> DiffusionPipeline:
    place = {name: value for name, value in place.items() if value is not None}
    index = _settings(name_or_path, None, place)
    kind = index.get("_class_name")
    kind = kind[1] if isinstance(kind, list) and len(kind) == 2 else kind
    parts = {name: value for name, value in index.items()
             if name[:1] != "_" and isinstance(value, list) and len(value) == 2 and value[0] is not None}  # fmt: skip
    if not isinstance(kind, str) or not parts:
        raise ValueError(
            f"{_place(name_or_path)}: {DiffusionPipeline.config_name} is not that of a pipeline: save or download the "
            "pipeline again"
        )
    if kinds is not None and kind not in kinds:
        raise ValueError(_unsupported(kind))
    _check_parts(name_or_path, kind, parts, place)
    files = _files(name_or_path, place)
    if variant is None:
        variant = _only_variant(name_or_path, parts, files)
    options = {"dtype": torch.float32, **({"variant": variant} if variant else {})}
    if Path(name_or_path).is_dir():
        chosen = [Path(name_or_path) / name for part in parts for name in _chosen(files, part, variant)]
        if fault := find_broken_weights(name_or_path, chosen):
            raise ValueError(fault)
    folder = name_or_path
    try:
        if kind in _OWN_PIPELINES and isinstance(index["_class_name"], list):
            if not Path(name_or_path).is_dir():
                folder = snapshot_download(name_or_path, **place)
            return _load_own(Path(folder), index, options)
        return DiffusionPipeline.from_pretrained(name_or_path, **options, **place)
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


def _check_parts(name_or_path: str, kind: str, parts: dict[str, list], place: dict[str, Any]) -> None:
    """Refuse what the configurations of a pipeline's parts already forbid."""
    if kind not in SUPPORTED_PIPELINES:
        return
    if "scheduler" in parts:
        scheduler = _settings(name_or_path, "scheduler", place)
        check_scheduler(str(parts["scheduler"][1]), scheduler)
    if kind != "StableDiffusionPipeline":
        return
    missing = [part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if part not in parts]
    if missing:
        raise ValueError(f"{_place(name_or_path)} has no {' and no '.join(missing)}: give a whole pipeline")
    unet, vae = (_settings(name_or_path, part, place) for part in ("unet", "vae"))
    text_encoder = _settings(name_or_path, "text_encoder", place)
    channels = vae.get("latent_channels", 4)
    taken = unet.get("in_channels", 4)
    if taken != channels:
        raise ValueError(
            f"{_place(name_or_path)}: its UNet takes {shown(taken)} channels, its autoencoder makes {shown(channels)}: "
            "inpainting, depth and editing models are not supported, give the text-to-image model that it came from"
        )
    if unet.get("out_channels", 4) != channels:
        raise ValueError(
            f"{_place(name_or_path)}: its UNet gives {shown(unet.get('out_channels'))} channels, its autoencoder takes "
            f"{shown(channels)}: models that predict a variance too are not supported"
        )
    width, size = unet.get("cross_attention_dim", 1280), text_encoder.get("hidden_size")
    if isinstance(width, int) and isinstance(size, int) and width != size and not unet.get("encoder_hid_dim"):
        raise ValueError(
            f"{_place(name_or_path)}: its UNet takes text embeddings of {width} numbers, its text encoder gives "
            f"{size}: they belong to different models"
        )


def _files(name_or_path: str, place: dict[str, Any]) -> list[str]:
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


# diffusion_pytorch_model.fp16.safetensors, model-00001-of-00002.safetensors, model.safetensors.index.fp16.json
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?"
    r"\.(?P<kind>safetensors|bin)"
)


def _weights_of(files: Sequence[str], part: str) -> dict[str | None, list[str]]:
    """The weight files of a part of a pipeline by variant; safetensors where there are any."""
    found: dict[str | None, dict[str, list[str]]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        if folder == part and (match := _WEIGHTS.fullmatch(name)):
            found.setdefault(match["variant"], {}).setdefault(match["kind"], []).append(file)
    return {variant: kinds.get("safetensors") or kinds["bin"] for variant, kinds in found.items()}


def _chosen(files: Sequence[str], part: str, variant: str | None) -> list[str]:
    """The weight files of a part that are loaded, and those that the index of its shards names."""
    weights = _weights_of(files, part)
    return weights.get(variant) or weights.get(None) or []


def _only_variant(name_or_path: str, parts: dict[str, list], files: Sequence[str]) -> str | None:
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
        raise ValueError(
            f"{_place(name_or_path)} has weights of variants only: " + (f"give {names}" if names else "of several")
        )
    (variant,) = variants
    warnings.warn(
        f"{_place(name_or_path)} has weights of the variant {variant} only: loaded as with --variant {variant}",
        stacklevel=4,
    )
    return variant


def _load_own(folder: Path, index: dict[str, Any], options: dict[str, Any]) -> DiffusionPipeline:
    """A pipeline of this package, with this package's code and not with the copy that it was saved with."""
    components: dict[str, Any] = {}
    for name, value in index.items():
        if not isinstance(value, list) or name.startswith("_"):
            continue
        kind = _OWN_MODELS.get(value[1]) or getattr(diffusers, value[1])
        is_model = issubclass(kind, diffusers.ModelMixin)
        components[name] = kind.from_pretrained(folder, subfolder=name, **(options if is_model else {}))
    return _OWN_PIPELINES[index["_class_name"][1]](**components, id2label=index.get("id2label"))


def _why_unreachable(name: str, revision: str | None) -> str | None:
    """Ask the Hub for a model; the reason if it cannot be asked.

    Raises:
        ValueError: The Hub answers that there is no such model, or no leave to read it.
    """
    if constants.HF_HUB_OFFLINE:
        return "offline mode is on: HF_HUB_OFFLINE is set"
    advice = f"give a folder, or a name such as {_EXAMPLE}{near_paths(name)}"
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise ValueError(
            f'the model "{name}" is gated: accept its terms on its page, then run `hf auth login`'
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f'the model "{name}" has no revision "{revision}" on the Hub') from error
    except RepositoryNotFoundError as error:
        raise ValueError(f'there is no model "{name}", neither as a folder nor on the Hub: {advice}') from error
    except HFValidationError as error:
        raise ValueError(f'"{name}" is neither a folder nor a name on the Hub ({error}): {advice}') from error
    except Exception as error:  # the kinds of network errors depend on huggingface_hub's HTTP library
        return f"{type(error).__name__}: {shown_error(error)}"
    return None


def objective_for(
    pipeline: DiffusionPipeline,
    prediction_type: str | None = None,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
) -> Objective:
    """The objective of a pipeline.

    Raises:
        ValueError: No objective knows this kind of pipeline, it has adapters loaded, or its weights are not in float32.
    """
    _check_modules(pipeline)
    own = _OWN_PIPELINES.get(type(pipeline).__name__)
    if own and type(pipeline) is not own:
        # Loaded with the copy of the code that lies beside the weights.
        pipeline = own(**pipeline.components, id2label=pipeline.config.id2label)
    if type(pipeline) is StableDiffusionPipeline:
        return LatentDiffusionObjective(pipeline, prediction_type, snr_gamma, noise_offset)
    if type(pipeline) is ClassConditionalPipeline:
        return ClassConditionalObjective(pipeline, prediction_type, snr_gamma, noise_offset)
    if type(pipeline) is ConditionalVAEPipeline:
        for name, value in (
            ("prediction_type", prediction_type),
            ("snr_gamma", snr_gamma),
            ("noise_offset", noise_offset),
        ):
            if value:
                raise ValueError(f"{name}={value} has no meaning for a conditional VAE: leave it out")
        return ConditionalVAEObjective(pipeline)
    raise ValueError(_unsupported(type(pipeline).__name__))


def _unsupported(kind: str) -> str:
    return (
        f"{shown(kind)} is not supported yet; supported: StableDiffusionPipeline (Stable Diffusion 1 and 2), "
        f"{', '.join(_OWN_PIPELINES)}. For another kind of model, write a subclass of Objective"
    )


def _check_modules(pipeline: DiffusionPipeline) -> None:
    """Refuse adapters, whose weights a saved pipeline would not hold, and weights that cannot be trained."""
    for name, module in pipeline.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        if getattr(module, "_hf_peft_config_loaded", False) or any(
            hasattr(layer, "lora_A") for layer in module.modules()
        ):
            raise ValueError(
                f"the pipeline's {name} has LoRA adapters loaded, which the saved pipeline would not hold: fuse and "
                "unload them first, with pipeline.fuse_lora() and pipeline.unload_lora_weights()"
            )
        projection = getattr(module, "encoder_hid_proj", None)
        if projection is not None and module.config.get("encoder_hid_dim_type") == "ip_image_proj":
            raise ValueError(f"the pipeline's {name} has an IP-Adapter loaded: call pipeline.unload_ip_adapter() first")
        if name == "safety_checker":
            continue
        kinds = {value.dtype for value in module.parameters() if value.dtype != torch.float32}
        if kinds:
            raise ValueError(
                f"the pipeline's {name} has weights in {', '.join(sorted(str(kind)[6:] for kind in kinds))}: load it "
                "with dtype=torch.float32 (for less memory, give mixed_precision in place of it)"
            )


def resolved_revision(name_or_path: str, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """The commit that a name on the Hub stands for in the local cache; None for a folder."""
    if Path(name_or_path).is_dir():
        return None
    index = try_to_load_from_cache(name_or_path, DiffusionPipeline.config_name, cache_dir, revision)
    return Path(index).parent.name if isinstance(index, str) else None
