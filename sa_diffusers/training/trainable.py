"""What is trained, where it started, and the model as it was."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn


class Trainable(Protocol):
    """What elastic weight consolidation and the loop know of the weights in training.

    It is made after `accelerator.prepare`, which may have put other tensors in place of the parameters.

    Attributes:
        parameters: Name and trained parameter.
        teacher: The model as it was, called as the module is; made before the first step.
    """

    parameters: dict[str, nn.Parameter]

    @property
    def teacher(self) -> "FrozenModule": ...

    def shift(self, name: str) -> torch.Tensor:
        """`theta - theta*` of a parameter, a new tensor."""


class FullWeights:
    """Selected parameters of a module, trained in place; theta* is a copy of them, made when it is first asked for.

    Args:
        module: The module; None where no teacher is asked for.
        parameters: Name and parameter.
    """

    def __init__(self, module: nn.Module | None, parameters: Mapping[str, nn.Parameter]) -> None:
        self.module = module
        self.parameters = dict(parameters)

    @cached_property
    def anchor(self) -> dict[str, torch.Tensor]:
        """Name and theta*."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @cached_property
    def teacher(self) -> "FrozenModule":
        assert self.module is not None
        return FrozenModule(self.module, self.anchor)

    def shift(self, name: str) -> torch.Tensor:
        return self.parameters[name] - self.anchor[name]


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
