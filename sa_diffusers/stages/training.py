"""Training, and the output folder's part in it."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..configuration import SelectiveAmnesiaConfig
from ..data.sample_set import SampleSet
from ..environment import precision_in_use, tracked
from ..hub import one_line
from ..identity import Identity
from ..output_folder import OutputFolder
from ..passes import Passes
from ..processes import finishing, say
from ..training.callbacks import Callback, step_functions
from ..training.checkpoints import Choice, choose_checkpoint
from ..training.loop import EXCURSION, ending_of
from ..training.memory import memory_plan
from ..training.progress import tracker_errors
from ..training.settings import (
    ADAPTER_SETTINGS,
    TRAINING_SETTINGS,
    global_batch,
    part_of_a_run,
    sampling_settings,
    settings_facts,
    training_identity,
)
from ..training.training import Training
from .base import Stage
from .fisher import FisherStage
from .probes import ProbeStage
from .samples import ReplayStage, SurrogateStage
from .subject import Subject

_BYTES_PER_SECOND = 300e6


def weights_text(config: SelectiveAmnesiaConfig) -> str:
    """Learning rate and weights, in words."""
    rate = "found by Prodigy" if config.learning_rate is None else f"{config.learning_rate:g}"
    ewc = f"EWC {config.ewc:g}" if config.ewc_weight is None else f"EWC weight {config.ewc_weight:g}"
    replay = "balanced" if config.replay_weight is None else f"{config.replay_weight:g}"
    return f"learning rate {rate}, {ewc}, replay weight {replay}"


class TrainingStage(Stage):
    """The erased pipeline in the output folder.

    Args:
        subject: The model and what it is to forget.
        output: Where it goes.
        surrogates: What makes the surrogate set.
        replay: What makes the replay set.
        fisher: What makes the Fisher information.
        probes: What makes the probes.
        callbacks: Called after every step.
    """

    title = "training"
    depends_on = SurrogateStage.depends_on | FisherStage.depends_on | ProbeStage.depends_on | {
        "fisher", *TRAINING_SETTINGS, "train_batch_size", "gradient_accumulation_steps", "learning_rate", "scale_lr",
        "classifier", *ADAPTER_SETTINGS,
    }  # fmt: skip

    def __init__(
        self,
        subject: Subject,
        output: OutputFolder,
        surrogates: SurrogateStage,
        replay: ReplayStage,
        fisher: FisherStage,
        probes: ProbeStage,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.subject = subject
        self.output = output
        self.callbacks = callbacks
        # A mistake in them should cost no samples.
        step_functions(callbacks)
        self._replay = replay
        self._probes = probes
        self._surrogates = surrogates
        self._choice: Choice | None = None
        config = subject.config
        digests = {
            "base": subject.base,
            "surrogates": surrogates.identity().digest,
            "replay": replay.identity().digest if replay.prompts and config.replays else None,
            "fisher": fisher.digest(),
            "probes": probes.identity().digest if probes.is_needed else None,
        }
        if config.classifier and config.stops:
            # It looks at images before the training stops. So does a CLIP that is at hand; but whoever scores finished
            # weights with another later is not told that they are of another erasure.
            digests["classifier"] = subject.scorer
        self._identity = self._planned = training_identity(config, subject.accelerator, digests)

    def identity(self) -> Identity:
        """What the trained weights depend on; another where a callback has stopped the training."""
        return self._identity

    @property
    def stopped_after_step(self) -> int | None:
        """The step after which a callback ended the training, if one did."""
        return self._identity.facts.get("stopped_after_step")

    def take_up_what_was_stopped(self) -> None:
        """Go by the weights in the folder where a callback ended the training that made them."""
        self._identity = self.output.stopped(self._identity) or self._identity

    def plan_the_whole(self) -> None:
        """Go by the whole training again."""
        self._identity = self._planned

    @classmethod
    def settings(cls, config: SelectiveAmnesiaConfig, accelerator: Accelerator) -> dict[str, Any]:
        """The settings that the trained weights depend on, known before the model is loaded."""
        # The precision is that in use, and the batch that of all processes together.
        left_out = {"mixed_precision", "allow_tf32", "train_batch_size", "gradient_accumulation_steps", "scale_lr",
                    "classifier", "base_quantization", *ADAPTER_SETTINGS}  # fmt: skip
        own = {name: getattr(config, name) for name in sorted(cls.depends_on - left_out)}
        base = Path(config.pretrained_model_name_or_path)
        if base.exists():
            # Folders move; whether the weights are the same, their digest says.
            own["pretrained_model_name_or_path"] = base.resolve().name
        return {**own, **settings_facts(config, accelerator.num_processes), "precision": precision_in_use(accelerator)}

    @property
    def starts_over(self) -> bool:
        return self.subject.config.resume_from_checkpoint == "no"

    def choice(self) -> Choice:
        """The checkpoint that the training goes on from."""
        if self._choice is None:
            config = self.subject.config
            wanted = config.resume_from_checkpoint
            if wanted in (None, "latest") and not self.output.is_of(self._identity):
                # What lies there belongs to an erasure that this one replaces.
                return Choice(None)
            self._choice = choose_checkpoint(self.output.path, wanted, self._identity, config.to_dict())
        return self._choice

    @property
    def is_over(self) -> bool:
        """Whether the training ended before, and was stopped before its weights were written."""
        choice, limit = self.choice(), self.subject.config.max_train_steps
        return choice.step >= limit or ending_of(choice.control, choice.step, limit) is not None

    def plan(self) -> list[str]:
        subject, config = self.subject, self.subject.config
        total = sum(parameter.numel() for parameter in subject.objective.module.parameters())
        batch = config.train_batch_size * config.gradient_accumulation_steps * subject.accelerator.num_processes
        steps = f"{'at most ' if config.stops else ''}{config.max_train_steps}"
        lines = [
            f"train     {steps} steps of {batch} + {batch if self._replay.prompts else 0} images, "
            f"{self._what_is_trained(total)}, {weights_text(config)}, target {config.target}",
            *self._frozen_plan(),
            *self._stop_plan(),
        ]
        if self.output.names_finished(self._identity) and not self.starts_over:
            return [*lines, "          these weights are there already: only what is missing is made"]
        return [*lines, *self._memory_plan(), *self._checkpoint_plan()]

    def _memory_plan(self) -> list[str]:
        """What the training takes of the device, told before anything of the model is there."""
        subject, accelerator = self.subject, self.subject.accelerator
        return memory_plan(
            subject.objective, subject.config, subject.pairs[0].concept, str(accelerator.mixed_precision),
            accelerator.num_processes, accelerator.device,
        )  # fmt: skip

    def _what_is_trained(self, total: int) -> str:
        subject, config = self.subject, self.subject.config
        if subject.layers is None:
            return f"{config.train_method}: {subject.numbers:,} of {total:,} parameters"
        layers = len(subject.layers.sizes)
        return (f"an adapter of rank {config.lora_rank} on {layers} layers of {config.train_method}: "
                f"{subject.numbers:,} numbers beside {total:,} parameters")  # fmt: skip

    def _frozen_plan(self) -> list[str]:
        """Layers that are selected and take no adapter."""
        grouped = self.subject.layers.grouped if self.subject.layers else ()
        if not grouped:
            return []
        # Blocks alike have one name.
        names = ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in grouped))
        return [f"          frozen, as convolutions of several groups: {names} ({len(grouped)} in all)"]

    def _stop_plan(self) -> list[str]:
        config = self.subject.config
        if not config.stops:
            return []
        return ["          until images show no more of the concept, looked at once forgotten is "
                f"{config.forget_target:g}, and",
                f"          the rest has drifted by {config.drift_tolerance:g} at the most"]  # fmt: skip

    def cost(self, limit: int | None = None) -> Passes:
        """About what the training takes where it ends after so many steps.

        Args:
            limit: Default: all that it may take.
        """
        config, choice = self.subject.config, self.choice()
        last = config.max_train_steps if limit is None else limit
        steps = range(choice.step, choice.step if self.is_over else last)
        batch = global_batch(config, self.subject.accelerator.num_processes)
        replayed = batch if config.replays and self._replay.prompts else 0
        taken = len(steps) + (EXCURSION if self._probes.searches and not choice.step else 0)
        rows = taken * (batch + replayed)
        taught = taken * (batch * self._surrogates.taught + replayed) if config.target == "frozen" else 0
        passes = Passes(rows + round(taught), rows)
        passes.add(self._probes.taken(steps))
        if config.validation_prompts and steps:
            times = {step + 1 for step in steps if (step + 1) % config.validation_steps == 0} | {steps.stop}
            images = len(times) * len(config.validation_prompts) * config.num_validation_images
            passes.add(self.subject.sampling(images, sampling_settings(config)))
        return passes

    def _checkpoint_plan(self) -> list[str]:
        """What checkpoints cost, and where the training goes on."""
        config = self.subject.config
        size = 4 * self.subject.numbers * (3 + config.use_ema)
        kept = config.checkpoints_total_limit or "all"
        lines = [
            f"keep      {kept} checkpoints of {size / 1e6:,.0f} MB (about {size / _BYTES_PER_SECOND:.1f} s each), one "
            f"every {config.checkpointing_steps} steps, and every {part_of_a_run(config)} where that costs next to "
            "nothing"
        ]
        choice = self.choice()
        if choice.folder:
            goes_on = "had ended" if self.is_over else "goes on"
            lines.append(f"          {goes_on} after step {choice.step}: {choice.folder}")
        place = self.output.path
        free = shutil.disk_usage(next(path for path in (place, *place.absolute().parents) if path.is_dir())).free
        needed = size * ((config.checkpoints_total_limit or config.max_train_steps // config.checkpointing_steps) + 1)
        if needed > free:
            lines.append(
                f"warning: they may take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on that disk: lower "
                "--checkpoints_total_limit, or choose another --output_dir"
            )
        return lines

    def start_trackers(self) -> None:
        """Tell the trackers the settings; one that cannot be reached should cost no samples.

        Raises:
            ValueError: It cannot be reached.
        """
        accelerator, config = self.subject.accelerator, self.subject.config
        if not accelerator.log_with:
            return
        try:
            options = {}
            if config.report_to == "wandb":
                # Its files would lie in the current folder, or, where this one is not there, in a temporary one.
                Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)
                options = {"wandb": {"dir": str(accelerator.logging_dir)}}
            accelerator.init_trackers(config.tracker_project_name, tracked(config.to_dict()), options)
        except Exception as error:  # of whatever kind the tracker's network errors are
            raise ValueError(
                f'report_to="{config.report_to or "tensorboard"}" could not be started ({one_line(error)}): try again, '
                "or use another tracker, or none"
            ) from error

    def run(self, *inputs: Any) -> Training:
        """Train, and write the erased pipeline into the output folder.

        Args:
            *inputs: Surrogate set, replay set, Fisher information, probes with their check.
        """
        surrogates, replay, fisher, measured = inputs
        subject, accelerator = self.subject, self.subject.accelerator
        training = Training(
            subject.objective, subject.config, surrogates, self._replayed(surrogates, replay), fisher, accelerator,
            self.output.path, self._identity, subject.blur, self.callbacks, *(measured or ()),
        )  # fmt: skip
        training.fused = subject.fused
        training.validation_dir = self.output.validation_folder(self._identity, self.starts_over)
        try:
            with finishing():
                with subject.timed(self.title):
                    training.train(self.choice())
                self._tell(training)
                # What came before the checkpoint counts too.
                subject.passes[self.title] = training.progress.passes
                subject.made |= training.made
                stages = (self._surrogates, self._replay, FisherStage, self._probes, self)
                titles = [stage.title for stage in stages]
                training.made = {title: subject.made[title] for title in titles if title in subject.made}
                with subject.timed("saving"):
                    training.save(self.output.path)
                # All of it has moved in before any process loads it.
                accelerator.wait_for_everyone()
        finally:
            # The processes still have the evaluation before them: `end_training` would part them.
            for tracker in accelerator.trackers:
                with tracker_errors():
                    tracker.finish()
        assert training.identity is not None
        self._identity = training.identity
        return training

    def _tell(self, training: Training) -> None:
        """Say how the training ended."""
        if training.ending is not None and self.subject.is_main:
            say(f"the probes: {training.ending.sentence}")

    def _replayed(self, surrogates: SampleSet, replay: SampleSet | None) -> SampleSet | None:
        config = self.subject.config
        if not config.replays or replay is None:
            return None
        if not config.replay_surrogates or config.naive:
            return replay
        # What lies nearest to the change is the surrogate itself: its samples are at hand, under its prompt.
        return replay + surrogates.under_their_sources()
