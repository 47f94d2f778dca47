"""Low-rank adapters (Hu et al., 2022): which layers take one, its two matrices, and the file that holds them."""

import contextlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft, logging
from huggingface_hub import hf_hub_download
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from ..files import write_bytes
from ..messages import shown_error
from ..quantization import check_quantized, kind_of, lighten_, quantization_of, quantize_, shape_of
from ..weights import ordered, weights_fault
from .base import Objective
from .names import ADAPTER_NAME

ADAPTER_FILE = ADAPTER_NAME
KOHYA_FILE = "kohya_lora_weights.safetensors"
_TIMEOUT_SECONDS = 10
# What the adapter is called in a model: while it is trained, and where it is loaded.
_TRAINED, LOADED = "default", "erasure"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class AdapterLayers:
    """The layers of a module that take an adapter.

    Attributes:
        sizes: Name of the layer -> rows and columns of its weight as a matrix.
        grouped: Names of selected convolutions of several groups, whose weight is no matrix: they stay frozen.
    """

    sizes: dict[str, tuple[int, int]]
    grouped: tuple[str, ...] = ()

    def numbers(self, rank: int) -> int:
        """How many numbers an adapter of a rank has."""
        return sum(rank * (rows + columns) for rows, columns in self.sizes.values())


def adapter_layers(module: nn.Module, selected: Collection[str]) -> AdapterLayers:
    """The linear layers and ungrouped convolutions whose weights are selected.

    Args:
        module: The denoiser.
        selected: Names of parameters; those that are no such weight stay frozen.

    Raises:
        ValueError: There is none.
    """
    wanted, sizes, grouped = set(selected), {}, []
    for name, layer in module.named_modules():
        if f"{name}.weight" not in wanted or not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
            continue
        if isinstance(layer, _CONVOLUTIONS) and layer.groups != 1:
            grouped.append(name)
        else:
            shape = shape_of(layer.weight)
            sizes[name] = shape[0], shape[1:].numel()
    if not sizes:
        raise ValueError(
            f"none of the {len(wanted)} selected parameters is the weight of a linear layer or of an ungrouped "
            "convolution, which alone take an adapter: choose another train_method, or leave adapter out"
        )
    return AdapterLayers(sizes, tuple(grouped))


def check_takes_adapters(objective: Objective) -> None:
    """Refuse a model for which diffusers loads no adapters.

    Raises:
        ValueError: It does not.
    """
    pipeline, part = getattr(objective, "pipeline", None), getattr(objective, "denoiser", None)
    if part not in getattr(pipeline, "_lora_loadable_modules", ()) or not hasattr(objective.module, "add_adapter"):
        name = type(objective if pipeline is None else pipeline).__name__
        raise ValueError(
            f'adapter="lora": diffusers loads no such files into a {name}. Train the weights themselves: leave adapter '
            "out"
        )


class LowRankAdapter:
    """An adapter on layers of a module: each weight `W` becomes `W + B A`, alpha being the rank.

    Args:
        module: The denoiser; it is changed in place until `remove`.
        layers: Names of the layers.
        rank: Of the update.
        seed: Of A; B begins as zeros.

    Attributes:
        layers: Name of a base weight -> the layer of peft that holds A and B.
        parameters: Name in the module -> parameter: all of A and B, in float32 whatever the weights are held in.
    """

    def __init__(self, module: nn.Module, layers: Collection[str], rank: int, seed: int = 0) -> None:
        self.module, self.rank = module, rank
        self._flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module.add_adapter(_config(module, rank, layers), adapter_name=_TRAINED)
        self.layers: dict[str, LoraLayer] = {
            f"{name}.weight": layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)
        }
        assert self.layers.keys() == {f"{name}.weight" for name in layers}
        # Of weights in half precision too, where small updates would not add up.
        for layer in self.layers.values():
            for value in factors(layer):
                value.data = value.data.float()
        own = {id(value) for layer in self.layers.values() for value in factors(layer)}
        self.parameters = {name: value for name, value in module.named_parameters() if id(value) in own}

    def state(self) -> dict[str, torch.Tensor]:
        """A and B on the CPU, by the names that a file has."""
        found = get_peft_model_state_dict(self.module, adapter_name=_TRAINED)
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def remove(self) -> None:
        """Give the module its own layers and flags back."""
        self.module.unload_lora()
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(self._flags[name])


def factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A, `[rank, columns]`, and B, `[rows, rank]`, of a layer, as its kind of layer has them (a convolution's have
    further axes)."""
    return layer.lora_A[_TRAINED].weight, layer.lora_B[_TRAINED].weight


def _config(module: nn.Module, rank: int, layers: Collection[str]) -> LoraConfig:
    # A name stands for all layers that end in it, unless the whole is a regular expression.
    others = [name for name, _ in module.named_modules() if name not in layers]
    reaches_others = any(other.endswith(f".{name}") for name in layers for other in others)
    names = "|".join(map(re.escape, sorted(layers))) if reaches_others else sorted(layers)
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names)


def layers_of_state(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the layers of an adapter's matrices."""
    return sorted({name.rsplit(".lora_", 1)[0] for name in state})


def save_adapter(
    objective: Objective, state: Mapping[str, torch.Tensor], rank: int, folder: Path, told: Mapping[str, Any]
) -> None:
    """Write an adapter as `pytorch_lora_weights.safetensors`, by the pipeline's own `save_lora_weights`.

    Args:
        objective: The model that it is for.
        state: A and B, as of `LowRankAdapter.state`.
        rank: Of the adapter, and its alpha.
        folder: A folder that nobody reads yet.
        told: Further entries of the file's header, which programs that know none of them leave alone.
    """
    part = objective.denoiser  # type: ignore[attr-defined]
    config = _config(objective.module, rank, layers_of_state(state)).to_dict()
    # Loaders hand all of it to their own peft, which may be older than ours and refuses what it does not know.
    config = {name: config[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    if isinstance(config["target_modules"], (set, list)):
        config["target_modules"] = sorted(config["target_modules"])
    objective.pipeline.save_lora_weights(  # type: ignore[attr-defined]
        folder, **{f"{part}_lora_layers": dict(state), f"{part}_lora_adapter_metadata": config}
    )
    file = folder / ADAPTER_FILE
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    told = {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in told.items()}  # fmt: skip
    file.write_bytes(ordered(save(load_file(file), metadata={**header, **told})))


def read_adapter(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The matrices in a folder's adapter file, by the names that they have there, and the file's header.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    header = read_header(Path(folder) / ADAPTER_FILE)
    return load_file(Path(folder) / ADAPTER_FILE), header


def read_header(file: Path) -> dict[str, str]:
    """The header of an adapter's file.

    Raises:
        ValueError: The file is not there, or damaged.
    """
    if fault := (weights_fault(file) if file.is_file() else f"{file} is missing: give the folder of an adapter"):
        raise ValueError(fault)
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def rank_of(file: Path) -> int:
    """The highest rank that an adapter's file has of a layer; 0 of one that holds no matrices."""
    with safe_open(file, "pt") as opened:
        return max((min(opened.get_slice(name).get_shape()[:2]) for name in opened.keys()), default=0)  # noqa: SIM118


def header_list(header: Mapping[str, str], name: str) -> list[str]:
    """A list of texts in an adapter's header; empty where there is none."""
    try:
        values = json.loads(header.get(name, "[]"))
    except ValueError:
        return []
    return [str(value) for value in values] if isinstance(values, list) else []


def find_adapter(name_or_path: str, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
    """The adapter's file of a folder, or of a name on the Hub, that holds an adapter and no pipeline; else None."""
    folder = Path(name_or_path)
    if folder.is_dir():
        file = folder / ADAPTER_FILE
        return file if file.is_file() and not (folder / DiffusionPipeline.config_name).is_file() else None
    if folder.exists():
        return None
    place = {"revision": revision, "cache_dir": cache_dir, "etag_timeout": _TIMEOUT_SECONDS}
    # What the Hub does not say, loading does; the kinds of its errors depend on its HTTP library.
    with contextlib.suppress(Exception):
        hf_hub_download(name_or_path, DiffusionPipeline.config_name, **place)
        return None
    with contextlib.suppress(Exception):
        return Path(hf_hub_download(name_or_path, ADAPTER_FILE, **place))
    return None


def load_adapter(objective: Objective, file: Path) -> None:
    """Load an adapter into a model, at full strength, as a user does.

    Raises:
        ValueError: The model takes none, or the adapter is another model's, or for text encoders too.
    """
    check_takes_adapters(objective)
    read_header(file)
    pipeline = objective.pipeline  # type: ignore[attr-defined]
    with safe_open(file, "pt") as opened:
        layers = layers_of_state(dict.fromkeys(opened.keys()))
    part = f"{objective.denoiser}."  # type: ignore[attr-defined]
    if others := sorted({name.split(".")[0] for name in layers if name.startswith("text_encoder")}):
        raise ValueError(
            f"{file} has matrices for the {' and '.join(others)} too, and only those of the {part[:-1]} are taken: "
            "load it in Python, then pipeline.fuse_lora(), pipeline.unload_lora_weights() and "
            "pipeline.save_pretrained(), and give that folder"
        )
    verbosity = logging.get_verbosity()
    # That nothing in the file is for the text encoders is as it should be; what fails is told below.
    logging.set_verbosity(logging.CRITICAL)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=LOADED)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, re.error) as error:
        unload_adapter(objective)
        raise ValueError(f"{file} could not be loaded into a {type(pipeline).__name__} ({shown_error(error)}): it "
                         "belongs to another base model, or is damaged") from error  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    loaded = {name for name, layer in objective.module.named_modules() if isinstance(layer, LoraLayer)}
    named = {name.removeprefix(part) for name in layers}
    if loaded != named:
        unload_adapter(objective)
        other = sorted(loaded ^ named)[0]
        raise ValueError(
            f"{file} belongs to another base model, or names its layers as another program does: {other} is in one of "
            "the two only"
        )
    own = {name: value for name, value in objective.module.named_parameters() if ".lora_" in name}
    # A header that speaks of more than the file holds leaves parameters without values.
    broken = [name for name, value in own.items() if value.is_meta or not torch.isfinite(value).all()]
    if broken or not own:
        unload_adapter(objective)
        what = f"{broken[0]} is not finite, or without values" if broken else "it holds no matrices"
        raise ValueError(f"{file} is damaged ({what}): download it again, or train it again")


def with_adapter(objective: Objective, file: Path) -> Objective:
    """A model with an adapter in it; see `load_adapter`."""
    load_adapter(objective, file)
    return objective


def hold_quantized(objective: Objective, kind: str | None) -> None:
    """See to it that the denoiser below an adapter is quantised as the setting says: while it was loaded, or now.

    Raises:
        ValueError: It is quantised otherwise, or cannot be, or diffusers loads no adapters for it.
    """
    if kind is not None:
        check_takes_adapters(objective)
        if quantization_of(objective.module) is None:
            quantize_(objective.module, kind)
    check_quantized(objective.module, kind)
    lighten_(objective.module)


def unload_adapter(objective: Objective) -> None:
    """Take an adapter out again: the model has its own layers, bit by bit."""
    objective.pipeline.unload_lora_weights()  # type: ignore[attr-defined]
    for parameter in objective.module.parameters():
        parameter.requires_grad_(kind_of(parameter) is None)


def has_adapter(objective: Objective) -> bool:
    """Whether an adapter is loaded."""
    return any(isinstance(layer, LoraLayer) for layer in objective.module.modules())


def fuse_adapter(objective: Objective) -> None:
    """Add a loaded adapter to the weights, for good.

    Raises:
        ValueError: It is of a kind that is not fused into them, by biases of its own, say.
    """
    pipeline = objective.pipeline  # type: ignore[attr-defined]
    try:
        pipeline.fuse_lora(components=[objective.denoiser])  # type: ignore[attr-defined]
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"the adapter cannot be fused into the weights ({shown_error(error)}): load it as it is"
        ) from error
    unload_adapter(objective)


def check_kohya(objective: Objective, layers: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Refuse, before anything is trained, an export that would not come back whole.

    Args:
        objective: The model.
        layers: Name of a layer -> rows and columns of its weight.
        rank: Of the adapter.

    Raises:
        ValueError: diffusers does not convert this kind of model, or loses a layer, which is named.
    """
    state = {}
    weights = dict(objective.module.named_parameters())
    for number, (name, (rows, _)) in enumerate(layers.items()):
        shape = shape_of(weights[f"{name}.weight"])
        further = [1] * (len(shape) - 2)
        state[f"{name}.lora_A.weight"] = torch.full((rank, *shape[1:]), float(number))
        state[f"{name}.lora_B.weight"] = torch.full((rows, rank, *further), number + 0.5)
    kohya_state(objective, state)


def kohya_state(objective: Objective, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter under the names of kohya's scripts, converted back and compared.

    Raises:
        ValueError: As of `check_kohya`.
    """
    part, pipeline = objective.denoiser, objective.pipeline  # type: ignore[attr-defined]
    if part != "unet":
        raise ValueError(
            f'lora_format="kohya": diffusers does not convert adapters of a {type(pipeline).__name__}: leave it out'
        )
    made = convert_state_dict_to_kohya({f"{part}.{name}": value for name, value in state.items()})
    back, alphas = pipeline.lora_state_dict(dict(made), unet_config=objective.module.config)
    back = {name.removeprefix(f"{part}."): value for name, value in convert_unet_state_dict_to_peft(back).items()}
    lost = [name for name, value in state.items() if name not in back or not torch.equal(back[name], value)]
    if lost or len(back) != len(state) or len(alphas) != len(state) // 2:
        layers = layers_of_state(dict.fromkeys(lost or back.keys() ^ state.keys()))
        raise ValueError(
            f'lora_format="kohya": {len(layers)} of {len(layers_of_state(state))} layers do not come back from it, '
            f"such as {', '.join(layers[:2])}: leave it out, or choose a train_method without them"
        )
    return made


def export_kohya(objective: Objective, folder: Path, target: Path) -> None:
    """Write a folder's adapter a second time, under the names of kohya's scripts.

    Args:
        objective: The model that it is for.
        folder: Where the adapter is.
        target: The folder that it goes into.

    Raises:
        ValueError: As of `check_kohya`.
    """
    state, header = read_adapter(folder)
    part = f"{objective.denoiser}."  # type: ignore[attr-defined]
    made = kohya_state(objective, {name.removeprefix(part): value for name, value in state.items()})
    told = {name: value for name, value in header.items() if name != LORA_ADAPTER_METADATA_KEY}
    content = save({name: value.contiguous() for name, value in made.items()}, told)
    write_bytes(target / KOHYA_FILE, ordered(content))
