"""The loop over optimiser steps: gradients, the EWC term, checkpoints, callbacks."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from ..configuration import SelectiveAmnesiaConfig
from ..families.base import Denoiser, Objective
from ..fisher import FisherInformation
from ..identity import Identity
from ..processes import Interrupted, Pace, shrinking, stop_requested, wait_until
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
from .ewc import ElasticWeightConsolidation
from .progress import Progress
from .settings import make_average
from .trainable import FullWeights
from .validation import Validation

# A tenth of the training is the longest that a kill may cost, where a checkpoint is cheap or some minutes have passed.
_PARTS_OF_A_RUN = 10
_BYTES_PER_SECOND = 300e6
_MICRO_BATCHES = 4096


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
        stopped: The step after which a callback ended the training; None if none did.
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
    stopped: int | None = field(default=None, init=False)

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
        self.wrapped, self.optimizer = self.accelerator.prepare(module, self.optimizer)
        # Preparing may have put other tensors in place of the parameters.
        prepared = dict(module.named_parameters())
        self.trainable = FullWeights(module, {name: prepared[name] for name in self.names})
        # A weight of zero leaves the term out, and the Fisher information with it; the anchor serves the teacher too.
        self.ewc = ElasticWeightConsolidation(self.trainable, fisher.values, config.ewc_weight) if fisher else None
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
        first = self._resume(checkpoint) if checkpoint else 0
        pace = Pace(seconds=60 * config.checkpointing_minutes, cost=checkpoint_bytes / _BYTES_PER_SECOND)
        part_of_run = max(1, config.max_train_steps // _PARTS_OF_A_RUN)
        bar = tqdm(
            range(first, config.max_train_steps),
            initial=first,
            total=config.max_train_steps,
            desc="forgetting",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        for step in bar:
            state = self._step(step, bar)
            for callback in self.callbacks:
                callback(state)
            done = step + 1
            is_part = done % part_of_run == 0
            interrupted, ends, due = self._agree(stop_requested() is not None, state.stop, is_part and pace.due())
            due = due or done % config.checkpointing_steps == 0
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
                if done % config.logging_steps:
                    # The last step is on record, whichever it is.
                    losses = torch.tensor([state.surrogate_loss, state.replay_loss])
                    self.progress.log(done, losses, self.ewc.penalty() if self.ewc else None, state.learning_rate, bar)
                break
        bar.close()
        if self.average:
            self.average.copy_to(self.parameters)
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters):
            raise FloatingPointError(
                f"the weights are not finite at step {self.stopped or config.max_train_steps}: lower the learning "
                "rate, or the EWC weight"
            )

    def _step(self, step: int, bar: tqdm) -> StepState:
        config, accelerator, progress, ewc = self.config, self.accelerator, self.progress, self.ewc
        losses = self.backward(step)
        accelerator.unscale_gradients(self.optimizer)
        logged = (step + 1) % config.logging_steps == 0 or step + 1 == config.max_train_steps
        penalty = ewc.penalty() if ewc and logged else None
        if ewc:
            ewc.add_gradient_()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        rate = self.schedule.get_last_lr()[0]
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
        return StepState(step + 1, *seen, rate, not finite, self.trainable.parameters)

    def backward(self, step: int) -> torch.Tensor:
        """Gradients of one optimiser step, reduced over the processes; returns this process's mean losses, `[2]`."""
        config, accelerator = self.config, self.accelerator

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
                    accelerator.backward(loss[0] + config.replay_weight * loss[1])
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
            wait_until((target / STATE_NAME).is_file)
            return target
        state = TrainingState.of(
            step, self.trainable.parameters, *self._kept(), history=self.progress.history,
            skipped=self.progress.skipped, passes=passes,
        )  # fmt: skip
        limit = self.config.checkpoints_total_limit
        return write_checkpoint(self.output_dir, state, self.identity, self.config.to_dict(), limit)

    def _kept(self) -> tuple[Any, ...]:
        return self.optimizer, self.schedule, self.average, self.accelerator.scaler

    def _resume(self, folder: Path) -> int:
        state = read_checkpoint(folder)
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
