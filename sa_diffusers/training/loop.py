"""The loop over optimiser steps: gradients, the EWC term, checkpoints, callbacks."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from ..configuration import SelectiveAmnesiaConfig
from ..families.adapters import LowRankAdapter
from ..families.base import Denoiser, Objective
from ..fisher import FisherInformation
from ..identity import Identity
from ..processes import Interrupted, Pace, shrinking, stop_requested, wait_until
from ..quantization import leave_to_each_process
from ..results.schema import DONE, GIVEN_UP, LIMIT, Ending
from ..seeds import seed_of
from .batches import BatchPolicy
from .callbacks import StepState
from .checkpoints import (
    CHECKPOINT_PREFIX,
    STATE_NAME,
    TrainingState,
    delete_oldest,
    read_checkpoint,
    write_checkpoint,
)
from .controller import Controller
from .ewc import ElasticWeightConsolidation, RowsByColumns
from .neighbours import Neighbours, drifts, farthest
from .progress import Progress
from .settings import fixed_replay_weight, make_average, part_of_a_run, rate_of, restart_optimizer, set_pace
from .trainable import AdapterWeights, FullWeights, Trainable
from .validation import Validation

# Beside a controller's state in a checkpoint: how the training ended.
_ENDING = "ending"
_BYTES_PER_SECOND = 300e6
_MICRO_BATCHES = 4096
# So long a checkpoint may take to be written.
_WRITING_SECONDS = 600.0
# Steps in which the learning rate and the EWC term's weight are found.
EXCURSION = 20
# Prompts whose drift is told for each, and the share of the replayed samples that is near.
_PROBED = 5
_NEAR_SHARE = 0.5


def ending_of(control: Mapping[str, Any], step: int, limit: int) -> Ending | None:
    """How a training ended by itself at a checkpoint; None if it goes on, as the limit may be another one now.

    Args:
        control: What the checkpoint keeps of the controller.
        step: The checkpoint's.
        limit: The most steps.
    """
    ending = control.get(_ENDING)
    return Ending(**ending) if ending and not (ending["how"] == LIMIT and step < limit) else None


@dataclass
class Loop:
    """The steps of one training, and what they need.

    Attributes:
        objective: The model; its module is trained in place.
        config: Settings of the training.
        accelerator: Processes and precision.
        names: Of the parameters that are trained.
        optimizer: Over them.
        batches: What each step gets.
        fisher: Fisher information; None leaves the EWC term out.
        progress: History, skipped steps.
        validation: Images on the way.
        callbacks: Called after every step.
        output_dir: Where checkpoints go; None writes none.
        identity: What they are bound to.
        controller: Measures the training, tunes and ends it; None leaves all to the settings.
        neighbours: Samples what drifts most in the excursion; None leaves it out.
        adapter: What is trained, where it is not the module's own weights.
        types: Name of a parameter, and the type that it was loaded in.
        stopped: The step after which a callback or the controller ended the training; None if none did.
        stopped_by_caller: Whether it was a callback.
        ending: What the controller says of the end; None where it says nothing.
    """

    objective: Objective
    config: SelectiveAmnesiaConfig
    accelerator: Accelerator
    names: Iterable[str]
    optimizer: torch.optim.Optimizer
    batches: BatchPolicy
    fisher: FisherInformation | None
    progress: Progress
    validation: Validation
    callbacks: Sequence[Callable[[StepState], None]] = ()
    output_dir: Path | None = None
    identity: Identity | None = None
    controller: Controller | None = None
    neighbours: Neighbours | None = None
    adapter: LowRankAdapter | None = None
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    stopped: int | None = field(default=None, init=False)
    stopped_by_caller: bool = field(default=False, init=False)
    ending: Ending | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        config, module, fisher = self.config, self.objective.module, self.fisher
        self.schedule = get_scheduler(
            config.lr_scheduler,
            optimizer=self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        leave_to_each_process(module)
        self.wrapped, self.optimizer = self.accelerator.prepare(module, self.optimizer)
        # Preparing may have put other tensors in place of the parameters.
        prepared = dict(module.named_parameters())
        parameters = {name: prepared[name] for name in self.names}
        self.trainable: Trainable = (
            AdapterWeights(module, parameters, self.adapter)
            if self.adapter
            else FullWeights(module, parameters, self.types)
        )
        # A weight of zero leaves the term out, and the Fisher information with it; the anchor serves the teacher too.
        weight, held = config.ewc_weight or 0.0, getattr(torch, config.fisher_dtype)
        if fisher is None:
            self.ewc = None
        elif isinstance(self.trainable, AdapterWeights) and config.fisher_form == "rows_by_columns":
            self.ewc = RowsByColumns(self.trainable, fisher.values, weight)
        else:
            self.ewc = ElasticWeightConsolidation(
                self.trainable, fisher.values, weight, held, on_cpu=config.fisher_on_cpu
            )
        self.teacher: Denoiser | None = self.trainable.teacher if config.target == "frozen" else None
        self.parameters = list(self.trainable.parameters.values())
        self.average = make_average(config, self.parameters)
        self._micro_batch = config.train_batch_size

    def run(self, checkpoint: Path | None, checkpoint_bytes: int) -> None:
        """Every step, from the checkpoint on if there is one.

        Args:
            checkpoint: Its folder.
            checkpoint_bytes: About what one takes on disk.

        Raises:
            FloatingPointError: No gradient is finite any more, or the weights are not.
            Interrupted: The run is to stop; a checkpoint is written first.
        """
        config = self.config
        if self.controller:
            self.objective.module.eval()
            self.controller.begin(self.trainable.teacher)
            self.objective.module.train()
        if checkpoint:
            first = self._resume(checkpoint)
        else:
            first = 0
            self._calibrate()
        pace = Pace(seconds=60 * config.checkpointing_minutes, cost=checkpoint_bytes / _BYTES_PER_SECOND)
        part_of_run = part_of_a_run(config)
        # A run that was stopped right at its end takes no further step.
        last = first if self.ending else config.max_train_steps
        if last < config.max_train_steps:
            self.stopped = last
        bar = tqdm(
            range(first, last),
            initial=first,
            total=config.max_train_steps,
            desc="forgetting",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        for step in bar:
            state, losses = self._step(step, bar)
            for callback in self.callbacks:
                callback(state)
            done = step + 1
            is_part = done % part_of_run == 0
            controlled = self._controlled(done, bar)
            ends = controlled or state.stop
            interrupted, ends, due = self._agree(stop_requested() is not None, ends, is_part and pace.due())
            due = due or done % config.checkpointing_steps == 0
            if ends and done < config.max_train_steps and done % config.logging_steps:
                # The last step is on record, whichever it is, also where the run is stopped right after it.
                if not self.callbacks:
                    losses = self.accelerator.reduce(losses, reduction="mean")
                self.progress.log(done, losses, self.ewc.penalty() if self.ewc else None, state.learning_rate, bar)
            if interrupted or (due and done < config.max_train_steps and not ends):
                began = time.monotonic()
                folder = self._save_checkpoint(done)
                pace.done(began)
                if interrupted:
                    kept = f"; it is kept in {folder}" if folder else ""
                    raise Interrupted(f"{stop_requested() or 'another process'} after step {done}{kept}")
            if self.validation.due(done):
                with self._averaged():
                    self.validation.run(done)
            if ends and done < config.max_train_steps:
                self.stopped = done
                self.stopped_by_caller = state.stop or not controlled
                break
        bar.close()
        if self.average:
            self.average.copy_to(self.parameters)
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters):
            raise FloatingPointError(
                f"the weights are not finite at step {self.stopped or config.max_train_steps}: lower the learning "
                "rate, or the EWC weight"
            )

    def _step(self, step: int, bar: tqdm) -> tuple[StepState, torch.Tensor]:
        """Take a step; what callbacks see of it, and its losses `[2]`: over all processes where anyone is told them."""
        config, accelerator, progress, ewc = self.config, self.accelerator, self.progress, self.ewc
        if ewc and self.controller:
            ewc.weight = self.controller.ewc_weight
        if self.controller and config.learning_rate is None:
            set_pace(self.optimizer, self.schedule.get_last_lr()[0] * self.controller.state.pace)
        losses = self.backward(step)
        logged = (step + 1) % config.logging_steps == 0 or step + 1 == config.max_train_steps
        penalty = ewc.penalty() if ewc and logged else None
        norm = self._prepared_gradient(consolidates=True)
        rate = rate_of(self.optimizer)
        # The norm of the reduced gradient is the same on all processes, and so is what follows from it.
        finite = bool(torch.isfinite(norm))
        if self.callbacks or (finite and logged):
            losses = accelerator.reduce(losses, reduction="mean")
        if finite:
            self.optimizer.step()
            progress.went_on()
            if self.average:
                self.average.step(self.parameters)
            if logged:
                progress.log(step + 1, losses, penalty, rate, bar)
        else:
            if accelerator.scaler is not None:
                accelerator.scaler.update()
            progress.skip(step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        seen = losses.tolist() if self.callbacks else (0.0, 0.0)
        return StepState(step + 1, *seen, rate, not finite, self.trainable.parameters), losses

    def _prepared_gradient(self, consolidates: bool) -> torch.Tensor:
        """Unscale the gradient, add the EWC term's, and clip; returns the norm."""
        self.accelerator.unscale_gradients(self.optimizer)
        if self.ewc and consolidates:
            self.ewc.add_gradient_(1 / self._loss_scale)
        if self.controller:
            return self.controller.clip(self.parameters)
        limit = self.config.max_grad_norm
        return nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)

    @property
    def _loss_scale(self) -> float:
        return self.controller.loss_scale if self.controller else 1.0

    def _calibrate(self) -> None:
        """Find the learning rate and the EWC term's weight on some steps without that term, which are undone."""
        controller, config = self.controller, self.config
        is_weighed = self.ewc is None or config.ewc_weight is not None
        if controller is None or (is_weighed and config.learning_rate is not None and self.neighbours is None):
            return
        for step in range(EXCURSION):
            self.backward(step)
            norm = self._prepared_gradient(consolidates=False)
            if torch.isfinite(norm):
                self.optimizer.step()
            elif self.accelerator.scaler is not None:
                self.accelerator.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            # A signal may reach one process alone.
            if self._agree(stop_requested() is not None, False, False)[0]:
                raise Interrupted(stop_requested() or "another process was asked to stop")
        module = self.objective.module
        module.eval()
        if self.ewc and config.ewc_weight is None:
            controller.calibrate(module, self.ewc.unweighted().item())
        if config.learning_rate is None:
            controller.state.rate = rate_of(self.optimizer)
        if self.neighbours is not None:
            self._find_neighbours(controller)
        module.train()
        self.trainable.undo()
        restart_optimizer(self.optimizer, controller.state.rate)
        controller.state.norms = []
        self._add_neighbours(controller)

    def _find_neighbours(self, controller: Controller) -> None:
        """What the excursion moved most."""
        replay, probed = self.batches.replay, controller.probes.remembered
        known = {source for source in self.batches.surrogates.sources if source}
        of = self.objective, self.objective.module, self.trainable.teacher
        if replay is not None:
            rows = [row for row, prompt in enumerate(replay.conditions) if prompt not in known]
            found = drifts(*of, replay.samples[rows], [replay.conditions[row] for row in rows], self.accelerator)
            controller.state.near = farthest(found)
        found = drifts(*of, probed.samples, probed.prompts, self.accelerator)
        if len(found) > 1:
            controller.state.probed = farthest(found, _PROBED)

    def _add_neighbours(self, controller: Controller) -> None:
        """Replay and probe what was found to lie near; the module is at theta*."""
        if self.neighbours is None:
            return
        state, module = controller.state, self.objective.module
        module.eval()
        further = self.neighbours.replay(state.near)
        if further is not None and self.batches.replay is not None:
            self.batches.replay_too(further, _NEAR_SHARE)
        if state.probed:
            controller.probes.add(self.neighbours.probes(state.probed), self.trainable.teacher)
        module.train()

    def _controlled(self, done: int, bar: tqdm) -> bool:
        """Read the probes if it is time, of the weights that would be saved; whether the training is to end."""
        controller, last = self.controller, done == self.config.max_train_steps
        if controller is None or not (controller.due(done) or last):
            return False
        module = self.objective.module
        with self._averaged(), torch.random.fork_rng():
            module.eval()
            penalty = None
            if self.ewc and self.config.ewc_weight is None:
                penalty = self.ewc.unweighted().item()
            ends = controller.after(done, module, penalty, last)
            module.train()
        if verdict := controller.verdict:
            self.ending = Ending(DONE if verdict.done else LIMIT if last else GIVEN_UP, verdict.sentence, done)
        reading = controller.state.readings[-1] if controller.state.readings else {}
        if reading.get("step") == done:
            self.progress.read(done, {k: v for k, v in reading.items() if k != "step"}, bar)
        return ends

    def backward(self, step: int) -> torch.Tensor:
        """Gradients of one optimiser step, reduced over the processes; returns this process's mean losses, `[2]`."""
        config, accelerator = self.config, self.accelerator
        replay_weight = self.controller.replay_weight if self.controller else fixed_replay_weight(config)

        def backward(micro_batch: int) -> torch.Tensor:
            self._micro_batch = micro_batch
            for parameter in self.parameters:
                parameter.grad = None
            slices = self._slices()
            own = sum(part.stop - part.start for part in slices)
            losses = torch.zeros(2, device=self.objective.device)
            for micro, part in enumerate(slices):
                last = micro + 1 == len(slices)
                slot = part.start // micro_batch % _MICRO_BATCHES
                torch.manual_seed(seed_of("dropout", config.seed, step * _MICRO_BATCHES + slot))
                with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                    with accelerator.autocast():
                        loss = self.batches.batch(step, part, self.teacher).losses(self.objective, self.wrapped)
                        if config.naive:
                            loss = torch.stack([-loss[0], loss[1]])
                    loss = loss * ((part.stop - part.start) / own)
                    accelerator.backward((loss[0] + replay_weight * loss[1]) / self._loss_scale)
                losses += loss.detach()
            return losses

        advice = (
            ", and raise --gradient_accumulation_steps by as much (the steps stay the same, to rounding), or use "
            "--gradient_checkpointing"
        )
        return shrinking(backward, self._micro_batch, "train_batch_size", accelerator.num_processes, advice)

    def _slices(self) -> list[slice]:
        """The parts of the global batch that this process takes, one forward pass each."""
        processes, rank, size = self.accelerator.num_processes, self.accelerator.process_index, self.batches.size
        starts = range(rank * self._micro_batch, size, processes * self._micro_batch)
        return [slice(start, min(start + self._micro_batch, size)) for start in starts]

    def _agree(self, interrupted: bool, ends: bool, due: bool) -> tuple[bool, ...]:
        """What any process asks for, all do at the same step."""
        if self.accelerator.num_processes == 1:
            return interrupted, ends, due
        # Whether a checkpoint is due is a matter of the main process's clock.
        due = due and self.accelerator.is_main_process
        asked = torch.tensor([float(interrupted), float(ends), float(due)], device=self.accelerator.device)
        return tuple((self.accelerator.reduce(asked, reduction="sum") > 0).tolist())

    def _save_checkpoint(self, step: int) -> Path | None:
        if self.output_dir is None:
            return None
        passes = self.progress.all_passes()
        target = self.output_dir / f"{CHECKPOINT_PREFIX}{step}"
        if not self.accelerator.is_main_process:
            # A launcher that sees this process end would end the one that is writing.
            wait_until((target / STATE_NAME).is_file, _WRITING_SECONDS)
            return target
        state = TrainingState.of(
            step, self.trainable.parameters, *self._kept(), history=self.progress.history,
            skipped=self.progress.skipped, passes=passes,
            control=self.controller and {**self.controller.state_dict(), _ENDING: self.ending and asdict(self.ending)},
        )  # fmt: skip
        limit = self.config.checkpoints_total_limit
        return write_checkpoint(self.output_dir, state, self.identity, self.config.to_dict(), limit)

    def _kept(self) -> tuple[Any, ...]:
        return self.optimizer, self.schedule, self.average, self.accelerator.scaler

    def _resume(self, folder: Path) -> int:
        state = read_checkpoint(folder)
        if self.controller and state.control:
            self.ending = ending_of(state.control, state.step, self.config.max_train_steps)
            self.controller.load_state_dict({name: kept for name, kept in state.control.items() if name != _ENDING})
            # What lies near is sampled from the base model, if it is not kept.
            self._add_neighbours(self.controller)
        state.restore(self.trainable.parameters, *self._kept())
        self.progress.history, self.progress.skipped = state.history, state.skipped
        self.progress.go_on_from(state.passes)
        if state.step and self.output_dir and self.accelerator.is_main_process:
            # The run may have ended before it did.
            delete_oldest(self.output_dir, state.step, self.identity, self.config.checkpoints_total_limit)
        picture = self.validation.file(state.step)
        if state.step and self.validation.due(state.step) and picture and not picture.is_file():
            # The run ended between its checkpoint and these images.
            with self._averaged():
                self.validation.run(state.step)
        return state.step

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones."""
        average: EMAModel | None = self.average
        if average is None:
            yield
            return
        average.store(self.parameters)
        average.copy_to(self.parameters)
        try:
            yield
        finally:
            average.restore(self.parameters)
