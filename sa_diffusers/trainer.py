"""The training loop of eq. 4."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import nn
from tqdm import tqdm

from .configuration import CONFIG_NAME, FISHER_CONFIG_NAME, HISTORY_NAME, SelectiveAmnesiaConfig
from .data.prompts import UNIFORM_NOISE
from .data.sample_set import SampleSet, is_prompt
from .ewc import ElasticWeightConsolidation
from .files import read_json, replacing_folder, write_json
from .fisher.information import FisherInformation
from .hub import drop_local_names
from .model_card import push_pipeline, write_model_card
from .objectives.base import (
    Conditions,
    Objective,
    SamplingSettings,
    draw_timesteps,
    index_conditions,
)
from .parameter_selection import only_trainable, select_parameters

CHECKPOINT_PREFIX = "checkpoint-"
VALIDATION_NAME = "validation"
VALIDATION_SEED = 500_000
_STREAMS = {"surrogate": 1, "replay": 2, "noise": 3}


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

    Raises:
        ValueError: The selection matches nothing, or replay or Fisher information is missing or does not fit.
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
    ) -> None:
        self.objective = objective
        self.config = config
        self.accelerator = accelerator or create_accelerator(config)
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.parameters = select_parameters(objective.module, config.train_method)
        if config.ewc_weight > 0 and fisher is None:
            raise ValueError(
                f"ewc_weight={config.ewc_weight} needs Fisher information: give it, or set the weight to 0"
            )
        if config.replay_weight > 0 and not replay:
            raise ValueError(f"replay_weight={config.replay_weight} needs replay samples: give some, or set it to 0")
        self.surrogates = surrogates
        self.replay = replay if config.replay_weight > 0 else None
        self.fisher = fisher if config.ewc_weight > 0 else None
        self.history: list[dict[str, float]] = []

    # Preparation

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        kind: type[torch.optim.Optimizer] = torch.optim.AdamW
        if config.use_8bit_adam:
            kind = _import_bitsandbytes().optim.AdamW8bit
        rate = config.learning_rate
        if config.scale_lr:
            rate *= self.accelerator.num_processes * config.gradient_accumulation_steps * config.train_batch_size
        return kind(
            list(self.parameters.values()),
            lr=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )

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

    def _indices(self, count: int, step: int, micro: int, stream: str) -> torch.Tensor:
        """This process's rows of the samples, in reshuffled epochs; a function of the step alone."""
        size = self.config.train_batch_size
        position = (step * self.config.gradient_accumulation_steps + micro) * self.accelerator.num_processes
        start = (position + self.accelerator.process_index) * size
        rows = []
        for place in range(start, start + size):
            epoch, offset = divmod(place, count)
            if not rows or offset == 0 or place == start:
                order = torch.randperm(count, generator=self._generator(epoch, stream, shared=True))
            rows.append(order[offset])
        return torch.stack(rows)

    def _generator(self, number: int, stream: str, micro: int = 0, shared: bool = False) -> torch.Generator:
        rank = 0 if shared else self.accelerator.process_index
        key = (((self.config.seed * 10 + _STREAMS[stream]) * 1009 + rank) * 1009 + micro) * 10_000_019 + number
        return torch.Generator().manual_seed(key % (2**63))

    def _conditions_of(self, prompts: list[str]) -> Conditions:
        rows = torch.tensor([self._row[prompt] for prompt in prompts], device=self.objective.device)
        return index_conditions(self._conditions, rows)

    def _losses(self, module: nn.Module, frozen: FrozenModule | None, step: int, micro: int) -> torch.Tensor:
        """Mean surrogate loss and mean replay loss, `[2]`."""
        objective = self.objective
        device = objective.device
        generator = self._generator(step, "noise", micro)
        rows = self._indices(len(self.surrogates), step, micro, "surrogate").tolist()
        samples = self.surrogates.samples[rows]
        prompts = [self.surrogates.conditions[row] for row in rows]
        sources = [self.surrogates.sources[row] for row in rows]
        timesteps = draw_timesteps(len(rows), objective.num_train_timesteps, generator)
        count = len(rows)
        if self.replay:
            rows = self._indices(len(self.replay), step, micro, "replay").tolist()
            samples = torch.cat([samples, self.replay.samples[rows]])
            prompts += [self.replay.conditions[row] for row in rows]
            sources += [self.replay.conditions[row] for row in rows]
            timesteps = torch.cat([timesteps, draw_timesteps(len(rows), objective.num_train_timesteps, generator)])
        dropped = torch.rand(len(prompts), generator=generator) < self.config.condition_dropout
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
        timesteps = timesteps.to(device)
        noise = objective.draw_noise(samples, generator)
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

    def train(self) -> list[dict[str, float]]:
        """Train `max_train_steps` optimiser steps.

        Returns:
            For every logged step: `step`, `surrogate_loss`, `replay_loss`, `ewc_penalty`, `learning_rate`.

        Raises:
            FloatingPointError: A loss is not finite.
            ValueError: The checkpoint to resume from does not exist.
        """
        config, accelerator = self.config, self.accelerator
        with only_trainable(self.objective.module, self.parameters):
            return self._train(config, accelerator)

    def _train(self, config: SelectiveAmnesiaConfig, accelerator: Accelerator) -> list[dict[str, float]]:
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
        ema = EMAModel(list(self.parameters.values()), decay=config.ema_decay) if config.use_ema else None
        wrapped, optimizer = accelerator.prepare(module, optimizer)
        accelerator.register_for_checkpointing(schedule)
        if ema:
            accelerator.register_for_checkpointing(ema)
        first = self._resume()
        bar = tqdm(
            range(first, config.max_train_steps),
            initial=first,
            total=config.max_train_steps,
            desc="forgetting",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        for step in bar:
            losses = torch.zeros(2, device=self.objective.device)
            for micro in range(config.gradient_accumulation_steps):
                last = micro + 1 == config.gradient_accumulation_steps
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    with accelerator.autocast():
                        part = self._losses(wrapped, frozen, step, micro)
                    part = part / config.gradient_accumulation_steps
                    accelerator.backward(part[0] + config.replay_weight * part[1])
                losses += part.detach()
            accelerator.unscale_gradients(optimizer)
            logged = (step + 1) % config.logging_steps == 0 or step + 1 == config.max_train_steps
            penalty = ewc.penalty() if ewc and logged else None
            if ewc:
                ewc.add_gradient_()
            nn.utils.clip_grad_norm_(list(self.parameters.values()), config.max_grad_norm)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if ema:
                ema.step(list(self.parameters.values()))
            if logged:
                self._log(step + 1, accelerator.reduce(losses, reduction="mean"), penalty, rate, bar)
            if (step + 1) % config.checkpointing_steps == 0 and step + 1 < config.max_train_steps:
                self._save_checkpoint(step + 1)
            if config.validation_prompts and (
                (step + 1) % config.validation_steps == 0 or step + 1 == config.max_train_steps
            ):
                with _averaged(ema, list(self.parameters.values())):
                    self._validate(step + 1)
        if ema:
            ema.copy_to(list(self.parameters.values()))
        if config.gradient_checkpointing:
            module.disable_gradient_checkpointing()
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        module.eval()
        return self.history

    def _log(self, step: int, losses: torch.Tensor, penalty: torch.Tensor | None, rate: float, bar: tqdm) -> None:
        values = {
            "surrogate_loss": losses[0].item(),
            "replay_loss": losses[1].item(),
            "ewc_penalty": 0.0 if penalty is None else penalty.item(),
            "learning_rate": rate,
        }
        if not all(torch.isfinite(torch.tensor(value)) for value in values.values()):
            raise FloatingPointError(
                f"the loss is not finite at step {step} ({values}): lower the learning rate or the EWC weight, or use "
                "bf16 in place of fp16"
            )
        self.history.append({"step": step, **values})
        self.accelerator.log(values, step=step)
        bar.set_postfix(surrogate=f"{losses[0]:.4f}", replay=f"{losses[1]:.4f}", ewc=f"{values['ewc_penalty']:.4f}")

    # Checkpoints, validation, saving

    def _save_checkpoint(self, step: int) -> None:
        if self.output_dir is None:
            return
        target = self.output_dir / f"{CHECKPOINT_PREFIX}{step}"
        partial = self.output_dir / f".{CHECKPOINT_PREFIX}{step}-writing"
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            write_json(partial / HISTORY_NAME, self.history)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            limit = self.config.checkpoints_total_limit
            for old in checkpoints(self.output_dir)[: -limit if limit else 0]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        wanted = self.config.resume_from_checkpoint
        if not wanted:
            return 0
        if wanted == "latest":
            found = checkpoints(self.output_dir) if self.output_dir else []
            if not found:
                return 0
            folder = found[-1]
        else:
            folder = Path(wanted)
            if not folder.is_dir() and self.output_dir:
                folder = self.output_dir / wanted
        step = folder.name.removeprefix(CHECKPOINT_PREFIX)
        if not folder.is_dir() or step == folder.name or not step.isdecimal():
            raise ValueError(
                f'resume_from_checkpoint="{wanted}" is not a checkpoint folder (named {CHECKPOINT_PREFIX}STEP): use '
                "latest for the newest one, or leave the flag out"
            )
        self.accelerator.load_state(str(folder))
        self.history = read_json(folder / HISTORY_NAME)
        return int(step)

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        config = self.config
        prompts = [prompt for prompt in config.validation_prompts for _ in range(config.num_validation_images)]
        seeds = [VALIDATION_SEED + number for _ in config.validation_prompts
                 for number in range(config.num_validation_images)]  # fmt: skip
        with self.accelerator.autocast():
            samples = self.objective.sample(prompts, seeds, sampling_settings(config))
            pictures = self.objective.decode(samples)
        if self.output_dir is not None:
            folder = self.output_dir / VALIDATION_NAME
            folder.mkdir(parents=True, exist_ok=True)
            grid = make_image_grid(pictures, len(config.validation_prompts), config.num_validation_images)
            grid.save(folder / f"step-{step:06d}.png")
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

    def save(self, folder: str | Path) -> None:
        """Write the erased pipeline, the training history, and what the Fisher information came from; old files of the
        same names are replaced at the end.

        Raises:
            OSError: The disk is full, say; what was there before is unchanged.
        """
        if self.accelerator.is_main_process:
            with replacing_folder(folder) as staging:
                self.objective.save(staging)
                drop_local_names(staging)
                write_json(staging / HISTORY_NAME, self.history)
                if self.fisher is not None:
                    write_json(staging / FISHER_CONFIG_NAME, self.fisher.config)
        self.accelerator.wait_for_everyone()

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
        self.config.save(self.output_dir / CONFIG_NAME)
        write_model_card(self.output_dir)
        return push_pipeline(self.output_dir, repo_id, private)


def _import_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or leave the flag out") from None
    return bitsandbytes


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


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    steps = {path: path.name.removeprefix(CHECKPOINT_PREFIX) for path in Path(folder).glob(f"{CHECKPOINT_PREFIX}*")}
    found = [path for path, step in steps.items() if path.is_dir() and step.isdecimal()]
    return sorted(found, key=lambda path: int(steps[path]))


def sampling_settings(config: SelectiveAmnesiaConfig, guidance_scale: float | None = None) -> SamplingSettings:
    """The configuration's sampler; `guidance_scale` overrides its guidance."""
    return SamplingSettings(
        sampler=config.sampler,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        batch_size=config.sample_batch_size,
        resolution=config.resolution,
    )


def create_accelerator(config: SelectiveAmnesiaConfig, output_dir: str | Path | None = None) -> Accelerator:
    """An accelerator as the configuration asks for.

    Raises:
        ValueError: The hardware or a package that a flag needs is missing.
    """
    from accelerate.utils import ProjectConfiguration, is_tensorboard_available, is_wandb_available

    has_cuda = torch.cuda.is_available()
    if config.mixed_precision == "fp16" and not has_cuda:
        raise ValueError('mixed_precision="fp16" needs a CUDA device and there is none: use "bf16" or "no"')
    if config.allow_tf32:
        if not has_cuda:
            raise ValueError("allow_tf32 needs a CUDA device and there is none: leave the flag out")
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if config.use_8bit_adam:
        _import_bitsandbytes()
    tracker = None if output_dir is None or config.report_to == "none" else config.report_to
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if tracker and not available[tracker]():
        raise ValueError(f'report_to="{tracker}" needs the package {tracker}: pip install {tracker}, or use "none"')
    project = ProjectConfiguration(
        project_dir=str(output_dir) if output_dir else None,
        logging_dir=str(Path(output_dir) / config.logging_dir) if output_dir else None,
    )
    return Accelerator(mixed_precision=config.mixed_precision, log_with=tracker, project_config=project)
