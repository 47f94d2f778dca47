"""Estimating the diagonal Fisher information from samples of the frozen model."""

import contextlib
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import nn
from tqdm import tqdm

from ..data.sample_set import SampleSet
from ..environment import launched, precision_in_use
from ..families.base import Objective, fingerprint_module
from ..files import write_bytes
from ..parameter_selection import only_trainable
from ..processes import Pace, check_stop, finishing, shrinking, stop_requested
from ..seeds import generator_of
from .information import FisherInformation


class FisherEstimator:
    """Estimates `F_i = E[(d ELBO(x | theta, c) / d theta_i)^2]` (paper, section 2.2).

    The ELBO of one sample is a sum over timesteps, so the gradients of its timesteps are summed *before* squaring;
    the squares are then averaged over samples. The batch dimension of a backward pass holds timesteps of the same
    sample, which gives the same sum in fewer passes.

    Args:
        objective: The model and its ELBO.
        parameters: Name and parameter: what is trained. Nothing else takes memory.
        timesteps: Number of timesteps of each sample, or None for all (exact). Fewer are sampled one from each of as
            many strata of the path, and their sum is scaled by `num_train_timesteps / timesteps`, so that the EWC
            weight keeps its meaning. The square of a scaled sum has the noise of fewer terms in it and comes out
            larger.
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
        self.accelerator = accelerator or launched()

    def estimate(
        self, samples: SampleSet, identity: Mapping[str, Any] | None = None, partial_dir: str | Path | None = None
    ) -> FisherInformation:
        """Estimate from samples of all prompts, the concept's included.

        Args:
            samples: At least one.
            identity: Fields to record, as `fisher_identity` gives them. Default: those of this objective, whose
                weights are digested for it.
            partial_dir: Where sums over the samples so far are kept, so that a run that was stopped goes on from them
                to the same bits. The caller deletes it.

        Raises:
            ValueError: There are no samples.
            FloatingPointError: A gradient is not finite (the message names the sample).
            Interrupted: The run is to stop.
        """
        if not len(samples):
            raise ValueError("Fisher information needs at least one sample")
        recorded = dict(identity or {})
        if "trained_module" not in recorded:
            recorded = {**fisher_identity(self.objective, fingerprint_module(self.objective.module)), **recorded}
        module, device = self.objective.module, self.objective.device
        values = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}
        training = module.training
        module.eval()
        try:
            with only_trainable(module, self.parameters):
                self._add_squares(values, samples, device, partial_dir and Path(partial_dir))
        finally:
            module.train(training)
        for name in values:
            values[name] = self.accelerator.reduce(values[name], reduction="sum") / len(samples)
        config = {
            **recorded,
            "timesteps": self.timesteps,
            "num_samples": len(samples),
            "seed": self.seed,
            "precision": precision_in_use(self.accelerator),
            "samples": samples.fingerprint,
            "sample_origin": samples.origin,
        }
        return FisherInformation({name: value.cpu() for name, value in values.items()}, config)

    def _add_squares(
        self, values: dict[str, torch.Tensor], samples: SampleSet, device: torch.device, partial_dir: Path | None
    ) -> None:
        """Add the squared gradients of this process's samples."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = list(range(rank, len(samples), processes))
        partial = _PartialSum(partial_dir, rank, processes, self.batch_size)
        first = partial.read(values, len(mine))
        pace = Pace()
        with (
            tqdm(mine, initial=first, total=len(mine), desc="Fisher information", unit="sample",
                 disable=rank > 0) as bar,
            finishing(),
        ):  # fmt: skip
            for done, index in enumerate(mine[first:], start=first + 1):
                gradient = self._gradient_that_fits(samples, index, device)
                for value, part in zip(values.values(), gradient, strict=True):
                    value.addcmul_(part, part)
                bar.update()
                began = time.monotonic()
                stopping = stop_requested() is not None
                if done < len(mine) and (stopping or pace.due()):
                    partial.write(values, done)
                    pace.done(began)
                if stopping:
                    check_stop()

    def _gradient_that_fits(self, samples: SampleSet, index: int, device: torch.device) -> list[torch.Tensor]:
        def gradient(batch_size: int) -> list[torch.Tensor]:
            self.batch_size = batch_size
            return self._summed_gradient(samples, index, device)

        return shrinking(gradient, self.batch_size, "fisher_batch_size", self.accelerator.num_processes)

    def _summed_gradient(self, samples: SampleSet, index: int, device: torch.device) -> list[torch.Tensor]:
        objective = self.objective
        generator = generator_of("fisher", self.seed, index)
        sample = samples.samples[index : index + 1].to(device)
        conditions = objective.encode_prompts([samples.conditions[index]])
        timesteps = objective.path.strata(self.timesteps, generator)
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


class _PartialSum:
    """A process's sum over its samples so far, on disk."""

    def __init__(self, folder: Path | None, rank: int, processes: int, batch_size: int) -> None:
        self.path = folder and folder / f"{rank}-of-{processes}-batch-{batch_size}.safetensors"

    def write(self, values: dict[str, torch.Tensor], done: int) -> None:
        if self.path is None:
            return
        tensors = {name: value.cpu().contiguous() for name, value in values.items()}
        content = save(tensors, metadata={"done": str(done), "digest": self._digest(tensors, done)})
        write_bytes(self.path, content, flush=False)

    def read(self, values: dict[str, torch.Tensor], count: int) -> int:
        """Fill in the sum, if there is a whole one, and say how many of the process's samples it holds."""
        if self.path is None or not self.path.is_file():
            return 0
        with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError):
            with safe_open(self.path, "pt") as file:
                content = file.metadata() or {}
            tensors = load(self.path.read_bytes())
            done = int(content["done"])
            whole = content["digest"] == self._digest(tensors, done)
            if whole and tensors.keys() == values.keys() and 0 < done <= count:
                for name, value in values.items():
                    value.copy_(tensors[name])
                return done
        return 0

    def _digest(self, tensors: Mapping[str, torch.Tensor], done: int) -> str:
        """Of the sum, how many samples are in it, and its place: another's sum will not do."""
        assert self.path is not None
        digest = hashlib.blake2b(f"{self.path.parent.name}/{self.path.name} {done}".encode(), digest_size=16)
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
        return digest.hexdigest()


def fisher_identity(
    objective: Objective, module_fingerprint: str, train_method: str | None = None, base: str | None = None
) -> dict[str, Any]:
    """What Fisher information is bound to: the model's weights and the loss.

    Args:
        objective: The model.
        module_fingerprint: Digest of the trained module's weights.
        train_method: The selection, if it has a name.
        base: Digest of the whole model. Default: computed.
    """
    return {
        "trained_module": module_fingerprint,
        "base": base or objective.fingerprint(),
        "train_method": train_method,
        "kind": objective.kind,
        "prediction_type": objective.prediction_type,
        "reduction": objective.reduction,
        "num_train_timesteps": objective.num_train_timesteps,
        "snr_gamma": objective.snr_gamma,
        "noise_offset": objective.noise_offset,
    }
