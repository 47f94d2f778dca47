"""A base model whose linear layers are held in fewer bits, for an adapter to be trained on (QLoRA; Dettmers et al.,
2023)."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import (
    is_bitsandbytes_available,
    is_bitsandbytes_version,
    is_torchao_available,
    is_torchao_version,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# What quantises, and its oldest version that works: diffusers' own limit, and the one that was tried.
_PACKAGES = {"nf4": ("bitsandbytes", "0.43.3"), "fp8": ("torchao", "0.18"), "int8": ("torchao", "0.18")}
_CLASSES = {"Int8Tensor": "int8", "Float8Tensor": "fp8"}
# Of nf4: numbers that share a scale of 8 bits, and scales that share one of 32 (the paper's double quantisation).
_BLOCK, _BLOCKS = 64, 256


def check_quantization(kind: str, has_cuda: bool) -> None:
    """Refuse, before the work, what cannot be done here.

    Args:
        kind: `"nf4"`, `"fp8"` or `"int8"`.
        has_cuda: Whether there is a CUDA device.

    Raises:
        ValueError: It needs a device, or a package, that is not there.
    """
    if kind == "nf4" and not has_cuda:
        raise ValueError('base_quantization="nf4" needs a CUDA device and there is none: use "int8" or "fp8"')
    package, oldest = _PACKAGES[kind]
    is_there, is_version = {
        "bitsandbytes": (is_bitsandbytes_available, is_bitsandbytes_version),
        "torchao": (is_torchao_available, is_torchao_version),
    }[package]
    if not is_there() or is_version("<", oldest):
        raise ValueError(
            f'base_quantization="{kind}" needs {package} {oldest} or newer: pip install -U {package}, or leave it out'
        )


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """What diffusers takes to quantise a model while it loads it.

    Args:
        kind: As of `check_quantization`.
        dtype: Of the weights that are not quantised; products are computed in it.
    """
    # Their modules are imported when they are asked for, which takes a while.
    if kind == "nf4":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def quantize_(module: nn.Module, kind: str) -> None:
    """Quantise a model that is in memory, as diffusers would have done while it loaded it.

    Raises:
        ValueError: Weights in memory do not become `nf4`.
    """
    if kind == "nf4":
        raise ValueError(
            'base_quantization="nf4" is done while a model is loaded, and this one is in memory already, or comes from '
            'a single file: give its folder or its name on the Hub, or use "int8" or "fp8"'
        )
    from diffusers.quantizers import DiffusersAutoQuantizer
    from torchao.quantization import quantize_ as quantize_in_place

    config = quantization_config(kind, module.dtype)
    wanted = quantizable(module)
    quantize_in_place(module, config.get_apply_tensor_subclass(), filter_fn=lambda _, name: name in wanted)
    # Whoever adds adapters looks here for how to quantise what is merged.
    module.hf_quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)


def lighten_(module: nn.Module) -> None:
    """Let quantised layers keep no dequantised weights for the backward pass, where their package does."""
    for layer in module.modules():
        if type(layer) is nn.Linear and kind_of(layer.weight) in _CLASSES.values():
            layer.__class__ = QuantizedLinear


def leave_to_each_process(module: nn.Module) -> None:
    """Let processes that train together not send each other quantised weights, which all of them have loaded, and which
    cannot be sent."""
    names = [name for name, value in module.named_parameters() if kind_of(value) is not None]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def quantizable(module: nn.Module) -> set[str]:
    """Names of the layers of a model that are quantised: the linear ones, but for those that it keeps in float32."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return {name for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and not kept & set(name.split("."))}  # fmt: skip


def kind_of(weight: torch.Tensor) -> str | None:
    """How a weight is quantised, in one word; None where it is not."""
    package = type(weight).__module__.partition(".")[0]
    if package == "bitsandbytes":
        state = getattr(weight, "quant_state", None)
        return None if state is None else str(state.quant_type)
    if package == "torchao":
        name = type(weight).__name__
        return _CLASSES.get(name, name)
    return None


def quantization_of(module: nn.Module) -> str | None:
    """How a model is quantised, in one word; None where it is not."""
    kinds = {kind_of(parameter) for parameter in module.parameters()} - {None}
    return " and ".join(sorted(map(str, kinds))) or None


def check_quantized(module: nn.Module, wanted: str | None) -> None:
    """Refuse a model that is quantised otherwise than the setting says.

    Raises:
        ValueError: It is.
    """
    found = quantization_of(module)
    if found == wanted:
        return
    if found is None:
        raise ValueError(f'base_quantization="{wanted}", and the model is not quantised: load it so, or leave it out')
    if found in _PACKAGES:
        raise ValueError(
            f'the model is quantised to {found}: give adapter="lora" and base_quantization="{found}", or load it in '
            "its own precision"
        )
    raise ValueError(
        f"the model is quantised to {found}, which is not one of {', '.join(_PACKAGES)}: load it in its own precision"
    )


def shape_of(weight: torch.Tensor) -> torch.Size:
    """The shape of a weight, however it is held."""
    state = getattr(weight, "quant_state", None)
    return torch.Size(state.shape) if state is not None else weight.shape


def plain_layer(layer: nn.Linear) -> nn.Linear:
    """A linear layer like a quantised one, of plain weights without values: on the device `meta`."""
    state = getattr(layer.weight, "quant_state", None)
    dtype = layer.weight.dtype if state is None else state.dtype
    return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype)


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a weight stands for; itself where it is not quantised."""
    kind = kind_of(weight)
    if kind is None:
        return weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


def stand_in(weight: torch.Tensor) -> torch.Tensor:
    """A tensor of a weight's device and shape, which takes no memory and has no values of use."""
    return torch.zeros((), device=weight.device).expand(shape_of(weight))


def quantized_bytes(kind: str, rows: int, columns: int) -> int:
    """What the weight of a linear layer takes: of `nf4` 4.127 bits a number, of the others 8 and a scale for each row.

    Args:
        kind: As of `check_quantization`.
        rows: Of the weight.
        columns: Likewise.
    """
    numbers = rows * columns
    if kind == "nf4":
        blocks = math.ceil(numbers / _BLOCK)
        return math.ceil(numbers / 2) + blocks + 4 * math.ceil(blocks / _BLOCKS)
    # int8 keeps a zero point for each row beside its scale.
    return numbers + rows * (5 if kind == "int8" else 4)


@contextlib.contextmanager
def differentiable(module: nn.Module, parameters: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors to differentiate by in place of parameters: themselves, but for quantised weights, without gradients.

    In place of such a weight it is an update of it, which is zero and takes no memory: the derivative is that of the
    dequantised weight, the gradient of the layer's output times its input.

    Args:
        module: That has the parameters; its layers are hooked meanwhile.
        parameters: Name and parameter.
    """
    found, handles = dict(parameters), []
    for name, parameter in parameters.items():
        if kind_of(parameter) is not None:
            update = found[name] = stand_in(parameter).requires_grad_()
            layer = module.get_submodule(name.rpartition(".")[0])
            handles.append(layer.register_forward_hook(functools.partial(_with_update, update)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _with_update(update: torch.Tensor, layer: nn.Module, given: tuple, output: torch.Tensor) -> torch.Tensor:
    return _Updated.apply(output, given[0], update)


class _Updated(torch.autograd.Function):
    """What a linear layer gives, with the gradient of an update of its weight that is zero."""

    @staticmethod
    def forward(context: Any, output: torch.Tensor, given: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(given)
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        (given,) = context.saved_tensors
        rows = gradient.flatten(0, -2)
        return gradient, None, (rows.T @ given.flatten(0, -2).to(rows.dtype)).float()


class QuantizedLinear(nn.Linear):
    """A linear layer of a quantised weight that is dequantised again in the backward pass.

    Left to autograd, every such layer keeps its dequantised weight until then: together the model that was not to be
    held.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Dequantizing.apply(input, self.weight, self.bias)


class _Dequantizing(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        device = given.device.type
        context.weight = weight
        context.given = given.dtype
        context.half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else given.dtype
        # Under autocast as any linear layer's: scales in float32 would make float32 of it.
        return F.linear(given, weight, bias).to(context.half)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        of_input = of_bias = None
        if context.needs_input_grad[0]:
            weight = context.weight.dequantize().to(context.half)
            of_input = (gradient.to(context.half) @ weight).to(context.given)
        if context.needs_input_grad[2]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_input, None, of_bias
