"""What is trained, where it started, and the model as it was."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from ..families.adapters import LowRankAdapter, factors
from ..families.base import Denoiser
from ..quantization import stand_in


class Trainable(Protocol):
    """What elastic weight consolidation and the loop know of the weights in training.

    It is made after `accelerator.prepare`, which may have put other tensors in place of the parameters.

    Attributes:
        parameters: Name and trained parameter.
        weights: Name and weight of the model that the training shifts; of an adapter, the shapes of those that it is
            added to, on their device.
        teacher: The model as it was, called as the module is; made before the first step.
    """

    parameters: dict[str, nn.Parameter]
    weights: Mapping[str, torch.Tensor]

    @property
    def teacher(self) -> Denoiser: ...

    def shift(self, name: str) -> torch.Tensor:
        """`theta - theta*` of a weight, a new tensor."""

    def add_gradient_(self, name: str, gradient: torch.Tensor, scale: float) -> None:
        """Add a gradient with respect to a weight, times a scale, to the `.grad` of what is trained of it.

        Args:
            name: Of the weight.
            gradient: Of the weight's shape; it may be changed in place.
            scale: Its factor.
        """

    def undo(self) -> None:
        """Let the parameters be what they were at first."""


@contextlib.contextmanager
def in_float32(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, torch.dtype]]:
    """Hold parameters in float32 meanwhile, where small updates add up; afterwards they are rounded to what they were.

    Args:
        parameters: Name and parameter; the tensors behind them are replaced.

    Returns:
        Name, and the type that the parameter had.
    """
    types = {name: parameter.dtype for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    try:
        yield types
    finally:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.data = parameter.data.to(types[name])


class FullWeights:
    """Selected parameters of a module, trained in place; theta* is a copy of them, made when it is first asked for.

    Args:
        module: The module; None where no teacher is asked for.
        parameters: Name and parameter.
        types: Name, and the type that theta* is kept in without loss, as it was loaded. Default: the parameter's.
    """

    def __init__(
        self,
        module: nn.Module | None,
        parameters: Mapping[str, nn.Parameter],
        types: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.module = module
        self.parameters = dict(parameters)
        self.weights = self.parameters
        self.types = types or {}

    @cached_property
    def anchor(self) -> dict[str, torch.Tensor]:
        """Name and theta*."""
        return {
            name: parameter.detach().to(self.types.get(name, parameter.dtype), copy=True)
            for name, parameter in self.parameters.items()
        }

    @cached_property
    def teacher(self) -> "FrozenModule":
        assert self.module is not None
        return FrozenModule(self.module, self.anchor)

    def shift(self, name: str) -> torch.Tensor:
        return self.parameters[name] - self.anchor[name]

    def add_gradient_(self, name: str, gradient: torch.Tensor, scale: float) -> None:
        accumulate_(self.parameters[name], gradient, scale)

    @torch.no_grad()
    def undo(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.anchor[name])


class AdapterWeights:
    """The matrices A and B of an adapter, trained in place of the weights that it is added to.

    The model as it was is the same module with the adapter switched off: there is no copy of it. What is known of one
    weight's update `B A` is made and let go before that of the next.

    Args:
        module: The module that holds the adapter.
        parameters: Name and parameter: all of A and B.
        adapter: The adapter.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], adapter: LowRankAdapter) -> None:
        self.module = module
        self.parameters = dict(parameters)
        self.layers = adapter.layers
        self.weights = {name: stand_in(layer.get_base_layer().weight) for name, layer in self.layers.items()}
        self._start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @cached_property
    def teacher(self) -> "SwitchedOff":
        return SwitchedOff(self.module)

    def shift(self, name: str) -> torch.Tensor:
        first, second = factors(self.layers[name])
        return (second.flatten(1) @ first.flatten(1)).view(self.weights[name].shape)

    def add_gradient_(self, name: str, gradient: torch.Tensor, scale: float) -> None:
        # Of a function of W + B A: with G its gradient there, that of A is B^T G, and that of B is G A^T.
        first, second = factors(self.layers[name])
        of_update = gradient.flatten(1)
        of_first, of_second = second.flatten(1).T @ of_update, of_update @ first.flatten(1).T
        accumulate_(first, of_first, scale)
        accumulate_(second, of_second, scale)

    @torch.no_grad()
    def undo(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self._start[name])


class FrozenModule:
    """The trainable module as it was: called with the parameters theta*, without a second copy of the rest."""

    def __init__(self, module: nn.Module, anchor: Mapping[str, torch.Tensor]) -> None:
        self.module = module
        self.anchor = dict(anchor)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        training = self.module.training
        self.module.eval()
        try:
            return torch.func.functional_call(self.module, self.anchor, args, kwargs)
        finally:
            self.module.train(training)


class SwitchedOff:
    """The module as it was: called with its adapter switched off.

    Switching changes which parameters ask for a gradient, and gradient checkpointing runs a forward pass again in the
    backward pass: it must not be called between the two.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        training = self.module.training
        self.module.eval()
        self.module.disable_adapters()
        try:
            return self.module(*args, **kwargs)
        finally:
            self.module.enable_adapters()
            self.module.train(training)


def accumulate_(parameter: nn.Parameter, gradient: torch.Tensor, scale: float) -> None:
    """Add a gradient, times a scale, to a parameter's own; the given tensor may be changed in place."""
    gradient = gradient.view(parameter.shape)
    if parameter.grad is None:
        parameter.grad = gradient.mul_(scale)
    else:
        parameter.grad.add_(gradient, alpha=scale)
