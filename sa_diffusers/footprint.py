"""How much memory a computation takes at its peak, found without any memory: on tensors of shape and type alone."""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from .quantization import kind_of, plain_layer

Copied = TypeVar("Copied")


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Of what is free: what computes there needs room too.
_SPARE = 0.1


def fits_beside(needed: int, free: int) -> bool:
    """Whether what comes onto a device for a while finds room beside what is there.

    Args:
        needed: Bytes that it takes.
        free: Bytes that are free.
    """
    return needed <= (1 - _SPARE) * free


def free_on(device: torch.device) -> int | None:
    """Bytes that are free on a device, those included that torch keeps for itself; None where nobody counts them."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def without_values(thing: Copied, modules: Iterable[nn.Module], kept: Iterable[Any] = ()) -> Copied:
    """A copy whose modules have shapes and types in place of weights: on the device `meta`, in no memory. Quantised
    weights have those that they were quantised from.

    Args:
        thing: What is copied, such as a model in whatever holds it.
        modules: All modules in it.
        kept: What the copy shares with it.
    """
    memo: dict[int, Any] = {id(value): value for value in kept}
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and kind_of(layer.weight) is not None:
                memo[id(layer)] = plain_layer(layer)
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in memo and kind_of(tensor) is None:
                blank = torch.empty_like(tensor, device="meta")
                is_weight = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if is_weight else blank
    return copy.deepcopy(thing, memo)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Bytes that the tensors made in a call hold at its peak; run on `meta`, it computes nothing and takes no memory.

    Attention is counted as the fused kernels take it, which keep no matrix of all places by all places.
    """
    with _Held() as held, _Fused():
        function()
    return held.peak


@contextlib.contextmanager
def values_between(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep tensors on the CPU meanwhile, but for those inside of modules on `meta`.

    How long a text is, and which of its tokens are read, goes by values; what text encoders make of them does not. What
    comes out of a module are zeros, which take no memory.

    Args:
        modules: On `meta`.
    """
    mode = _OnTheCPU()

    def enter(module: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mode.depth += 1
        return tree_map_only(torch.Tensor, lambda value: torch.empty_like(value, device="meta"), (given, named))

    def leave(module: nn.Module, given: tuple, output: Any) -> Any:
        mode.depth -= 1
        return tree_map_only(torch.Tensor, lambda value: torch.zeros((), dtype=value.dtype).expand(value.shape), output)

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _OnTheCPU(TorchFunctionMode):
    """What has values is not moved to where there are none, except inside of modules.

    Attributes:
        depth: Of modules that are being called.
    """

    depth = 0

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.__bool__ and arguments[0].is_meta:
            # Masks are asked whether they can be left out; it makes no difference to shapes.
            return True
        moved = function(*arguments, **(named or {}))
        if function is torch.Tensor.to and not self.depth and moved.is_meta and not arguments[0].is_meta:
            return arguments[0].to(moved.dtype)
        return moved


class _Held(TorchDispatchMode):
    """Adds up the storages that operations make, and takes those away that are let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        output = function(*arguments, **(named or {}))
        # Views of what was there before, as of weights, are nothing new.
        given = None
        for tensor in [output] if isinstance(output, torch.Tensor) else tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key in self._known:
                    continue
                if given is None:
                    given = {value.untyped_storage()._cdata for value in tree_leaves((arguments, named))
                             if isinstance(value, torch.Tensor)}  # fmt: skip
                if key not in given:
                    self._known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._let_go, key, size).atexit = False
        return output

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Fused(TorchFunctionMode):
    """Attention by one operation: on `meta` torch takes it apart, which no device that trains does."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return _fused_attention(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))


def _fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    if key.shape[1] != query.shape[1]:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=None, scale=scale
    )[0]


# What CUDA's autocast runs in half precision and in float32; the rest goes by what it is given.
_HALF = frozenset((
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, torch.mm, torch.einsum,
    torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm, torch.Tensor.baddbmm,
))  # fmt: skip
_WHOLE = frozenset((
    F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax,
))  # fmt: skip


class _Autocast(TorchFunctionMode):
    """What `torch.autocast` does on CUDA, which does not act on `meta`."""

    def __init__(self, half: torch.dtype) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        kind = self.half if function in _HALF else torch.float32 if function in _WHOLE else None
        if kind is not None:
            arguments, named = tree_map_only(
                torch.Tensor, lambda value: value.to(kind) if value.is_floating_point() else value,
                (arguments, dict(named or {})),
            )  # fmt: skip
        return function(*arguments, **(named or {}))


@contextlib.contextmanager
def as_in_autocast(precision: str) -> Iterator[None]:
    """Count meanwhile what is run under mixed precision.

    Args:
        precision: `"no"`, `"bf16"` or `"fp16"`.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with _Autocast(half) if half is not None else contextlib.nullcontext():
        yield


def checkpointing(precision: str) -> Callable[..., Any]:
    """What `enable_gradient_checkpointing` of diffusers takes, so that what is computed again is counted as at first.

    Args:
        precision: As of `as_in_autocast`.
    """

    def run(block: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        def again(*given: Any, **others: Any) -> Any:
            # The backward pass calls it without what was active around the forward pass.
            with _Fused(), as_in_autocast(precision):
                return block(*given, **others)

        return checkpoint(again, *arguments, use_reentrant=False, **named)

    return run
