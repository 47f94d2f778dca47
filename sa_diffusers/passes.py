"""What a run costs: how many rows pass through the network, forward and backward."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

# What is being counted, and into what.
_counting: list[tuple[weakref.ref[nn.Module], "Passes"]] = []


@dataclass
class Passes:
    """Rows that pass through the network: one image or latent under one condition each, two with guidance.

    What gradient checkpointing repeats of a forward pass is part of its backward pass.

    Attributes:
        forward: Rows of all forward passes, those of a frozen teacher and of sampling among them.
        backward: Rows of those that a backward pass follows.
    """

    forward: int = 0
    backward: int = 0

    def add(self, other: "Passes") -> None:
        self.forward += other.forward
        self.backward += other.backward

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def read(cls, values: Any) -> "Passes | None":
        """What `to_dict` gave; None where nothing of the kind is on record."""
        if not isinstance(values, Mapping):
            return None
        found = [values.get(name) for name in ("forward", "backward")]
        return cls(*found) if all(isinstance(number, int) for number in found) else None


def together(parts: Iterable[Passes | None]) -> Passes | None:
    """The sum; None where a part is not on record."""
    whole = Passes()
    for part in parts:
        if part is None:
            return None
        whole.add(part)
    return whole


def over_processes(passes: Passes | None, accelerator: Accelerator) -> Passes | None:
    """The sum over all processes, in each of them; all must call it."""
    return together(gather_object([passes])) if accelerator.num_processes > 1 else together([passes])


@contextlib.contextmanager
def counted(module: nn.Module | None, into: Passes | None = None) -> Iterator[Passes]:
    """Count the rows of every call of a module meanwhile, whoever calls it: wrapped, compiled, with other parameters.

    Args:
        module: Takes its rows in the first tensor that it is given; None counts nothing.
        into: What is counted is added to it. Default: a new count.
    """
    passes = Passes() if into is None else into
    if module is None:
        yield passes
        return

    # Compiled code calls it and does not trace it: a count in the graph would be compiled anew at every step.
    @torch.compiler.disable
    def count(_module: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        tensors = (value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor))
        rows = len(next(tensors, ()))  # type: ignore[arg-type]
        passes.forward += rows
        if torch.is_grad_enabled() and _has_gradient(output):
            passes.backward += rows

    handle = module.register_forward_hook(count, with_kwargs=True)
    entry = (weakref.ref(module), passes)
    _counting.append(entry)
    try:
        yield passes
    finally:
        handle.remove()
        # Not by their values, which those of another count may equal.
        _counting[:] = [other for other in _counting if other is not entry]


def count_rows(module: nn.Module, rows: int) -> None:
    """Count rows that pass through a part of a module without a call of the whole, as where a VAE samples."""
    for counting, passes in _counting:
        if counting() is module:
            passes.forward += rows


def _has_gradient(output: Any) -> bool:
    if isinstance(output, torch.Tensor):
        return output.requires_grad
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return any(_has_gradient(part) for part in parts)
