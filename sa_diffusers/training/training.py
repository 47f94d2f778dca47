"""Making a model forget: training on finished parts."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..configuration import (
    BASE_DEFAULTS_NAME,
    CONFIG_NAME,
    ENDING_NAME,
    FISHER_CONFIG_NAME,
    HISTORY_NAME,
    MERGED_NAME,
    REPORT_FILES,
    SelectiveAmnesiaConfig,
    inherited_defaults,
)
from ..data.sample_set import SampleSet
from ..environment import create_accelerator
from ..families.adapters import LowRankAdapter, export_kohya, save_adapter
from ..families.base import Objective
from ..families.digests import fingerprint_module
from ..families.trained import check_apart, place_of_base, told_variant
from ..files import replacing_folder, write_json
from ..fisher import FisherInformation, fisher_identity
from ..hub import CARD_NAME, adapter_header, drop_local_names, evaluation_files, is_own_card
from ..identity import Identity, fingerprint
from ..output_folder import REPORTED, VALIDATION_NAME, OutputFolder, model_files, write_finished
from ..parameter_selection import only_trainable, recomputing
from ..passes import Passes, counted
from ..processes import Interrupted, finishing, is_lost_peer, say, wait_until
from ..publish import push_pipeline, write_model_card
from ..quantization import check_quantized, kind_of
from ..results.schema import Ending
from ..seeds import seed_of
from .batches import BatchPolicy
from .callbacks import Callback, step_functions
from .check import SampledCheck
from .checkpoints import Choice, choose_checkpoint
from .controller import Controller, step_cost
from .loop import Loop
from .neighbours import Neighbours
from .probes import Probes
from .progress import Progress
from .settings import adapted_layers, dropped_conditions, global_batch, make_optimizer, training_identity
from .trainable import in_float32
from .validation import Validation


class Training:
    """Trains a model to forget (paper, eq. 4): surrogate ELBO on the concept, EWC, generative replay.

    Minimises, over the selected parameters, `surrogate loss + replay_weight * replay loss + ewc_weight * sum F (theta -
    theta*)^2`, each loss the negative ELBO averaged over a batch. With `target="frozen"` the network regresses on the
    frozen model's own prediction (under the surrogate's prompt, for surrogates) in place of the drawn noise: on samples
    of the frozen model its prediction is the noise's conditional mean, so the expected gradient is that of the ELBO,
    with less variance. Surrogates that no prompt drew keep the noise's target, uniform noise its exact mean where the
    objective knows it (`Objective.uniform_noise_target`); see `BatchPolicy`.

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
        callbacks: Functions, or objects with `after_step(state)`, that are called after every step with a `StepState`;
            one that sets `state.stop` ends the training there.
        probes: What the training measures, tunes and stops itself by; without, all is left to the settings.
        check: Samples a few images before the training stops.

    Attributes:
        controller: What the probes said, and what was done about it; None without probes.
        ending: What the probes say of the end; None where they say nothing.
        fused: Adapters that are in the base model's weights, in words; the header of an adapter's file names them.

    Raises:
        ValueError: The selection matches nothing, the weights are of another precision than `weights_dtype`, or replay
            or Fisher information is missing or belongs to another model.
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
        callbacks: Sequence[Callback] = (),
        probes: Probes | None = None,
        check: SampledCheck | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        self.objective = objective
        self.config = config
        self.blur = blur
        self.callbacks = callbacks
        step_functions(callbacks)
        self.accelerator = accelerator or create_accelerator(config)
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.parameters = objective.select(config.train_method)
        self.layers = adapted_layers(config, objective)
        self.fused: Sequence[str] = ()
        self._trained: Mapping[str, nn.Parameter] = self.parameters
        # A and B of the adapter, once it is trained.
        self._matrices: dict[str, torch.Tensor] | None = None
        if config.consolidates and fisher is None:
            raise ValueError("elastic weight consolidation needs Fisher information: give it, or leave it out (ewc 0)")
        if config.replays and not replay:
            raise ValueError("the replay loss needs replay samples: give some, or set replay_weight to 0")
        self.surrogates = surrogates
        self.replay = replay if config.replays else None
        self.fisher = fisher if config.consolidates else None
        if self.fisher is not None and config.ewc_weight is None and probes is None:
            raise ValueError(
                f"ewc={config.ewc:g} is calibrated by probes, and there are none: give them, or ewc_weight, or set ewc "
                "to 0"
            )
        known = (torch.float32, getattr(torch, config.weights_dtype))
        check_quantized(objective.module, config.base_quantization)
        halves = [name for name, parameter in self.parameters.items()
                  if parameter.dtype not in known and kind_of(parameter) is None]  # fmt: skip
        if halves:
            raise ValueError(
                f"{halves[0]} is {self.parameters[halves[0]].dtype}: load the model in {config.weights_dtype}, as "
                "weights_dtype says, and train it in half precision with mixed_precision"
            )
        if self.fisher is not None and identity is None:
            expected = fisher_identity(objective, fingerprint_module(objective.module))
            self.fisher.check(expected, self.parameters)
        self.identity = identity
        self.validation_dir = self.output_dir and self.output_dir / VALIDATION_NAME
        self.progress = Progress(self.accelerator)
        self.controller: Controller | None = None
        if probes is not None:
            batch = global_batch(config, self.accelerator.num_processes) * (2 if self.replay else 1)
            mistaken = getattr(check, "mistaken", 0.0)
            self.controller = Controller(probes, config, check, step_cost(config, batch), mistaken)
        # What every part of the erasure took of the network when it was made, by the name of its stage.
        self.made: dict[str, Passes | None] = {}
        self.ending: Ending | None = None
        self._neighbours = neighbours
        self._has_trained = False

    @property
    def history(self) -> list[dict[str, float]]:
        """What was logged; see `train`."""
        return self.progress.history

    @property
    def skipped(self) -> int:
        """Steps left out because their gradient was not finite."""
        return self.progress.skipped

    def _identity(self) -> Identity:
        given = {
            name: samples and fingerprint([samples.fingerprint, samples.samples.double().sum().item()])
            for name, samples in (("surrogates", self.surrogates), ("replay", self.replay))
        }
        fisher = self.fisher and fingerprint(self.fisher.config)
        facts = {"base": self.objective.fingerprint(), **given, "fisher": fisher}
        return training_identity(self.config, self.accelerator, facts)

    def _optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.config, self._trained.values(), self.accelerator.num_processes)

    def batches(self) -> BatchPolicy:
        """What each step gets; every prompt is embedded for it."""
        config = self.config
        with self.accelerator.autocast():
            return BatchPolicy(
                self.objective, self.surrogates, self.replay, global_batch(config, self.accelerator.num_processes),
                config.seed, dropped_conditions(config, self.objective), keeps_surrogates=config.naive,
                timestep_draws=config.timestep_draws,
            )  # fmt: skip

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
        try:
            # Dropout is seeded step by step; the caller's own generator stays where it was.
            with (self._adapted() as adapter, torch.random.fork_rng(), finishing(),
                  recomputing(module, config.gradient_checkpointing),
                  in_float32({} if self.layers else self.parameters) as types):  # fmt: skip
                self._train(choice.folder, adapter, types)
            finished = True
            return self.history
        except RuntimeError as error:
            if accelerator.num_processes > 1 and is_lost_peer(error):
                raise Interrupted("another process of this run is gone") from error
            raise
        finally:
            accelerator.unwrap_model(module, keep_fp32_wrapper=False)
            module.train(training and not finished)

    @contextlib.contextmanager
    def _adapted(self) -> Iterator[LowRankAdapter | None]:
        """The adapter that is trained, on the module meanwhile, which is then what it was; None without one."""
        config, module = self.config, self.objective.module
        if self.layers is None:
            yield None
            return
        adapter = LowRankAdapter(module, self.layers.sizes, config.lora_rank, seed_of("adapter", config.seed, 0))
        try:
            yield adapter
            self._matrices = adapter.state()
        finally:
            adapter.remove()

    def _train(self, checkpoint: Path | None, adapter: LowRankAdapter | None, types: Mapping[str, torch.dtype]) -> None:
        module = self.objective.module
        self._trained = self.parameters if adapter is None else adapter.parameters
        with only_trainable(module, self._trained):
            self._run(checkpoint, adapter, types)

    def _run(self, checkpoint: Path | None, adapter: LowRankAdapter | None, types: Mapping[str, torch.dtype]) -> None:
        module = self.objective.module
        module.train()
        validation = Validation(self.objective, self.config, self.accelerator, self.validation_dir, self.blur)
        loop = Loop(
            self.objective, self.config, self.accelerator, self._trained,
            self._optimizer(), self.batches(),
            self.fisher, self.progress, validation, step_functions(self.callbacks), self.output_dir, self.identity,
            self.controller, self._neighbours, adapter, types,
        )  # fmt: skip
        with counted(self.objective.module, self.progress.passes):
            loop.run(checkpoint, self.checkpoint_bytes())
        self.made = {"training": self.progress.all_passes()}
        self.ending = loop.ending
        if self.progress.skipped >= (loop.stopped or self.config.max_train_steps):
            raise FloatingPointError(
                f"the gradient was not finite in any of {self.progress.skipped} steps, and nothing was trained: lower "
                "the learning rate or the EWC weight, or train without mixed precision"
            )
        if loop.stopped_by_caller and self.identity is not None:
            # Other weights than those of the whole training: a run with the same settings must not take them for it.
            facts = {**self.identity.facts, "stopped_after_step": loop.stopped}
            self.identity = Identity(self.identity.kind, facts)

    def checkpoint_bytes(self) -> int:
        """About how much one checkpoint takes on disk: parameters, Adam's two moments, and the average."""
        copies = (1.5 if self.config.use_8bit_adam else 3) + self.config.use_ema
        numbers = sum(parameter.numel() for parameter in self.parameters.values())
        if self.layers is not None:
            numbers = self.layers.numbers(self.config.lora_rank)
        return int(copies * 4 * numbers)

    def save(self, folder: str | Path) -> None:
        """Write the erased pipeline, or the adapter alone, its settings, the training history, how the training ended,
        and what the Fisher information came from.

        What belongs to earlier weights in the folder (report, pictures, card, evaluations) goes in the same step. Files
        of the user's own stay.

        Raises:
            ValueError: There is no adapter yet.
            OSError: The disk is full, say; what was there before is unchanged.
        """
        folder = Path(folder)
        if self.layers is not None and not self._has_trained:
            raise ValueError("there is no adapter yet: call train first")
        if not self.accelerator.is_main_process:
            wait_until(lambda: _holds(folder, self.identity) if self.identity else (folder / CONFIG_NAME).is_file())
            return
        leaving = [BASE_DEFAULTS_NAME, ENDING_NAME, *REPORT_FILES, FISHER_CONFIG_NAME, MERGED_NAME, REPORTED,
                   *model_files(folder), *evaluation_files(folder)]  # fmt: skip
        if is_own_card(folder):
            leaving.append(CARD_NAME)
        apart = self.validation_dir is not None and self.validation_dir.parent != folder
        if apart:
            leaving.append(VALIDATION_NAME)
        with replacing_folder(folder, leaving) as staging:
            if self._matrices is not None:
                save_adapter(self.objective, self._matrices, self.config.lora_rank, staging, self._told())
                if self.config.lora_format == "kohya":
                    export_kohya(self.objective, staging, staging)
            elif self.config.save_components == "trained":
                self._save_trained(staging)
                drop_local_names(staging)
            else:
                self.objective.save(staging)
                drop_local_names(staging)
            write_json(staging / HISTORY_NAME, self.history)
            if self.ending is not None:
                write_json(staging / ENDING_NAME, asdict(self.ending))
            if self.fisher is not None:
                write_json(staging / FISHER_CONFIG_NAME, self.fisher.config)
            self.config.save(staging / CONFIG_NAME)
            defaults = inherited_defaults(self.config.pretrained_model_name_or_path, folder)
            if defaults:
                write_json(staging / BASE_DEFAULTS_NAME, defaults)
            if apart and self.validation_dir.is_dir():
                shutil.copytree(self.validation_dir, staging / VALIDATION_NAME)
            if self.identity is not None:
                write_finished(staging, self.identity, self.made)
        if apart:
            shutil.rmtree(self.validation_dir, ignore_errors=True)

    def _save_trained(self, folder: Path) -> None:
        objective, config = self.objective, self.config
        check_apart(config.pretrained_model_name_or_path, False, objective)
        base = place_of_base(
            config.pretrained_model_name_or_path, objective.pipeline.components, config.revision, config.variant,
            config.cache_dir,
        )  # fmt: skip
        objective.save_trained(folder, {**base, "no_t5": config.no_t5})

    def _told(self) -> dict[str, Any]:
        """What the header of an adapter's file says of it."""
        config, pipeline = self.config, self.objective.pipeline
        base = config.pretrained_model_name_or_path
        variant = told_variant(base, pipeline.components, config.revision, config.variant, config.cache_dir)
        return adapter_header(
            config.concept, config.surrogate, base, config.revision, type(pipeline).__name__, variant, self.fused
        )

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


def _holds(folder: Path, identity: Identity) -> bool:
    return OutputFolder(folder).names_finished(identity)
