"""The training loop of eq. 4."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import nn
from tqdm import tqdm

from .checkpoints import (
    CHECKPOINT_PREFIX,
    STATE_NAME,
    Choice,
    TrainingState,
    choose_checkpoint,
    delete_oldest,
    read_checkpoint,
    write_checkpoint,
)
from .configuration import CONFIG_NAME, FISHER_CONFIG_NAME, GRID_NAME, HISTORY_NAME, REPORT_NAME, SelectiveAmnesiaConfig
from .data.concepts import UNIFORM_NOISE
from .data.sample_set import SampleSet, is_prompt
from .data.sensitive import blurred
from .environment import create_accelerator, import_bitsandbytes, precision_in_use
from .ewc import ElasticWeightConsolidation
from .families.base import (
    Conditions,
    Objective,
    SamplingSettings,
    fingerprint_module,
    index_conditions,
)
from .files import replacing_folder, write_json
from .fisher import FisherInformation, fisher_identity
from .hub import CARD_NAME, drop_local_names, is_own_card, one_line
from .identity import Identity, fingerprint
from .model_card import push_pipeline, write_model_card
from .output_folder import REPORTED, VALIDATION_NAME, OutputFolder, write_finished
from .parameter_selection import only_trainable
from .processes import Interrupted, Pace, finishing, is_lost_peer, say, shrinking, stop_requested, wait_until, warn_once
from .seeds import first_seed, generator_of, seed_of

# What the trained weights depend on, beside their samples, the Fisher information and the base model.
TRAINING_SETTINGS = (
    "train_method", "ewc_weight", "replay_weight", "replay_surrogates", "seed", "max_train_steps", "target",
    "condition_dropout", "naive", "snr_gamma", "noise_offset", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles",
    "lr_power", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
    "use_ema", "ema_decay", "ema_warmup",
)  # fmt: skip
# A tenth of the training is the longest that a kill may cost, where a checkpoint is cheap or some minutes have passed.
_PARTS_OF_A_RUN = 10
_BYTES_PER_SECOND = 300e6
# So many steps in a row without a finite gradient end the training. Half precision needs some to find its scale.
_MAX_SKIPPED = {"fp16": 25}
_MAX_SKIPPED_ELSE = 10
_MICRO_BATCHES = 4096


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


class SelectiveAmnesiaTrainer:
    """Trains a model to forget (paper, eq. 4): surrogate ELBO on the concept, EWC, generative replay.

    Minimises, over the selected parameters, `surrogate loss + replay_weight * replay loss + ewc_weight * sum F (theta -
    theta*)^2`, each loss the negative ELBO averaged over a batch. With `target="frozen"` the network regresses on the
    frozen model's own prediction (under the surrogate's prompt, for surrogates) in place of the drawn noise: on samples
    of the frozen model its prediction is the noise's conditional mean, so the expected gradient is that of the ELBO,
    with less variance. Surrogates that no prompt drew keep the noise's target, uniform noise its exact mean where the
    objective knows it (`Objective.uniform_noise_target`).

    Args:
        objective: The model; its module is trained in place.
        config: Settings of the training.
        surrogates: Samples of the surrogate, under the concept's prompts; with `naive=True` (eq. 3) the concept's own,
            whose loss is raised.
        replay: Samples to remember; may be None if `replay_weight` is 0.
        fisher: Fisher information of the selected parameters; may be None if `ewc_weight` is 0.
        accelerator: Default: one made from the configuration.
        output_dir: Where checkpoints and validation images go; None writes none.
        identity: What the trained weights depend on, to which checkpoints are bound. Default: found out from what is
            given here.
        blur: Whether validation images are blurred.

    Raises:
        ValueError: The selection matches nothing, the weights are not float32, or replay or Fisher information is
            missing or belongs to another model.
    """

    def __init__(
        self,
        objective: Objective,
        config: SelectiveAmnesiaConfig,
        surrogates: SampleSet,
        replay: SampleSet | None,
        fisher: FisherInformation | None,
        accelerator: Accelerator | None = None,
        output_dir: str | Path | None = None,
        identity: Identity | None = None,
        blur: bool = False,
    ) -> None:
        self.objective = objective
        self.config = config
        self.blur = blur
        self.accelerator = accelerator or create_accelerator(config)
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.parameters = objective.select(config.train_method)
        if config.ewc_weight > 0 and fisher is None:
            raise ValueError(
                f"ewc_weight={config.ewc_weight} needs Fisher information: give it, or set the weight to 0"
            )
        if config.replay_weight > 0 and not replay:
            raise ValueError(f"replay_weight={config.replay_weight} needs replay samples: give some, or set it to 0")
        self.surrogates = surrogates
        self.replay = replay if config.replay_weight > 0 else None
        self.fisher = fisher if config.ewc_weight > 0 else None
        halves = [name for name, parameter in self.parameters.items() if parameter.dtype != torch.float32]
        if halves:
            raise ValueError(
                f"{halves[0]} is {self.parameters[halves[0]].dtype}: load the model in float32, and train it in half "
                "precision with mixed_precision"
            )
        if self.fisher is not None and identity is None:
            expected = fisher_identity(objective, fingerprint_module(objective.module))
            self.fisher.check(expected, self.parameters)
        self.identity = identity
        self.validation_dir = self.output_dir and self.output_dir / VALIDATION_NAME
        self.history: list[dict[str, float]] = []
        self.skipped = 0
        self._has_trained = False
        self._micro_batch = config.train_batch_size
        self._drawn: _Draws | None = None

    def _identity(self) -> Identity:
        given = {
            name: samples and fingerprint([samples.fingerprint, samples.samples.double().sum().item()])
            for name, samples in (("surrogates", self.surrogates), ("replay", self.replay))
        }
        fisher = self.fisher and fingerprint(self.fisher.config)
        facts = {"base": self.objective.fingerprint(), **given, "fisher": fisher}
        return training_identity(self.config, self.accelerator, facts)

    # Preparation

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        kind: type[torch.optim.Optimizer] = torch.optim.AdamW
        if config.use_8bit_adam:
            kind = import_bitsandbytes().optim.AdamW8bit
        return kind(
            list(self.parameters.values()),
            lr=settings_facts(config, self.accelerator.num_processes)["learning_rate"],
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )

    @torch.no_grad()
    def _encode_conditions(self) -> None:
        """Embed every prompt once; samples refer to rows of the table."""
        used = [""] if self.config.condition_dropout else []
        used += [*self.surrogates.conditions, *filter(is_prompt, self.surrogates.sources)]
        used += self.replay.conditions if self.replay else []
        prompts = list(dict.fromkeys(used))
        self._row = {prompt: row for row, prompt in enumerate(prompts)}
        with self.accelerator.autocast():
            self._conditions = self.objective.encode_prompts(prompts)

    # Batches

    @property
    def _global_batch(self) -> int:
        """Surrogate samples, and replay samples, of one optimiser step over all processes."""
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def _slices(self) -> list[slice]:
        """The parts of the global batch that this process takes, one forward pass each."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        starts = range(rank * self._micro_batch, self._global_batch, processes * self._micro_batch)
        return [slice(start, min(start + self._micro_batch, self._global_batch)) for start in starts]

    def _order(self, count: int, step: int, stream: str) -> list[int]:
        """Rows of the global batch, in reshuffled epochs; a function of the step alone."""
        start = step * self._global_batch
        rows = []
        for place in range(start, start + self._global_batch):
            epoch, offset = divmod(place, count)
            if not rows or offset == 0:
                order = torch.randperm(count, generator=generator_of(f"{stream} order", self.config.seed, epoch))
            rows.append(int(order[offset]))
        return rows

    def _indices(self, count: int, step: int, micro: int, stream: str) -> torch.Tensor:
        """This process's rows of the samples in one forward pass."""
        return torch.tensor(self._order(count, step, stream)[self._slices()[micro]])

    def _draw(self, step: int) -> "_Draws":
        """All that is random in a step, for the global batch: every process draws the same, and takes its part."""
        if self._drawn is not None and self._drawn.step == step:
            return self._drawn
        objective, size = self.objective, self._global_batch
        generator = generator_of("training", self.config.seed, step)
        sets = [(self.surrogates, "surrogate"), *([(self.replay, "replay")] if self.replay else [])]
        timesteps = [objective.path.draw_timesteps(size, generator) for _ in sets]
        dropped = torch.rand(len(sets) * size, generator=generator) < self.config.condition_dropout
        like = self.surrogates.samples[:1].expand(len(sets) * size, *self.surrogates.samples.shape[1:])
        noise = objective.draw_noise(like, generator).cpu()
        self._drawn = _Draws(
            step, [self._order(len(samples), step, name) for samples, name in sets], timesteps,
            list(dropped.split(size)), list(noise.split(size)),
        )  # fmt: skip
        return self._drawn

    def _conditions_of(self, prompts: list[str]) -> Conditions:
        rows = torch.tensor([self._row[prompt] for prompt in prompts], device=self.objective.device)
        return index_conditions(self._conditions, rows)

    def _losses(self, module: nn.Module, frozen: FrozenModule | None, step: int, micro: int) -> torch.Tensor:
        """Mean surrogate loss and mean replay loss, `[2]`."""
        objective = self.objective
        device = objective.device
        draws, part = self._draw(step), self._slices()[micro]
        rows = draws.rows[0][part]
        count = len(rows)
        samples = self.surrogates.samples[rows]
        prompts = [self.surrogates.conditions[row] for row in rows]
        sources = [self.surrogates.sources[row] for row in rows]
        if self.replay:
            rows = draws.rows[1][part]
            samples = torch.cat([samples, self.replay.samples[rows]])
            prompts += [self.replay.conditions[row] for row in rows]
            sources += [self.replay.conditions[row] for row in rows]
        timesteps, dropped, noise = (
            torch.cat([values[part] for values in drawn]) for drawn in (draws.timesteps, draws.dropped, draws.noise)
        )
        if self.config.naive:
            dropped[:count] = False
        for place in dropped.nonzero().flatten().tolist():
            if not is_prompt(sources[place]):
                # New to the model, noise say: guidance would push away from what the empty prompt does not know.
                prompts[place] = ""
            elif place >= count or frozen is not None:
                # For a surrogate, the noise's target would pull the empty prompt towards it.
                prompts[place] = sources[place] = ""
        samples = samples.to(device)
        conditions = self._conditions_of(prompts)
        timesteps, noise = timesteps.to(device), noise.to(device)
        target = None
        if frozen is not None:
            # What no prompt drew has no teacher: it keeps the noise's target, or that target's mean where it is known.
            target = objective.target(samples, timesteps, noise).float().clone()
            uniform = [row for row, source in enumerate(sources) if source == UNIFORM_NOISE]
            if uniform:
                mean = objective.uniform_noise_target(samples[uniform], timesteps[uniform], noise[uniform])
                target[uniform] = mean.float()
            taught = [row for row, source in enumerate(sources) if is_prompt(source)]
            if taught:
                teachers = self._conditions_of([sources[row] for row in taught])
                prediction = objective.predict(frozen, samples[taught], teachers, timesteps[taught], noise[taught])
                target[taught] = prediction.float()
        loss = objective.negative_elbo(module, samples, conditions, timesteps, noise, target)
        surrogate_loss = -loss[:count].mean() if self.config.naive else loss[:count].mean()
        replay_loss = loss[count:].mean() if self.replay else torch.zeros_like(surrogate_loss)
        return torch.stack([surrogate_loss, replay_loss])

    # The loop

    def train(self, checkpoint: Choice | None = None) -> list[dict[str, float]]:
        """Train `max_train_steps` optimiser steps, from the checkpoint that `resume_from_checkpoint` means.

        The steps are the same for any number of processes and any split of the global batch, to rounding; a run that
        goes on from a checkpoint ends in the same bits as one that was not stopped.

        Args:
            checkpoint: Where to go on, if it has been chosen already.

        Returns:
            For every logged step: `step`, `surrogate_loss`, `replay_loss`, `ewc_penalty`, `learning_rate`.

        Raises:
            FloatingPointError: No gradient is finite any more. The last checkpoint is from before.
            ValueError: The checkpoint to resume from does not exist or is of another run, or this trainer has trained.
            Interrupted: The run is to stop; a checkpoint is written first.
        """
        if self._has_trained:
            raise ValueError("this trainer has trained already, and its weights are no longer theta*: make a new one")
        config, accelerator, module = self.config, self.accelerator, self.objective.module
        if self.identity is None and (self.output_dir or config.resume_from_checkpoint not in (None, "latest", "no")):
            # Before the weights are others.
            self.identity = self._identity()
        choice = checkpoint or choose_checkpoint(
            self.output_dir, config.resume_from_checkpoint, self.identity, config.to_dict()
        )
        if accelerator.is_main_process:
            for note in choice.notes:
                say(note)
        self._has_trained = True
        training, finished = module.training, False
        checkpointing = getattr(module, "is_gradient_checkpointing", False)
        prepared: list[nn.Module] = []
        try:
            # Dropout is seeded step by step; the caller's own generator stays where it was.
            with only_trainable(module, self.parameters), torch.random.fork_rng(), finishing():
                history = self._train(config, accelerator, choice.folder, prepared)
            finished = True
            return history
        except RuntimeError as error:
            if accelerator.num_processes > 1 and is_lost_peer(error):
                raise Interrupted("another process of this run is gone") from error
            raise
        finally:
            for wrapped in prepared:
                accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            if config.gradient_checkpointing and not checkpointing:
                module.disable_gradient_checkpointing()
            module.train(training and not finished)
            self._drawn = None

    def _train(self, config: SelectiveAmnesiaConfig, accelerator: Accelerator, checkpoint: Path | None,
               prepared: list[nn.Module]) -> list[dict[str, float]]:  # fmt: skip
        module = self.objective.module
        module.train()
        if config.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        self._encode_conditions()
        # A weight of zero leaves the term out, and the Fisher information with it; the anchor serves the teacher too.
        ewc = None
        if self.fisher is not None:
            ewc = ElasticWeightConsolidation(self.parameters, self.fisher.values, config.ewc_weight)
        frozen = None
        if config.target == "frozen":
            anchor = ewc.anchor if ewc else {name: p.detach().clone() for name, p in self.parameters.items()}
            frozen = FrozenModule(module, anchor)
        optimizer = self._optimizer()
        schedule = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        ema = self._average() if config.use_ema else None
        wrapped, optimizer = accelerator.prepare(module, optimizer)
        prepared.append(wrapped)
        parameters = list(self.parameters.values())
        first = self._resume(checkpoint, optimizer, schedule, ema) if checkpoint else 0
        pace = Pace(seconds=60 * config.checkpointing_minutes, cost=self.checkpoint_bytes() / _BYTES_PER_SECOND)
        part_of_run = max(1, config.max_train_steps // _PARTS_OF_A_RUN)
        bar = tqdm(
            range(first, config.max_train_steps),
            initial=first,
            total=config.max_train_steps,
            desc="forgetting",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        skipped_in_a_row = 0
        if first and self.output_dir and accelerator.is_main_process:
            # The run may have ended before it did.
            delete_oldest(self.output_dir, first, self.identity, config.checkpoints_total_limit)
        picture = self._validation_file(first)
        if first and self._validates(first) and picture and not picture.is_file():
            # The run ended between its checkpoint and these images.
            with _averaged(ema, parameters):
                self._validate(first)
        for step in bar:
            losses = self._backward(wrapped, frozen, step)
            accelerator.unscale_gradients(optimizer)
            logged = (step + 1) % config.logging_steps == 0 or step + 1 == config.max_train_steps
            penalty = ewc.penalty() if ewc and logged else None
            if ewc:
                ewc.add_gradient_()
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            rate = schedule.get_last_lr()[0]
            # The norm of the reduced gradient is the same on all processes, and so is what follows from it.
            if torch.isfinite(norm):
                optimizer.step()
                skipped_in_a_row = 0
                if ema:
                    ema.step(parameters)
                if logged:
                    self._log(step + 1, accelerator.reduce(losses, reduction="mean"), penalty, rate, bar)
            else:
                if accelerator.scaler is not None:
                    accelerator.scaler.update()
                skipped_in_a_row += 1
                self._skip(step + 1, skipped_in_a_row)
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            is_part = (step + 1) % part_of_run == 0
            stopping, due = self._agree(stop_requested() is not None, is_part and pace.due())
            due = due or (step + 1) % config.checkpointing_steps == 0
            if stopping or (due and step + 1 < config.max_train_steps):
                began = time.monotonic()
                folder = self._save_checkpoint(step + 1, optimizer, schedule, ema)
                pace.done(began)
                if stopping:
                    kept = f"; it is kept in {folder}" if folder else ""
                    raise Interrupted(f"{stop_requested() or 'another process'} after step {step + 1}{kept}")
            if self._validates(step + 1):
                with _averaged(ema, parameters):
                    self._validate(step + 1)
        if ema:
            ema.copy_to(parameters)
        if not all(torch.isfinite(parameter).all() for parameter in parameters):
            raise FloatingPointError(
                f"the weights are not finite at step {config.max_train_steps}: lower the learning rate, or the EWC "
                "weight"
            )
        return self.history

    def _backward(self, wrapped: nn.Module, frozen: FrozenModule | None, step: int) -> torch.Tensor:
        """Gradients of one optimiser step, reduced over the processes; returns this process's mean losses, `[2]`."""
        config, accelerator = self.config, self.accelerator

        def backward(micro_batch: int) -> torch.Tensor:
            self._micro_batch = micro_batch
            for parameter in self.parameters.values():
                parameter.grad = None
            slices = self._slices()
            own = sum(part.stop - part.start for part in slices)
            losses = torch.zeros(2, device=self.objective.device)
            for micro, part in enumerate(slices):
                last = micro + 1 == len(slices)
                slot = part.start // micro_batch % _MICRO_BATCHES
                torch.manual_seed(seed_of("dropout", config.seed, step * _MICRO_BATCHES + slot))
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    with accelerator.autocast():
                        loss = self._losses(wrapped, frozen, step, micro)
                    loss = loss * ((part.stop - part.start) / own)
                    accelerator.backward(loss[0] + config.replay_weight * loss[1])
                losses += loss.detach()
            return losses

        advice = (
            ", and raise --gradient_accumulation_steps by as much (the steps stay the same, to rounding), or use "
            "--gradient_checkpointing"
        )
        return shrinking(backward, self._micro_batch, "train_batch_size", accelerator.num_processes, advice)

    def _average(self) -> EMAModel:
        config = self.config
        if config.ema_warmup:
            return EMAModel(list(self.parameters.values()), decay=config.ema_decay)
        # One decay from the first step on: the average that the base model's weights are is continued.
        return EMAModel(list(self.parameters.values()), decay=config.ema_decay, min_decay=config.ema_decay,
                        update_after_step=-1)  # fmt: skip

    def _agree(self, stopping: bool, due: bool) -> tuple[bool, bool]:
        """What any process asks for, all do at the same step."""
        if self.accelerator.num_processes == 1:
            return stopping, due
        # Whether a checkpoint is due is a matter of the main process's clock.
        due = due and self.accelerator.is_main_process
        asked = torch.tensor([float(stopping), float(due)], device=self.accelerator.device)
        asked = self.accelerator.reduce(asked, reduction="sum")
        return bool(asked[0] > 0), bool(asked[1] > 0)

    def _skip(self, step: int, in_a_row: int) -> None:
        self.skipped += 1
        limit = _MAX_SKIPPED.get(str(self.accelerator.mixed_precision), _MAX_SKIPPED_ELSE)
        if in_a_row >= limit:
            raise FloatingPointError(
                f"the gradient is not finite at step {step}, and was not at the {limit - 1} steps before: lower the "
                "learning rate or the EWC weight, or use bf16 in place of fp16"
            )
        if self.accelerator.is_main_process:
            say(f"warning: the gradient is not finite at step {step}: the step is left out ({self.skipped} so far)")

    def _log(self, step: int, losses: torch.Tensor, penalty: torch.Tensor | None, rate: float, bar: tqdm) -> None:
        values = {
            "surrogate_loss": losses[0].item(),
            "replay_loss": losses[1].item(),
            "ewc_penalty": 0.0 if penalty is None else penalty.item(),
            "learning_rate": rate,
        }
        if not all(torch.isfinite(torch.tensor(value)) for value in values.values()):
            return
        self.history.append({"step": step, **values})
        try:
            self.accelerator.log(values, step=step)
        except Exception as error:  # a tracker's network errors are its own kinds
            warn_once(f"the tracker took no entry ({one_line(error)}); the history in the output folder goes on")
        bar.set_postfix(surrogate=f"{losses[0]:.4f}", replay=f"{losses[1]:.4f}", ewc=f"{values['ewc_penalty']:.4f}")

    # Checkpoints, validation, saving

    def checkpoint_bytes(self) -> int:
        """About how much one checkpoint takes on disk: parameters, Adam's two moments, and the average."""
        copies = (1.5 if self.config.use_8bit_adam else 3) + self.config.use_ema
        return int(copies * sum(4 * parameter.numel() for parameter in self.parameters.values()))

    def _save_checkpoint(self, step: int, optimizer: Any, schedule: Any, ema: EMAModel | None) -> Path | None:
        if self.output_dir is None:
            return None
        target = self.output_dir / f"{CHECKPOINT_PREFIX}{step}"
        if not self.accelerator.is_main_process:
            wait_until((target / STATE_NAME).is_file)
            return target
        state = TrainingState.of(
            step, self.parameters, optimizer, schedule, ema, self.accelerator.scaler, history=self.history,
            skipped=self.skipped,
        )  # fmt: skip
        return write_checkpoint(
            self.output_dir, state, self.identity, self.config.to_dict(), self.config.checkpoints_total_limit
        )

    def _resume(self, folder: Path, optimizer: Any, schedule: Any, ema: EMAModel | None) -> int:
        state = read_checkpoint(folder)
        state.restore(self.parameters, optimizer, schedule, ema, self.accelerator.scaler)
        self.history, self.skipped = state.history, state.skipped
        return state.step

    def _validates(self, step: int) -> bool:
        config = self.config
        return bool(config.validation_prompts) and (
            step % config.validation_steps == 0 or step == config.max_train_steps
        )

    def _validation_file(self, step: int) -> Path | None:
        return self.validation_dir and self.validation_dir / f"step-{step:06d}.png"

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        config = self.config
        path = self._validation_file(step)
        if not self.accelerator.is_main_process:
            if path:
                wait_until(path.is_file)
            return
        prompts = [prompt for prompt in config.validation_prompts for _ in range(config.num_validation_images)]
        # The same noise for each prompt, so that only the prompt differs.
        first = first_seed("validation", config.seed)
        seeds = [first + number for _ in config.validation_prompts for number in range(config.num_validation_images)]
        with self.accelerator.autocast():
            samples = self.objective.sample(prompts, seeds, sampling_settings(config))
            pictures = self.objective.decode(samples)
        if self.blur:
            pictures = [blurred(picture) for picture in pictures]
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                import numpy as np

                tracker.writer.add_images("validation", np.stack([np.asarray(picture) for picture in pictures]), step,
                                          dataformats="NHWC")  # fmt: skip
            elif tracker.name == "wandb":
                import wandb

                images = [wandb.Image(picture, caption=prompt)
                          for picture, prompt in zip(pictures, prompts, strict=True)]  # fmt: skip
                tracker.log({"validation": images}, step=step)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp.png")
            make_image_grid(pictures, len(config.validation_prompts), config.num_validation_images).save(temporary)
            temporary.replace(path)

    def save(self, folder: str | Path) -> None:
        """Write the erased pipeline, its settings, the training history, and what the Fisher information came from.

        What belongs to earlier weights in the folder (report, pictures, card) goes in the same step. Files of the
        user's own stay.

        Raises:
            OSError: The disk is full, say; what was there before is unchanged.
        """
        folder = Path(folder)
        if not self.accelerator.is_main_process:
            wait_until(lambda: _holds(folder, self.identity) if self.identity else (folder / CONFIG_NAME).is_file())
            return
        leaving = [REPORT_NAME, "report.md", "report.html", GRID_NAME, FISHER_CONFIG_NAME, REPORTED]
        if is_own_card(folder):
            leaving.append(CARD_NAME)
        apart = self.validation_dir is not None and self.validation_dir.parent != folder
        if apart:
            leaving.append(VALIDATION_NAME)
        with replacing_folder(folder, leaving) as staging:
            self.objective.save(staging)
            drop_local_names(staging)
            write_json(staging / HISTORY_NAME, self.history)
            if self.fisher is not None:
                write_json(staging / FISHER_CONFIG_NAME, self.fisher.config)
            self.config.save(staging / CONFIG_NAME)
            if apart and self.validation_dir.is_dir():
                shutil.copytree(self.validation_dir, staging / VALIDATION_NAME)
            if self.identity is not None:
                write_finished(staging, self.identity)
        if apart:
            shutil.rmtree(self.validation_dir, ignore_errors=True)

    def push_to_hub(self, repo_id: str | None = None, private: bool = False) -> str | None:
        """Save pipeline, settings and model card in `output_dir`, and upload that folder.

        Args:
            repo_id: Name on the Hub (default: the folder's name, under the user).
            private: Make a new repository private.

        Returns:
            The address of the repository; None on all processes but the main one.

        Raises:
            ValueError: There is no `output_dir`, or the Hub allows no such name.
            ConnectionError: The upload failed. What is in the folder is whole; the message says how to repeat it.
        """
        if self.output_dir is None:
            raise ValueError("push_to_hub needs a folder to upload: give the trainer an output_dir")
        self.save(self.output_dir)
        if not self.accelerator.is_main_process:
            return None
        write_model_card(self.output_dir)
        return push_pipeline(self.output_dir, repo_id, private)


@dataclass(frozen=True)
class _Draws:
    """What is random in one step, for the global batch; each list holds the surrogates' part and the replay's.

    Attributes:
        step: The step.
        rows: Of the samples.
        timesteps: `int64` `[batch]`.
        dropped: Whether the condition is left out, `[batch]`.
        noise: `[batch, ...]`, on the CPU.
    """

    step: int
    rows: list[list[int]]
    timesteps: list[torch.Tensor]
    dropped: list[torch.Tensor]
    noise: list[torch.Tensor]


def settings_facts(config: SelectiveAmnesiaConfig, processes: int) -> dict[str, Any]:
    """What the trained weights depend on, as far as it is a setting of the training."""
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    return {
        **{name: getattr(config, name) for name in TRAINING_SETTINGS},
        "global_batch": batch,
        "learning_rate": config.learning_rate * (batch if config.scale_lr else 1),
    }


def training_identity(config: SelectiveAmnesiaConfig, accelerator: Accelerator, given: Mapping[str, Any]) -> Identity:
    """What trained weights depend on.

    Args:
        config: The settings.
        accelerator: Processes and precision in use.
        given: Digests of the base model, the samples and the Fisher information.
    """
    facts = {**settings_facts(config, accelerator.num_processes), **given, "precision": precision_in_use(accelerator)}
    return Identity("training", facts)


def _holds(folder: Path, identity: Identity) -> bool:
    return OutputFolder(folder).names_finished(identity)


@contextlib.contextmanager
def _averaged(ema: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The averaged weights in place of the trained ones."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def sampling_settings(config: SelectiveAmnesiaConfig, guidance_scale: float | None = None) -> SamplingSettings:
    """The configuration's sampler; `guidance_scale` overrides its guidance."""
    return SamplingSettings(
        sampler=config.sampler,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        batch_size=config.sample_batch_size,
        resolution=config.resolution,
    )
