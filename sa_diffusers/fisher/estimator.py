"""Estimating the diagonal Fisher information from samples of the frozen model."""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import nn
from tqdm import tqdm

from ..configuration import base_defaults
from ..data.classes import class_name
from ..data.generation import sampled
from ..data.given import Samples, are_prompts, given_prompts, given_samples, taken
from ..data.sample_set import SampleSet
from ..environment import launched, precision_in_use
from ..families import SamplingSettings, modules_of, objective_of, pipeline_name
from ..families.base import Conditions, Objective, index_conditions
from ..families.digests import digested_once, fingerprint_module
from ..files import write_bytes
from ..messages import shown
from ..moved import renamed
from ..parameter_selection import evaluating, only_trainable, recomputing
from ..passes import Passes, counted, over_processes
from ..processes import Pace, check_stop, finishing, shrinking, stop_requested
from ..quantization import differentiable, kind_of, shape_of
from ..seeds import first_seed, generator_of
from .information import FisherInformation

KINDS = ("gradient", "jacobian")
FORMS = ("diagonal", "rows_by_columns")
# A square of the Jacobian's holds as many samples as have so many timesteps together; one at the least.
_SQUARED = 8
# Squares whose prompts are embedded at once, so that text encoders need not come onto the device for each.
_READ = 64


class FisherEstimator:
    """Estimates how much a model's loss depends on each of its parameters, in one of two ways.

    The gradient's is the paper's (section 2.2): `F_i = E[(d ELBO(x | theta, c) / d theta_i)^2]`. The ELBO of one sample
    is a sum over timesteps, so the gradients of its timesteps are summed *before* squaring; the squares are then
    averaged over samples. The batch dimension of a backward pass holds timesteps of the same sample, which gives the
    same sum in fewer passes.

    The Jacobian's is `F_i = E[sum_o w_o (d prediction_o / d theta_i)^2]`, with the weights `w` that the loss gives
    squared errors of a prediction's elements: the diagonal of what the loss of the model's own samples rises by, to
    second order, of one timestep. It is estimated by random signs `s` (Bekas, Kokiopoulou and Saad, 2007): products of
    different ones vanish on average, and the square of `d (sum_o s_o sqrt(w_o) prediction_o) / d theta_i` leaves `F_i`.
    So a square may hold several samples, and what the drawn noise leaves as an error plays no part.

        information = FisherEstimator(pipeline, "xattn").estimate(["a photo of a dog", "a red car"])
        information.save_pretrained("fisher")

    What is saved records what it was computed from, and is taken by the setting `fisher` of a run on the same model.

    Args:
        model: A pipeline in float32, of a kind that `objective_for` knows; its folder or name on the Hub; or an
            `Objective`.
        selection: What is to be trained: a name or regular expression as of `train_method`, or name and parameter.
            Nothing else takes memory.
        timesteps: Number of timesteps of each sample, or None (or 0) for all (exact). Fewer are sampled one from each
            of as many strata of the path, and the gradient's sum is scaled by `num_train_timesteps / timesteps`, so
            that the EWC weight keeps its meaning. The square of a scaled sum has the noise of fewer terms in it and
            comes out larger.
        batch_size: Timesteps in one backward pass. It changes rounding and speed only.
        seed: Seed of timesteps, noise and signs. Each sample has a stream of its own, whatever the number of processes.
        accelerator: Processes that share the samples, and the precision of the forward pass. Default: this one.
        kind: `"gradient"` or `"jacobian"`. The EWC weight of one means nothing to the other.
        on_cpu: Whether gradients and their squares are added up on the CPU, which then holds twice as many float32
            numbers as are selected, and the device one parameter's gradient at a time. It changes rounding and speed
            only.
        form: `"diagonal"`, or `"rows_by_columns"`: of each weight of two dimensions or more, taken as a matrix
            `[rows, columns]`, the sums of its part of the diagonal over columns and over rows, `rows + columns` numbers
            that `RowsByColumns` takes. Where a square takes one backward pass (`batch_size` is large enough), neither
            the diagonal nor all gradients are ever in memory; else the gradients' sum is.
        gradient_checkpointing: Whether activations are computed again in the backward pass: less memory, more time, the
            same numbers.

    Raises:
        ValueError: `timesteps` or `batch_size` is out of range, there is no such form, the selection matches nothing
            (or nothing with rows and columns), or the model is of an unknown kind, in half precision, has adapters, or
            has no Fisher information of this kind.
    """

    @renamed(objective="model", parameters="selection")
    def __init__(
        self,
        model: Objective | DiffusionPipeline | str | Path,
        selection: str | Mapping[str, nn.Parameter] = "full",
        timesteps: int | None = None,
        batch_size: int = 10,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        kind: str = "gradient",
        on_cpu: bool = False,
        form: str = "diagonal",
        gradient_checkpointing: bool = False,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f'form="{shown(form)}" is not one of "diagonal", "rows_by_columns"')
        objective, pipeline = objective_of(model)
        self._name = pipeline and pipeline_name(pipeline)
        self._others = modules_of(pipeline) if pipeline else []
        self._scheduler = getattr(pipeline, "scheduler", None)
        total = objective.num_train_timesteps
        timesteps = timesteps or None
        if timesteps is not None and not 1 <= timesteps <= total:
            raise ValueError(f"timesteps={timesteps} must be between 1 and {total}, or 0 for all of them")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        check_kind(kind, objective)
        self.kind = kind
        self.on_cpu = on_cpu
        self.form = form
        self.gradient_checkpointing = gradient_checkpointing
        self.objective = objective
        self._train_method = selection if isinstance(selection, str) else None
        self.parameters = objective.select(selection) if isinstance(selection, str) else dict(selection)
        if form == "rows_by_columns":
            self.parameters = {name: value for name, value in self.parameters.items() if len(shape_of(value)) > 1}
            if not self.parameters:
                raise ValueError('form="rows_by_columns": nothing that is selected has rows and columns')
        self._inputs: dict[str, torch.Tensor] = self.parameters
        self.timesteps = total if timesteps is None else timesteps
        self.batch_size = batch_size
        self.seed = seed
        self.accelerator = accelerator or launched()
        if pipeline is not None:
            objective.to(self.accelerator.device)

    def estimate(
        self,
        samples: Samples,
        identity: Mapping[str, Any] | None = None,
        partial_dir: str | Path | None = None,
        settings: SamplingSettings | None = None,
    ) -> FisherInformation:
        """Estimate from samples of all prompts, the concept's included.

        Args:
            samples: At least one: a `SampleSet`, prompts to sample with, images (PIL, or a tensor `[n, channels,
                height, width]` in [0, 1]), which belong to the empty prompt, or dictionaries of an `"image"` and its
                `"text"`.
            identity: Fields to record, as `fisher_identity` gives them. Default: those of this objective, whose
                weights are digested for it.
            partial_dir: Where sums over the samples so far are kept, so that a run that was stopped goes on from them
                to the same bits. The caller deletes it.
            settings: How prompts are sampled. Default: as the model's own folder recommends, else without guidance,
                for guided samples are not samples of p(x | theta*, c).

        Raises:
            ValueError: There are no samples, or they do not fit the model.
            FloatingPointError: A gradient is not finite (the message names the sample).
            Interrupted: The run is to stop.
        """
        if isinstance(samples, SampleSet) and not len(samples):
            raise ValueError("Fisher information needs at least one sample")
        module, device = self.objective.module, self.objective.device
        values = {name: torch.zeros(self._shape(p), device=self._place(p)) for name, p in self.parameters.items()}
        with evaluating(module, *self._others):
            samples = self._sample_set(taken("samples", samples), settings)
            recorded = dict(identity or {})
            if "trained_module" not in recorded:
                with digested_once():
                    own = fisher_identity(self.objective, fingerprint_module(module), self._train_method)
                recorded = {**({"base_model": self._name} if self._name else {}), **own, **recorded}
            plain = [name for name, value in self.parameters.items() if kind_of(value) is None]
            with (
                only_trainable(module, plain),
                recomputing(module, self.gradient_checkpointing),
                differentiable(module, self.parameters) as self._inputs,
            ):
                passes = self._add_squares(values, samples, device, partial_dir and Path(partial_dir))
        for name, parameter in self.parameters.items():
            # Processes reach each other through their devices.
            summed = self.accelerator.reduce(values[name].to(parameter.device), reduction="sum")
            values[name] = summed.to(values[name].device) / len(samples)
        config = {
            **recorded,
            "fisher_kind": self.kind,
            **({} if self.form == "diagonal" else {"fisher_form": self.form}),
            "timesteps": self.timesteps,
            "num_samples": len(samples),
            "seed": self.seed,
            "precision": precision_in_use(self.accelerator),
            "weights_dtype": ", ".join(
                sorted({kind_of(value) or str(value.dtype)[6:] for value in self.parameters.values()})
            ),
            "samples": samples.fingerprint,
            "sample_origin": samples.origin,
        }
        passes = over_processes(passes, self.accelerator)
        return FisherInformation({name: value.cpu() for name, value in values.items()}, config, passes)

    def _sample_set(self, given: Samples, settings: SamplingSettings | None) -> SampleSet:
        if isinstance(given, SampleSet):
            return given
        objective, labels = self.objective, self.objective.labels
        prompts = given_prompts("samples", given)
        if prompts is None and not objective.unconditional:
            raise ValueError(
                "samples: this model has no empty prompt that bare images could belong to: give dictionaries of an "
                'image and its "text"'
            )
        prompts = [
            class_name(prompt, labels) if labels and prompt else prompt for prompt in prompts or [""] * len(given)
        ]
        if not are_prompts(given):
            return given_samples("samples", given, objective, prompts)
        settings = settings or _recommended(self._name, objective)
        first = first_seed("concept", self.seed)
        seeds = list(range(first, first + len(prompts)))
        if self._scheduler is not None:
            objective.check_sampling(settings, self._scheduler)
        with self.accelerator.autocast():
            samples = sampled(objective, prompts, seeds, settings).float().cpu()
        origin = {**settings.to_dict(), "base_model": self._name}
        return SampleSet(samples, prompts, list(prompts), seeds, origin)

    def _add_squares(
        self, values: dict[str, torch.Tensor], samples: SampleSet, device: torch.device, partial_dir: Path | None
    ) -> Passes | None:
        """Add the squared gradients of this process's samples, and say what they took, in earlier runs too."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        # Of the ELBO's gradient, a square is of one sample.
        size = rows_of_a_square(self.kind, self.timesteps) // self.timesteps
        groups = [range(first, min(first + size, len(samples))) for first in range(0, len(samples), size)]
        mine = groups[rank::processes]
        partial = _PartialSum(partial_dir, rank, processes, self.batch_size)
        first = partial.read(values, len(mine))
        passes = Passes() if first == 0 else partial.passes
        pace = Pace()
        with (
            tqdm(initial=sum(map(len, mine[:first])), total=sum(map(len, mine)), desc="Fisher information",
                 unit="sample", disable=rank > 0) as bar,
            counted(self.objective.module, passes),
            finishing(),
        ):  # fmt: skip
            conditions: list[Conditions] = []
            for done, group in enumerate(mine[first:], start=first + 1):
                conditions = conditions or self._read(samples, mine[done - 1 :][:_READ])
                gradient = self._gradient_that_fits(samples, group, conditions.pop(0), device)
                for value, part in zip(values.values(), gradient, strict=True):
                    value.add_(part) if self.form == "rows_by_columns" else value.addcmul_(part, part)
                bar.update(len(group))
                began = time.monotonic()
                stopping = stop_requested() is not None
                if done < len(mine) and (stopping or pace.due()):
                    partial.write(values, done, passes)
                    pace.done(began)
                if stopping:
                    check_stop()
        return passes

    def _shape(self, parameter: torch.Tensor) -> torch.Size:
        """That of a parameter's Fisher information."""
        shape = shape_of(parameter)
        return shape if self.form == "diagonal" else torch.Size([shape[0] + shape[1:].numel()])

    def _place(self, parameter: torch.Tensor) -> torch.device:
        """Where what belongs to a parameter is added up."""
        return torch.device("cpu") if self.on_cpu else parameter.device

    def _read(self, samples: SampleSet, groups: list[range]) -> list[Conditions]:
        """The conditions of some squares, on the CPU."""
        with self.objective.reading():
            read = [self.objective.encode_prompts([samples.conditions[index] for index in group]) for group in groups]
        return [{name: value.cpu() for name, value in conditions.items()} for conditions in read]

    def _gradient_that_fits(
        self, samples: SampleSet, group: range, conditions: Conditions, device: torch.device
    ) -> list[torch.Tensor]:
        own = {name: value.to(device) for name, value in conditions.items()}

        def gradient(batch_size: int) -> list[torch.Tensor]:
            self.batch_size = batch_size
            return self._summed_gradient(samples, group, own, device)

        return shrinking(gradient, self.batch_size, "fisher_batch_size", self.accelerator.num_processes)

    def _summed_gradient(
        self, samples: SampleSet, group: range, conditions: Conditions, device: torch.device
    ) -> list[torch.Tensor]:
        """A square's gradient; in rows and columns the sums of its squares."""
        objective = self.objective
        # One draw a timestep, from its sample's own stream: noise and signs do not depend on how they are batched.
        generators = {index: generator_of("fisher", self.seed, index) for index in group}
        signs = {index: generator_of("fisher signs", self.seed, index) for index in group}
        timesteps = torch.cat([objective.path.strata(self.timesteps, generators[index]) for index in group])
        rows = torch.arange(group.start, group.stop).repeat_interleave(self.timesteps)
        # A square of one backward pass is summed over rows and columns layer by layer.
        at_once = self.form == "rows_by_columns" and len(rows) <= self.batch_size
        add = _add_sums_of_squares if at_once else _add
        shape = self._shape if at_once else shape_of
        total = [torch.zeros(shape(p), device=self._place(p)) for p in self.parameters.values()]
        inputs = list(self._inputs.values())
        for part, places in zip(timesteps.split(self.batch_size), rows.split(self.batch_size), strict=True):
            given = samples.samples[places].to(device)
            drawn_from = [generators[index] for index in places.tolist()]
            noise = torch.cat([objective.draw_noise(*one) for one in zip(given.split(1), drawn_from, strict=True)])
            own = index_conditions(conditions, (places - group.start).to(device))
            with self.accelerator.autocast():
                loss = self._scalar(given, own, part.to(device), noise, [signs[index] for index in places.tolist()])
            with _adding_gradients(inputs, total, add):
                loss.backward(inputs=inputs)
        scale = self.timesteps**-0.5 if self.kind == "jacobian" else objective.num_train_timesteps / self.timesteps
        for place, (name, accumulated) in enumerate(zip(self.parameters, total, strict=True)):
            if not torch.isfinite(accumulated).all():
                told = ", ".join(f'{index} ("{samples.conditions[index]}")' for index in group)
                raise FloatingPointError(
                    f"the gradient of {name} is not finite for sample {told}: compute the Fisher information without "
                    "mixed precision, or in bf16"
                )
            accumulated *= scale**2 if at_once else scale
            if self.form == "rows_by_columns" and not at_once:
                total[place] = _sums_of_squares(accumulated)
        return total

    def _scalar(
        self,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        signs: list[torch.Generator],
    ) -> torch.Tensor:
        """What is differentiated; arguments as of `Objective.negative_elbo`, and what draws each row's signs."""
        objective = self.objective
        # Those that were drawn count alike; all of them, each as often as it would be drawn.
        every = self.timesteps == objective.num_train_timesteps
        shares = objective.path.shares(timesteps) if every else None
        if self.kind == "gradient":
            loss = objective.negative_elbo(objective.module, samples, conditions, timesteps, noise)
            return loss.sum() if shares is None else (loss * shares).sum()
        prediction = objective.predict(objective.module, samples, conditions, timesteps, noise).float()
        drawn = torch.stack([torch.randint(2, prediction.shape[1:], generator=one) for one in signs])
        roots = objective.root_weights(prediction.detach(), timesteps)
        if shares is not None:
            roots = roots * shares.sqrt().view(-1, *[1] * (prediction.dim() - 1))
        return ((2 * drawn - 1).to(prediction.device) * roots * prediction).sum()


def rows_of_a_square(kind: str, timesteps: int) -> int:
    """Timesteps of all samples that one square holds: of the ELBO's gradient those of one sample."""
    return timesteps * (max(1, _SQUARED // timesteps) if kind == "jacobian" else 1)


def _sums_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """Of a weight's gradient as a matrix, over columns and over rows: `[rows + columns]`."""
    squares = gradient.float().flatten(1).square()
    return torch.cat([squares.sum(1), squares.sum(0)])


def _add(accumulated: torch.Tensor, gradient: torch.Tensor) -> None:
    accumulated += gradient.to(accumulated.device).float()


def _add_sums_of_squares(accumulated: torch.Tensor, gradient: torch.Tensor) -> None:
    accumulated += _sums_of_squares(gradient).to(accumulated.device)


@contextlib.contextmanager
def _adding_gradients(
    inputs: list[torch.Tensor], sums: list[torch.Tensor], add: Callable[[torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Add each gradient to its sum as soon as a backward pass has it, and let go of it: all of them take as much as the
    sums. Gradients that were there before are there again afterwards."""
    before = [value.grad for value in inputs]

    def take(accumulated: torch.Tensor, value: torch.Tensor) -> None:
        assert value.grad is not None
        add(accumulated, value.grad)
        value.grad = None

    handles = [value.register_post_accumulate_grad_hook(functools.partial(take, accumulated))
               for value, accumulated in zip(inputs, sums, strict=True)]  # fmt: skip
    try:
        for value in inputs:
            value.grad = None
        yield
    finally:
        for handle, value, gradient in zip(handles, inputs, before, strict=True):
            handle.remove()
            value.grad = gradient


def check_kind(kind: str, objective: Objective) -> None:
    """Refuse a kind of Fisher information that there is not, or that a model does not have.

    Raises:
        ValueError: It is such a one.
    """
    if kind not in KINDS:
        raise ValueError(f'kind="{shown(kind)}" is not one of "gradient", "jacobian"')
    if kind == "jacobian" and not objective.weighs_predictions:
        raise ValueError(
            'fisher_kind="jacobian": the loss of this model is no squared error, and its family does not say how '
            'changes of its predictions weigh: use "gradient"'
        )


def _recommended(name: str | None, objective: Objective) -> SamplingSettings:
    """How a model is sampled without guidance, as its own folder recommends if it does."""
    own = {**objective.defaults, **(base_defaults({"pretrained_model_name_or_path": name}) if name else {})}
    known = {key: own[key] for key in ("sampler", "num_inference_steps", "resolution") if key in own}
    if "sample_batch_size" in own:
        known["batch_size"] = own["sample_batch_size"]
    return SamplingSettings(guidance_scale=own.get("replay_guidance_scale") or 1.0, **known)


class _PartialSum:
    """A process's sum over its samples so far, on disk.

    Attributes:
        passes: What the sum that was read took of the network; None where it does not say.
    """

    def __init__(self, folder: Path | None, rank: int, processes: int, batch_size: int) -> None:
        self.path = folder and folder / f"{rank}-of-{processes}-batch-{batch_size}.safetensors"
        self.passes: Passes | None = None

    def write(self, values: dict[str, torch.Tensor], done: int, passes: Passes | None = None) -> None:
        if self.path is None:
            return
        tensors = {name: value.cpu().contiguous() for name, value in values.items()}
        told = {"done": str(done), "digest": self._digest(tensors, done)}
        content = save(tensors, metadata={**told, "passes": json.dumps(passes and passes.to_dict())})
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
                self.passes = Passes.read(json.loads(content.get("passes", "null")))
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
