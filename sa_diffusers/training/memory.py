"""What a training takes of a device's memory, before anything is there: an estimate, and what would make it less."""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from ..configuration import SelectiveAmnesiaConfig
from ..families import modules_of
from ..families.adapters import LowRankAdapter, adapter_layers
from ..families.base import Conditions, Objective
from ..fisher.estimator import rows_of_a_square
from ..footprint import as_in_autocast, bytes_of, checkpointing, fits_beside, peak_bytes, values_between, without_values
from ..quantization import quantizable, quantized_bytes
from .settings import adapted_layers

_FLOAT = 4
# Bytes that an optimiser keeps of each parameter: Prodigy two moments, the start and a sum; AdamW its moments.
_PRODIGY, _ADAMW = 16, 8
# Two moments of a byte each, and a scale of four for each block of 256; small tensors have AdamW's own.
_8BIT, _SMALL = 2 + 2 * 4 / 256, 4096
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Memory:
    """Bytes that a training takes of one device, about.

    Attributes:
        weights: The network that is trained; what is trained in float32.
        gradients: Of what is trained: the selected weights, or the matrices of an adapter on them.
        optimizer: What the optimiser keeps.
        average: The averaged weights.
        anchor: theta*, which the frozen model that teaches is called with.
        fisher: Fisher information.
        activations: What a forward and backward pass holds at its peak beside all that; None where it could not be
            counted.
        rows: Rows of that pass.
        step: What the optimiser's step takes meanwhile.
        estimating: What estimating Fisher information takes beside the weights, before: one weight's gradient at a
            time, and, unless that is on the CPU or taken as rows by columns, a sum of squares and one sample's
            gradients summed over timesteps, of all selected weights. What its passes hold comes on top.
        estimating_rows: Rows of those passes.
        encoding: Text encoders, while they are in use.
        decoding: The autoencoder and what it makes of one image, while it is in use.
        draws: Whether images are sampled while it trains; else these two are in use before, beside the weights alone.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    anchor: int
    fisher: int
    activations: int | None
    rows: int
    step: int = 0
    estimating: int = 0
    estimating_rows: int = 1
    encoding: int = 0
    decoding: int = 0
    draws: bool = False

    @property
    def kept(self) -> int:
        """What is there all along."""
        return self.weights + self.gradients + self.optimizer + self.average + self.anchor + self.fisher

    @property
    def total(self) -> int:
        """The peak: in the passes, in the optimiser's step, or where prompts or images are encoded or decoded."""
        training = self.kept + max(self.activations or 0, self.step, self.decoding if self.draws else 0)
        # The network waits on the CPU where text encoders find no room beside it.
        encoding = self.encoding + (self.kept - self.weights if self.draws else 0)
        return max(training, encoding, self.weights + self.decoding, self.before)

    @property
    def before(self) -> int:
        """What estimating Fisher information takes, its passes included; 0 without."""
        passes = (self.activations or 0) // max(self.rows, 1) * self.estimating_rows
        return self.weights + self.estimating + passes if self.estimating else 0

    def parts(self) -> dict[str, int]:
        """What takes memory, in words."""
        named = {
            "weights": self.weights, "gradients": self.gradients, "optimiser": self.optimizer, "average": self.average,
            "theta*": self.anchor, "Fisher information": self.fisher,
            f"activations of {self.rows} rows": self.activations or 0,
        }  # fmt: skip
        return {name: size for name, size in named.items() if size}


def blank_of(objective: Objective) -> Objective:
    """The model without its weights, on the device `meta`."""
    pipeline = getattr(objective, "pipeline", None)
    modules = [objective.module, *(modules_of(pipeline) if pipeline is not None else [])]
    components = pipeline.components.values() if pipeline is not None else ()
    # Tokenizers are large, and nothing is changed in them.
    return without_values(objective, modules, [part for part in components if callable(getattr(part, "encode", None))
                                               and not isinstance(part, nn.Module)])  # fmt: skip


def shapes_of(blank: Objective, prompt: str, resolution: int | None = None) -> tuple[torch.Tensor, Conditions]:
    """One sample and the conditions of one prompt, on the device `meta`; on the CPU what a family reads the values of.

    Args:
        blank: As `blank_of` gives it.
        prompt: Any, or a class.
        resolution: Height and width in pixels. Default: the model's own.
    """
    size = resolution or blank.resolution
    channels = blank.channels
    pipeline = getattr(blank, "pipeline", None)
    encoders = [part for part in modules_of(pipeline) if part is not blank.module] if pipeline is not None else []
    with torch.no_grad():
        with values_between(encoders):
            conditions = blank.encode_prompts([prompt])
        samples = blank.encode_images(torch.zeros(1, channels, size, size, device="meta"), 0)
    return samples, {
        name: value if name in blank.lengths else value.to("meta") for name, value in conditions.items()
    }  # fmt: skip


def training_memory(
    objective: Objective,
    config: SelectiveAmnesiaConfig,
    shapes: tuple[torch.Tensor, Conditions] | None = None,
    prompt: str = "",
    precision: str | None = None,
    processes: int = 1,
    on_cuda: bool = True,
    counts_activations: bool = True,
) -> Memory:
    """What training a model takes of a device, by its shapes alone: nothing is computed.

    Args:
        objective: The model; its weights are not looked at, and may be on the device `meta`.
        config: The settings.
        shapes: One sample and its conditions. Default: found out by `shapes_of`.
        prompt: For that.
        precision: Mixed precision. Default: as the settings say, else none.
        processes: That train together.
        on_cuda: Whether the device is a GPU, where AdamW takes one more copy for a step.
        counts_activations: Else nothing but what is kept is counted, which takes no time.
    """
    blank = blank_of(objective)
    for part in objective.optional_parts if config.no_t5 else ():
        setattr(blank.pipeline, part, None)  # type: ignore[attr-defined]
    parameters = blank.select(config.train_method)
    half = getattr(torch, config.weights_dtype)
    selected = trained = sum(parameter.numel() for parameter in parameters.values())
    # On a CPU it is no other place.
    elsewhere = config.fisher_on_cpu and on_cuda
    small = sum(value.numel() for value in parameters.values() if value.numel() < _SMALL)
    sizes = None
    if config.adapter is not None:
        # Its matrices are trained in place of the weights; the teacher is the network without it.
        layers = adapter_layers(blank.module, parameters)
        sizes = layers.sizes.values() if config.fisher_form == "rows_by_columns" else None
        trained, small = layers.numbers(config.lora_rank), 0
        selected = sum(rows * columns for rows, columns in layers.sizes.values())
        if config.fisher_form == "rows_by_columns":
            selected, elsewhere = sum(map(sum, layers.sizes.values())), False
    compute = _HALVES.get(precision or config.precision or "no", half)
    loaded = {name: half if half.itemsize < value.element_size() else value.dtype for name, value in parameters.items()}
    _set_types(blank.module, parameters if config.adapter is None else {}, half)
    weights = bytes_of((*blank.module.parameters(), *blank.module.buffers()))
    again = 0
    if config.base_quantization is not None:
        weights, again = _quantized(blank.module, config.base_quantization, weights, compute)
    if config.adapter is not None:
        weights += _FLOAT * trained
    rows = config.train_batch_size * (2 if config.replays else 1)
    needs_anchor = config.adapter is None and (config.consolidates or config.probes or config.target == "frozen")
    optimizer = (_PRODIGY if config.learning_rate is None else _ADAMW) * trained
    if config.use_8bit_adam:
        optimizer = math.ceil(_8BIT * (trained - small)) + _ADAMW * small
    steps_at_once = on_cuda and config.learning_rate is not None and not config.use_8bit_adam
    matrices: Mapping[str, nn.Parameter] = parameters
    activations = encoding = decoding = None
    if counts_activations:
        with contextlib.suppress(*_UNCOUNTED):
            shapes = shapes or shapes_of(blank, prompt, config.resolution)
            if config.adapter is not None:
                with torch.device("meta"):
                    matrices = LowRankAdapter(blank.module, layers.sizes, config.lora_rank).parameters
            activations = again + activation_bytes(
                blank, matrices, *shapes, rows, precision or config.precision or "no", config.gradient_checkpointing,
                config.target == "frozen",
            )  # fmt: skip
        with contextlib.suppress(*_UNCOUNTED):
            encoding, decoding = in_use_bytes(blank, shapes)
    estimating, estimating_rows = (
        _estimating(config, parameters, sizes, blank.num_train_timesteps, (activations or 0) // rows, on_cuda)
        if config.consolidates and config.fisher is None else (0, 1)
    )  # fmt: skip
    return Memory(
        weights=weights,
        # Processes that train together gather them in as much again.
        gradients=_FLOAT * trained * (2 if processes > 1 else 1),
        optimizer=optimizer,
        average=_FLOAT * trained * config.use_ema,
        anchor=sum(value.numel() * loaded[name].itemsize for name, value in parameters.items()) * needs_anchor,
        fisher=getattr(torch, config.fisher_dtype).itemsize * selected * (config.consolidates and not elsewhere),
        activations=activations,
        rows=rows,
        step=_FLOAT * trained * steps_at_once,
        estimating=estimating,
        estimating_rows=estimating_rows,
        draws=bool(config.validation_prompts or (config.stops and config.classifier)),
        encoding=encoding or 0,
        decoding=decoding or 0,
    )


def _estimating(
    config: SelectiveAmnesiaConfig,
    parameters: Mapping[str, nn.Parameter],
    sizes: Collection[tuple[int, int]] | None,
    timesteps: int,
    of_a_row: int,
    on_cuda: bool,
) -> tuple[int, int]:
    """What estimating Fisher information takes beside the weights, and the rows of its passes, as few as there may be.

    Args:
        config: The settings.
        parameters: That are selected.
        sizes: Rows and columns of those that are taken so; None where the diagonal is.
        timesteps: Of the model.
        of_a_row: What a row's passes take.
        on_cuda: Whether the CPU is another place.
    """
    numbers = [value.numel() for value in parameters.values()] if sizes is None else [math.prod(each) for each in sizes]
    elsewhere = config.fisher_on_cpu and on_cuda
    if sizes is None:
        return _FLOAT * (max(numbers) + (0 if elsewhere else 2 * sum(numbers))), 1
    sums = sum(map(sum, sizes))
    # The gradients of all are held where the passes of a square find no room together.
    apart = _FLOAT * (max(numbers) + sums + (0 if elsewhere else sum(numbers))), 1
    rows = rows_of_a_square(config.fisher_kind, min(config.fisher_timesteps or timesteps, timesteps))
    if rows > config.fisher_batch_size:
        return apart
    together = 2 * _FLOAT * (max(numbers) + sums), rows
    return min(together, apart, key=lambda way: way[0] + way[1] * of_a_row)


# A model that does what shapes alone do not tell cannot be counted; its run goes on.
_UNCOUNTED = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError)


def _quantized(module: nn.Module, kind: str, weights: int, compute: torch.dtype) -> tuple[int, int]:
    """What weights take once linear layers are quantised, of what they took; and the largest, dequantised for its
    products, in whose type all of them are left here."""
    largest = 0
    layers = dict(module.named_modules())
    for name in quantizable(module):
        weight = layers[name].weight
        size = weight.numel() * weight.element_size()
        weights += quantized_bytes(kind, *weight.shape) - size
        largest = max(largest, size)
        weight.data = weight.data.to(compute)
    return weights, largest


def _set_types(module: nn.Module, trained: Mapping[str, nn.Parameter], half: torch.dtype) -> None:
    """What is trained in float32 and requires a gradient; the rest as the weights are loaded, and requires none."""
    for name, parameter in module.named_parameters():
        wanted = torch.float32 if name in trained else parameter.dtype
        if name not in trained and half.itemsize < parameter.element_size():
            wanted = half
        parameter.data = parameter.data.to(wanted)
        parameter.requires_grad_(name in trained)


def activation_bytes(
    blank: Objective,
    parameters: Mapping[str, nn.Parameter],
    samples: torch.Tensor,
    conditions: Conditions,
    rows: int,
    precision: str,
    recomputes: bool,
    has_teacher: bool = False,
) -> int:
    """What a forward and backward pass holds at its peak, beside weights and gradients.

    Args:
        blank: A model on the device `meta`.
        parameters: What is trained of it.
        samples: `[1, ...]`.
        conditions: Each `[1, ...]`.
        rows: Of the pass.
        precision: Mixed precision.
        recomputes: Whether activations are computed again in the backward pass.
        has_teacher: Whether the frozen model is asked for a target before.
    """
    module = blank.module
    module.train()
    if recomputes:
        module.enable_gradient_checkpointing(checkpointing(precision))
    # They are counted by themselves.
    handles = [value.register_post_accumulate_grad_hook(_let_go) for value in parameters.values()]

    def batch() -> tuple[torch.Tensor, Conditions, torch.Tensor, torch.Tensor]:
        given = torch.empty(rows, *samples.shape[1:], device="meta")
        own = {name: value.expand(rows, *value.shape[1:]).contiguous() for name, value in conditions.items()}
        return given, own, torch.zeros(rows, dtype=torch.int64, device="meta"), torch.empty_like(given)

    def passes() -> None:
        # The batch itself is let go of before the backward pass, but for what that needs.
        blank.negative_elbo(module, *batch()).mean().backward()

    @torch.no_grad()
    def teaching() -> None:
        # The teacher has conditions of its own beside the batch's.
        given, _, timesteps, noise = batch()
        blank.predict(module, given, batch()[1], timesteps, noise)

    try:
        with as_in_autocast(precision):
            return max(peak_bytes(passes), peak_bytes(teaching) if has_teacher else 0)
    finally:
        for handle in handles:
            handle.remove()


def _let_go(parameter: torch.Tensor) -> None:
    parameter.grad = None


def in_use_bytes(blank: Objective, shapes: tuple[torch.Tensor, Conditions] | None) -> tuple[int, int]:
    """What text encoders take; and the autoencoder in float32, with what it makes of one image.

    Args:
        blank: A model on the device `meta`.
        shapes: As of `shapes_of`; without, the autoencoder alone is counted.
    """
    pipeline = getattr(blank, "pipeline", None)
    encoders = [handle.encoder for handle in blank.text_encoders()]
    encoding = sum(bytes_of((*encoder.parameters(), *encoder.buffers())) for encoder in encoders)
    vae = getattr(pipeline, "vae", None)
    if vae is None or vae is blank.module:
        return encoding, 0
    vae = vae.float()
    decoding = bytes_of(vae.parameters())
    if shapes is not None:
        with contextlib.suppress(*_UNCOUNTED), torch.no_grad():
            decoding += peak_bytes(lambda: blank.to_images(shapes[0]))  # type: ignore[attr-defined]
    return encoding, decoding


def free_bytes(device: torch.device, weights: int) -> int:
    """What a training may take of a device; on a CPU its weights, which are there already, are part of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available + weights


def changes_for_less(
    config: SelectiveAmnesiaConfig, objective: Objective, on_cuda: bool = True
) -> Iterator[dict[str, Any]]:
    """Settings that would take less memory: one at a time, the harmless ones first, then more and more together."""
    single: list[dict[str, Any]] = []
    if config.train_batch_size > 1:
        # The steps stay the same, to rounding.
        split = config.train_batch_size * config.gradient_accumulation_steps
        single.append({"train_batch_size": 1, "gradient_accumulation_steps": split})
    if not config.gradient_checkpointing and getattr(objective.module, "_supports_gradient_checkpointing", False):
        single.append({"gradient_checkpointing": True})
    if config.consolidates and on_cuda and not config.fisher_on_cpu:
        single.append({"fisher_on_cpu": True})
    if config.consolidates and config.fisher_dtype == "float32":
        single.append({"fisher_dtype": "bfloat16"})
    if config.weights_dtype == "float32" and config.mixed_precision in (None, "bf16") and not objective.own_pipeline:
        single.append({"weights_dtype": "bfloat16"})
    if not config.no_t5 and any(getattr(objective.pipeline, part, None) for part in objective.optional_parts):
        single.append({"no_t5": True})
    if config.adapter is not None and config.consolidates and config.fisher_form == "diagonal":
        single.append({"fisher_form": "rows_by_columns"})
    if config.adapter is not None and config.base_quantization is None and not objective.own_pipeline:
        single.append({"base_quantization": "int8"})
    if config.train_method == "full" and "xattn" in (objective.selections or {}):
        single.append({"train_method": "xattn"})
    yield from single
    for count in range(2, len(single) + 1):
        yield {name: value for change in single[:count] for name, value in change.items()}
    if config.adapter is None:
        # Not every model takes one, nor does every selection.
        with contextlib.suppress(ValueError):
            adapted = config.replace(adapter="lora")
            adapted_layers(adapted, objective)
            yield {"adapter": "lora"}
            yield from ({"adapter": "lora", **change} for change in changes_for_less(adapted, objective, on_cuda))


def as_flags(change: Mapping[str, Any]) -> str:
    """Settings as they are typed."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items())


def memory_plan(
    objective: Objective, config: SelectiveAmnesiaConfig, prompt: str, precision: str, processes: int,
    device: torch.device,
) -> list[str]:  # fmt: skip
    """What a training will take of its device, and what would make it fit where it does not: lines of a plan.

    Args:
        objective: The model; nothing of it need be on the device.
        config: The settings.
        prompt: Any, or a class, that it is trained under.
        precision: Mixed precision in use.
        processes: That train together.
        device: Where.
    """

    def needed(changes: Mapping[str, Any], counts: bool = True) -> Memory:
        changed = config.replace(**changes)
        return training_memory(
            objective, changed, None, prompt, changed.precision or precision, processes, device.type == "cuda", counts
        )

    kept = needed({}, counts=False)
    free = free_bytes(device, kept.weights)
    if kept.kept < _LITTLE * free:
        return [f"memory    {_sized(kept.kept)} for weights and what training keeps of them, of {_sized(free)} that "
                f"are free ({device.type})"]  # fmt: skip
    whole = needed({})
    parts = ", ".join(f"{name} {_sized(size)}" for name, size in whole.parts().items())
    note = "" if whole.activations else "; activations, which cannot be counted for this model, come on top"
    lines = [
        f"memory    about {_sized(whole.total)} at the peak of training, of {_sized(free)} that are free "
        f"({device.type}): {parts}{note}"
    ]
    if device.type != "cpu" and whole.encoding + whole.decoding:
        waits = "" if fits_beside(whole.encoding, free - whole.weights) else "; the network makes room for the first"
        lines.append(f"          while they are in use, {_sized(whole.encoding)} for text encoders and "
                     f"{_sized(whole.decoding)} for the autoencoder; else they are on the CPU{waits}")  # fmt: skip
    if whole.estimating:
        lines.append(f"          before, {_sized(whole.before)} to estimate the Fisher information")
    if whole.total <= free:
        return lines
    tried: list[tuple[int, Mapping[str, Any]]] = [(kept.total, {})]
    for change in changes_for_less(config, objective, device.type == "cuda"):
        # Activations, which take long to count, only where the rest fits.
        bound = needed(change, counts=False).total
        if bound <= free and (found := needed(change)).total <= free:
            return [*lines, f"warning: that is more than is free: {as_flags(change)} would make it "
                            f"{_sized(found.total)}"]  # fmt: skip
        tried.append((bound, change))
    # Of those that keep as little the last, which changes most.
    least = needed(min(reversed(tried), key=lambda one: one[0])[1]).total
    return [*lines, f"warning: that is more than is free, and no flag makes it fit: it takes "
                    f"{_sized(min(least, whole.total))} at the least"]  # fmt: skip


# Of what is free; what keeps so little is counted no further.
_LITTLE = 1 / 200


def _sized(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
