"""Elastic weight consolidation: the quadratic penalty of eq. 4 and its gradient in closed form."""

from collections.abc import Mapping

import torch
from torch import nn

from .trainable import FullWeights, Trainable


class ElasticWeightConsolidation:
    """The term `weight * sum_i F_i (theta_i - theta*_i)^2`.

    The convention is that of the authors' code, so that its weights (50 for Stable Diffusion, 10 for CIFAR10, 100 for
    the MNIST VAE) carry over. The paper's eq. 4 halves the Fisher information: its lambda is twice this weight.

    Args:
        parameters: What is trained; or name and parameter, whose present values become theta*, copied.
        fisher: Name and diagonal Fisher information, of the parameter's shape, non-negative. May hold other names too.
        weight: Weight of the term, at least 0.

    Raises:
        ValueError: A parameter has no Fisher information, or one of another shape, or the weight is negative.
    """

    def __init__(
        self,
        parameters: Trainable | Mapping[str, nn.Parameter],
        fisher: Mapping[str, torch.Tensor],
        weight: float,
    ) -> None:
        if weight < 0:
            raise ValueError(f"ewc_weight={weight} must be at least 0")
        self.weight = weight
        self.trainable = FullWeights(None, parameters) if isinstance(parameters, Mapping) else parameters
        self.parameters = self.trainable.parameters
        self.fisher: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            if name not in fisher:
                raise ValueError(
                    f"no Fisher information for {name}: it was computed for another selection. Compute it again, or "
                    "choose a selection that it covers"
                )
            if fisher[name].shape != parameter.shape:
                raise ValueError(
                    f"Fisher information of {name} has shape {tuple(fisher[name].shape)}, the parameter has "
                    f"{tuple(parameter.shape)}: it belongs to another model"
                )
            self.fisher[name] = fisher[name].to(device=parameter.device, dtype=torch.float32)
        self.shift = self.trainable.shift
        if isinstance(self.trainable, FullWeights):
            self.anchor = self.trainable.anchor

    @torch.no_grad()
    def penalty(self) -> torch.Tensor:
        """The term's value, a float32 scalar; no autograd graph."""
        return self.weight * self.unweighted()

    @torch.no_grad()
    def unweighted(self) -> torch.Tensor:
        """`sum_i F_i (theta_i - theta*_i)^2`, a float32 scalar."""
        total = torch.zeros((), device=next(iter(self.parameters.values())).device)
        for name in self.parameters:
            shift = self.shift(name)
            total += (shift.square_().mul_(self.fisher[name])).sum()
        return total

    @torch.no_grad()
    def add_gradient_(self, scale: float = 1.0) -> None:
        """Add `2 * weight * F (theta - theta*)`, times a scale, to every `.grad`: once per optimiser step, after
        reduction over processes and unscaling, before clipping."""
        for name, parameter in self.parameters.items():
            pull = self.shift(name)
            pull.mul_(self.fisher[name])
            if parameter.grad is None:
                parameter.grad = pull.mul_(2 * self.weight * scale)
            else:
                parameter.grad.add_(pull, alpha=2 * self.weight * scale)
