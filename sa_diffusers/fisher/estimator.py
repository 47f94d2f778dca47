"""Estimating the diagonal Fisher information from samples of the frozen model."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from ..data.sample_set import SampleSet, fingerprint
from ..objectives.base import Objective
from ..parameter_selection import only_trainable
from .information import FisherInformation

_SEED_STREAM = 7_919


class FisherEstimator:
    """Estimates `F_i = E[(d ELBO(x | theta, c) / d theta_i)^2]` (paper, section 2.2).

    The ELBO of one sample is a sum over timesteps, so the gradients of its timesteps are summed *before* squaring;
    the squares are then averaged over samples. The batch dimension of a backward pass holds timesteps of the same
    sample, which gives the same sum in fewer passes.

    Args:
        objective: The model and its ELBO.
        parameters: Name and parameter: what is trained. Nothing else takes memory.
        timesteps: Number of timesteps of each sample, or None for all (exact). Fewer are drawn one from each of as
            many equal strata, and their sum is scaled by `num_train_timesteps / timesteps`, so that the EWC weight
            keeps its meaning. The square of a scaled sum has the noise of fewer terms in it and comes out larger.
        batch_size: Timesteps in one backward pass. It changes rounding and speed only.
        seed: Seed of timesteps and noise. Each sample has a stream of its own, whatever the number of processes.
        accelerator: Processes that share the samples, and the precision of the forward pass. Default: this one.

    Raises:
        ValueError: `timesteps` or `batch_size` is out of range.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        timesteps: int | None = None,
        batch_size: int = 10,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        total = objective.num_train_timesteps
        if timesteps is not None and not 1 <= timesteps <= total:
            raise ValueError(f"fisher_timesteps={timesteps} must be between 1 and {total}, or 0 for all of them")
        if batch_size < 1:
            raise ValueError(f"fisher_batch_size={batch_size} must be at least 1")
        self.objective = objective
        self.parameters = dict(parameters)
        self.timesteps = total if timesteps is None else timesteps
        self.batch_size = batch_size
        self.seed = seed
        self.accelerator = accelerator or Accelerator()

    def estimate(self, samples: SampleSet, identity: Mapping[str, Any] | None = None) -> FisherInformation:
        """Estimate from samples of all prompts, the concept's included.

        Args:
            samples: At least one.
            identity: Further fields to record, as `fisher_identity` gives them.

        Raises:
            ValueError: There are no samples.
            FloatingPointError: A gradient is not finite (the message names the sample).
        """
        if not len(samples):
            raise ValueError("Fisher information needs at least one sample")
        device = self.objective.device
        values = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        module = self.objective.module
        training = module.training
        module.eval()
        try:
            with only_trainable(module, self.parameters):
                for index in tqdm(
                    range(rank, len(samples), processes), desc="Fisher information", unit="sample", disable=rank > 0
                ):
                    gradient = self._summed_gradient(samples, index, device)
                    for value, part in zip(values.values(), gradient, strict=True):
                        value.addcmul_(part, part)
        finally:
            module.train(training)
        for name in values:
            values[name] = self.accelerator.reduce(values[name], reduction="sum") / len(samples)
        config = {
            **(identity or {}),
            "timesteps": self.timesteps,
            "num_samples": len(samples),
            "seed": self.seed,
            "samples": fingerprint([samples.conditions, samples.sources, samples.seeds, samples.origin]),
            "sample_origin": samples.origin,
        }
        return FisherInformation({name: value.cpu() for name, value in values.items()}, config)

    def _summed_gradient(self, samples: SampleSet, index: int, device: torch.device) -> list[torch.Tensor]:
        objective = self.objective
        generator = torch.Generator().manual_seed(self.seed * _SEED_STREAM + index)
        sample = samples.samples[index : index + 1].to(device)
        conditions = objective.encode_prompts([samples.conditions[index]])
        timesteps = self._draw_timesteps(generator)
        total = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters.values()]
        for part in timesteps.split(self.batch_size):
            repeated = sample.expand(len(part), *sample.shape[1:])
            # One draw a timestep, so that the noise does not depend on how the timesteps are batched.
            noise = torch.cat([objective.draw_noise(sample, generator) for _ in part])
            repeated_conditions = {
                name: value.expand(len(part), *value.shape[1:]) for name, value in conditions.items()
            }
            with self.accelerator.autocast():
                loss = objective.negative_elbo(
                    objective.module, repeated, repeated_conditions, part.to(device), noise
                ).sum()
            gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
            for accumulated, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    accumulated += gradient.float()
        scale = objective.num_train_timesteps / self.timesteps
        for name, accumulated in zip(self.parameters, total, strict=True):
            if not torch.isfinite(accumulated).all():
                raise FloatingPointError(
                    f'the gradient of {name} is not finite for sample {index} ("{samples.conditions[index]}"): compute '
                    "the Fisher information without mixed precision, or in bf16"
                )
            accumulated *= scale
        return total

    def _draw_timesteps(self, generator: torch.Generator) -> torch.Tensor:
        total = self.objective.num_train_timesteps
        if self.timesteps == total:
            return torch.arange(total)
        edges = torch.linspace(0, total, self.timesteps + 1, dtype=torch.float64)
        width = edges[1:] - edges[:-1]
        drawn = edges[:-1] + width * torch.rand(self.timesteps, generator=generator, dtype=torch.float64)
        return drawn.long().clamp(max=total - 1)


def fisher_identity(objective: Objective, module_fingerprint: str, train_method: str) -> dict[str, Any]:
    """What Fisher information is bound to: the trained module's weights and the loss.

    Args:
        objective: The model.
        module_fingerprint: Digest of the trained module's weights.
        train_method: The selection.
    """
    return {
        "trained_module": module_fingerprint,
        "train_method": train_method,
        "kind": objective.kind,
        "prediction_type": objective.prediction_type,
        "reduction": objective.reduction,
        "num_train_timesteps": objective.num_train_timesteps,
        "snr_gamma": objective.snr_gamma,
    }
