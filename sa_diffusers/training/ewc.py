"""Elastic weight consolidation: the quadratic penalty of eq. 4 and its gradient in closed form."""

from collections.abc import Mapping

import torch
from torch import nn

from .trainable import AdapterWeights, FullWeights, Trainable, accumulate_, factors


class ElasticWeightConsolidation:
    """The term `weight * sum_i F_i (theta_i - theta*_i)^2`.

    The convention is that of the authors' code, so that its weights (50 for Stable Diffusion, 10 for CIFAR10, 100 for
    the MNIST VAE) carry over. The paper's eq. 4 halves the Fisher information: its lambda is twice this weight.

    Args:
        parameters: What is trained; or name and parameter, whose present values become theta*, copied. Of an adapter
            theta are the weights with its update, and the gradient goes on to its matrices.
        fisher: Name and diagonal Fisher information, of the parameter's shape, non-negative. May hold other names too.
        weight: Weight of the term, at least 0.
        dtype: What the Fisher information is held in; the sums are float32.
        on_cpu: Whether it stays on the CPU, and each weight's part of it comes to the weight's device when it is
            needed.

    Raises:
        ValueError: A parameter has no Fisher information, or one of another shape, or the weight is negative.
    """

    def __init__(
        self,
        parameters: Trainable | Mapping[str, nn.Parameter],
        fisher: Mapping[str, torch.Tensor],
        weight: float,
        dtype: torch.dtype = torch.float32,
        on_cpu: bool = False,
    ) -> None:
        if weight < 0:
            raise ValueError(f"ewc_weight={weight} must be at least 0")
        self.weight = weight
        self.trainable = FullWeights(None, parameters) if isinstance(parameters, Mapping) else parameters
        self.parameters = self.trainable.parameters
        self.fisher: dict[str, torch.Tensor] = {}
        for name, parameter in self.trainable.weights.items():
            self.fisher[name] = _checked(fisher, name, parameter, "cpu" if on_cpu else parameter.device).to(dtype)
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
        total = torch.zeros((), device=next(iter(self.trainable.weights.values())).device)
        for name, values in self.fisher.items():
            # No name for the shift: it would keep it while the next one is made.
            total += self.shift(name).square_().mul_(values.to(total.device)).sum()
        return total

    @torch.no_grad()
    def add_gradient_(self, scale: float = 1.0) -> None:
        """Add `2 * weight * F (theta - theta*)`, times a scale, to every `.grad`: once per optimiser step, after
        reduction over processes and unscaling, before clipping."""
        for name, values in self.fisher.items():
            there = values.to(self.trainable.weights[name].device)
            self.trainable.add_gradient_(name, self.shift(name).mul_(there), 2 * self.weight * scale)


class RowsByColumns:
    """The term of an adapter where the Fisher information of each weight is taken as a product of rows and columns:
    `weight * sum ||diag(sqrt r) B A diag(sqrt c)||^2`, with `r` and `c` its sums over columns and over rows, each
    divided by the square root of the whole sum.

    It takes `rows + columns` numbers of a weight in place of their product, and never makes the update `B A`. What it
    does not know is which entries of a row matter in other columns than those of the other rows.

    Args:
        trainable: The adapter.
        fisher: As of `ElasticWeightConsolidation`; or of each weight its sums over columns and over rows, `[rows +
            columns]`, as `FisherEstimator` gives them.
        weight: Likewise.

    Raises:
        ValueError: As of `ElasticWeightConsolidation`.
    """

    def __init__(self, trainable: AdapterWeights, fisher: Mapping[str, torch.Tensor], weight: float) -> None:
        self.weight = weight
        self.trainable = trainable
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, parameter in trainable.weights.items():
            size, given = parameter.shape, fisher.get(name)
            if given is not None and given.dim() == 1 and len(given) == size[0] + size[1:].numel():
                rows, columns = given.float().tensor_split([size[0]])
            else:
                matrix = _checked(fisher, name, parameter, None).flatten(1)
                rows, columns = matrix.sum(1), matrix.sum(0)
            root = rows.sum().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            self._sums[name] = (rows / root).to(parameter.device), (columns / root).to(parameter.device)

    @torch.no_grad()
    def penalty(self) -> torch.Tensor:
        """The term's value, a float32 scalar; no autograd graph."""
        return self.weight * self.unweighted()

    @torch.no_grad()
    def unweighted(self) -> torch.Tensor:
        """The term without its weight, a float32 scalar."""
        return sum((of_columns * of_rows).sum() for _, of_columns, of_rows in map(self._squares, self._sums))

    @torch.no_grad()
    def add_gradient_(self, scale: float = 1.0) -> None:
        """Add the term's gradient, times a scale, to every `.grad`, as `ElasticWeightConsolidation` does."""
        for name, (rows, columns) in self._sums.items():
            (first, second), of_columns, of_rows = self._squares(name)
            accumulate_(first, (of_rows @ first.flatten(1)).mul_(columns), 2 * self.weight * scale)
            accumulate_(second, (second.flatten(1) @ of_columns).mul_(rows[:, None]), 2 * self.weight * scale)

    def _squares(self, name: str) -> tuple[tuple[nn.Parameter, nn.Parameter], torch.Tensor, torch.Tensor]:
        """A and B, and `A diag(c) A^T` and `B^T diag(r) B`, `[rank, rank]` each."""
        rows, columns = self._sums[name]
        first, second = factors(self.trainable.layers[name])
        of_columns = (first.flatten(1) * columns) @ first.flatten(1).T
        return (first, second), of_columns, second.flatten(1).T @ (second.flatten(1) * rows[:, None])


def _checked(
    fisher: Mapping[str, torch.Tensor], name: str, parameter: torch.Tensor, device: torch.device | str | None
) -> torch.Tensor:
    """The Fisher information of a parameter, on a device; of None it stays where it is."""
    if name not in fisher:
        raise ValueError(
            f"no Fisher information for {name}: it was computed for another selection. Compute it again, or choose a "
            "selection that it covers"
        )
    if fisher[name].shape != parameter.shape:
        raise ValueError(
            f"Fisher information of {name} has shape {tuple(fisher[name].shape)}, the parameter has "
            f"{tuple(parameter.shape)}: it belongs to another model"
        )
    return fisher[name].to(device=device, dtype=torch.float32)
