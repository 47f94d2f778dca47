"""One erasure from configuration to report: its stages, in order."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from .configuration import HISTORY_NAME, SelectiveAmnesiaConfig
from .data.concepts import ErasurePair, check_pairs
from .data.given import Samples, are_prompts, given_prompts
from .data.replay import drop_naming_prompts
from .data.sample_set import SampleSet
from .data.sensitive import must_blur
from .environment import create_accelerator
from .evaluation import Comparison
from .families import SUPPORTED_PIPELINES, Objective, load_pipeline, objective_for
from .files import read_json
from .fisher import FisherInformation
from .hub import repository_name
from .identity import Identity
from .output_folder import OutputFolder
from .processes import say
from .stages import (
    DEPENDENCIES,
    IRRELEVANT,
    CardStage,
    EvaluationImages,
    FisherStage,
    PushStage,
    ReplayStage,
    ReportStage,
    Stage,
    Subject,
    SurrogateStage,
    TrainingStage,
    prepare,
)
from .stages.subject import check_artifacts_dir
from .training.callbacks import Callback
from .training.checkpoints import Choice

__all__ = ["DEPENDENCIES", "IRRELEVANT", "Erasure"]


class Erasure:
    """The stages of one erasure; each product is kept on disk under `artifacts_dir`, or in the output folder, and
    reused when nothing it depends on changed.

    Args:
        config: All settings. What the base model's own folder recommends holds where they were not written.
        build_objective: What makes the objective of a loaded pipeline, for a kind of model of your own; it takes the
            arguments of `objective_for`, the default.
        pipeline: The base model, where it is in memory already; it is trained, and then no longer the base model.
            Default: loaded by its name.
        surrogates: Samples of the surrogate, in place of those that would be made: a `SampleSet`, prompts to sample
            with, images (PIL, or a tensor `[n, channels, height, width]` in [0, 1]), or dictionaries of an `"image"`
            and its `"text"`, the concept's prompt to train it under.
        replay: What to remember, in the same forms; bare images belong to the empty prompt.
        fisher: Fisher information, or its folder or name on the Hub.
        callbacks: Their `after_step` is called with a `StepState` after every step, and may stop the training.

    Raises:
        ValueError: The settings contradict each other, the model cannot be had or is of an unknown kind, the output
            folder holds something else, or what is handed in does not fit the model.
        ConnectionError: The Hub cannot be reached and the model is not in its cache.
    """

    def __init__(
        self,
        config: SelectiveAmnesiaConfig,
        build_objective: Callable[..., Objective] | None = None,
        pipeline: DiffusionPipeline | None = None,
        *,
        surrogates: Samples | None = None,
        replay: Samples | None = None,
        fisher: FisherInformation | str | Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config = config.over_base_defaults()
        self._builder = build_objective or objective_for
        if config.surrogate:
            # Before the model is loaded: a mistake here should cost no time.
            check_pairs(config.concept, config.surrogate)
        if surrogates is not None and not (config.surrogate or config.naive):
            raise ValueError("surrogates are handed in: say in the setting surrogate what they are, for the report")
        remembered = _remembered(config, replay)
        self.output_dir = config.resolved_output_dir
        if config.push_to_hub:
            # A name that the Hub refuses should not come to light after hours.
            repository_name(self.output_dir, config.hub_model_id)
        self.output = OutputFolder(self.output_dir, config.overwrite_output_dir)
        check_artifacts_dir(config)
        self.accelerator: Accelerator = create_accelerator(config, self.output_dir)
        if self.accelerator.is_main_process:
            self.output.check(self._settings())
        blur = must_blur(config.blur, [*config.concept, *config.surrogate])
        known = None if build_objective else SUPPORTED_PIPELINES
        self.subject: Subject = prepare(config, self.accelerator, blur, self._builder, pipeline, known, remembered)
        self.labels = self.subject.labels
        self._surrogates = SurrogateStage(self.subject, surrogates)
        self._replay = ReplayStage(self.subject, replay)
        self._fisher = FisherStage(self.subject, self._replay, fisher)
        self._images = EvaluationImages(self.subject)
        self._images.check_seeds(self._surrogates, self._replay)
        self._training = TrainingStage(
            self.subject, self.output, self._surrogates, self._replay, self._fisher, callbacks
        )
        self._report = ReportStage(self.subject, self.output, self._images, self._training)
        self.card = CardStage(self.output, self._report)
        self.push = PushStage(config, self.output, self.card)
        if self.accelerator.is_main_process:
            self.output.check_identity(self.identity)
        if config.resume_from_checkpoint not in (None, "latest", "no"):
            # A checkpoint that will not do is told before anything is sampled.
            self.choice()
        self._anchor: dict[str, torch.Tensor] | None = None

    def _settings(self) -> dict[str, Any]:
        return TrainingStage.settings(self.config, self.accelerator)

    @property
    def stages(self) -> list[Stage]:
        """All stages, in order."""
        return [self._surrogates, self._replay, self._fisher, self._training, self._images, self._report, self.card,
                self.push]  # fmt: skip

    @property
    def objective(self) -> Objective:
        """The base model, and after `train` the erased one."""
        return self.subject.objective

    @property
    def pairs(self) -> list[ErasurePair]:
        """What is forgotten, and what it turns into."""
        return self.subject.pairs

    @property
    def replay_prompts(self) -> list[str]:
        """What is remembered, one prompt for each replay image."""
        return self.subject.replay_prompts

    @property
    def base(self) -> str:
        """Digest of the base model."""
        return self.subject.base

    @property
    def identity(self) -> Identity:
        """What the trained weights depend on."""
        return self._training.identity()

    def surrogate_identity(self) -> Identity:
        """What the surrogate set depends on."""
        return self._surrogates.identity()

    def replay_identity(self) -> Identity:
        """What the replay set depends on."""
        return self._replay.identity()

    def fisher_identity(self) -> Identity:
        """What the Fisher information depends on."""
        return self._fisher.identity()

    def evaluation_identity(self) -> Identity:
        """What the report depends on."""
        return self._report.identity()

    def fisher_folder(self) -> Path:
        """Where the Fisher information is kept."""
        return self._fisher.folder

    def surrogates(self) -> SampleSet:
        """The surrogate set: q(x | c_f) of eq. 4; for eq. 3 the concept's own samples."""
        with self._base_model():
            return self._surrogates.run()

    def replay(self) -> SampleSet | None:
        """The replay set: p(x | theta*, c_r) of eq. 4, without the concepts."""
        with self._base_model():
            return self._replay.run()

    def fisher_samples(self) -> SampleSet:
        """Samples of all prompts, the concepts' included."""
        with self._base_model():
            return self._fisher.samples()

    def fisher(self) -> FisherInformation | None:
        """The Fisher information: the given one, the kept one, or a new one."""
        with self._base_model():
            return self._fisher.run()

    def choice(self) -> Choice:
        """The checkpoint that the training goes on from."""
        return self._training.choice()

    def plan(self) -> str:
        """What will be generated, computed and trained, and what is reused."""
        config, objective = self.config, self.objective
        lines = [
            f'forget    "{pair.concept}"'
            + (" (eq. 3)" if config.naive else f' -> "{pair.surrogate.value}" ({pair.surrogate.kind})')
            for pair in self.pairs
        ]
        lines.append(f"model     {config.pretrained_model_name_or_path}, {objective.kind}, "
                     f"{objective.prediction_type}, on {self.accelerator.device}")  # fmt: skip
        return "\n".join([*lines, *(line for stage in self.stages for line in stage.plan())])

    def run(self) -> Comparison | None:
        """Run every stage: samples, Fisher information, training, saving, evaluation. What an earlier call of the same
        settings finished is kept; only what is missing is made.

        Returns:
            The comparison with the base model, saved in the output folder; None in all processes but the main one.

        Raises:
            ValueError: Another run is using the output folder.
            Interrupted: The run is to stop; the same call goes on.
        """
        self._check_base()
        with self._holding():
            finished = self._finished()
            if finished and self._is_main:
                self._report.keep_settings()
            report = self._report.kept() if finished and self._is_main else None
            if self.subject.agreed(report is not None):
                return Comparison(report) if report is not None else None
            if not finished:
                self._training.start_trackers()
            surrogates = self._timed(self._surrogates)
            products = None if finished else self._products()
            before = self._timed(self._images, "evaluation before", self.objective)
            if products is not None:
                self._training.run(surrogates, *products)
                del products
            # The evaluation sees what a user will load, not what is in memory.
            self.subject.release()
            gc.collect()
            return self._compared(before, surrogates)

    def train(self) -> list[dict[str, float]]:
        """Run the stages up to the erased pipeline in the output folder; the model in memory becomes it.

        Returns:
            The history, as of `Training.train`.

        Raises:
            ValueError: This erasure has run already, or another run is using the output folder.
            Interrupted: The run is to stop; the same call goes on.
        """
        self._check_base()
        if self._anchor is not None:
            raise ValueError("this erasure has trained already, and its model is no longer the base: make a new one")
        with self._holding():
            anchor = {name: value.detach().cpu().clone() for name, value in self.subject.parameters.items()}
            if self._finished():
                erased = self._erased()
                self.objective.module.load_state_dict(erased.module.state_dict())
                self._anchor = anchor
                return read_json(self.output_dir / HISTORY_NAME)  # type: ignore[return-value]
            self._training.start_trackers()
            surrogates = self._timed(self._surrogates)
            products = self._products()
            # Whatever happens from here on, the model is no longer the base.
            self._anchor = anchor
            return self._training.run(surrogates, *products).history

    def evaluate(self) -> Comparison | None:
        """Compare the erased pipeline in the output folder with the base model, and write the report there.

        Returns:
            As `run`.

        Raises:
            ValueError: There is no pipeline of this erasure in the folder.
        """
        self._check_base()
        with self._holding(begin=self._anchor is None):
            self.check_trained()
            report = self._report.kept() if self._is_main else None
            if self.subject.agreed(report is not None):
                return Comparison(report) if report is not None else None
            with self._base_model():
                surrogates = self._timed(self._surrogates)
                before = self._timed(self._images, "evaluation before", self.objective)
            device, objective = self.objective.device, self.objective
            objective.to("cpu")
            try:
                return self._compared(before, surrogates)
            finally:
                objective.to(device)

    def _products(self) -> tuple[SampleSet | None, FisherInformation | None]:
        """What is trained on beside the surrogates: replay set and Fisher information."""
        # Without a replay loss the Fisher information alone asks for these samples, and samples them itself.
        replay = self._timed(self._replay) if self.config.replay_weight > 0 else None
        return replay, self._timed(self._fisher, None, *([replay] if replay is not None else []))

    def _compared(self, before: list, surrogates: SampleSet) -> Comparison | None:
        erased = self._erased().to(self.accelerator.device)
        after = self._timed(self._images, "evaluation after", erased)
        # All have read the images before the main process deletes them.
        self.accelerator.wait_for_everyone()
        # The main process scores what all have sampled, and no other waits for it.
        return self._report.run(erased, before, after, surrogates) if self._is_main else None

    def _erased(self) -> Objective:
        config, pipeline = self.config, load_pipeline(str(self.output_dir))
        return self._builder(pipeline, config.prediction_type, config.snr_gamma, config.noise_offset)

    def _timed(self, stage: Stage, title: str | None = None, *inputs: Any) -> Any:
        with self.subject.timed(title or stage.title):
            return stage.run(*inputs)

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    @contextlib.contextmanager
    def _holding(self, begin: bool = True) -> Iterator[None]:
        """Nobody else writes into the output folder meanwhile."""
        with self.output.lock if self._is_main else contextlib.nullcontext():
            if begin and self._is_main:
                self.output.begin(self.identity, self._settings(), self._training.starts_over)
            self.accelerator.wait_for_everyone()
            yield

    def _finished(self, quietly: bool = False) -> bool:
        """Whether the weights of this very erasure are there, and are to be kept."""
        starts_over = self._training.starts_over and not quietly
        whole = self._is_main and not starts_over and self.output.is_finished(self.identity, say)
        finished = self.subject.agreed(whole)
        if finished and self._is_main and not quietly:
            say(f"{self.output_dir} holds this very erasure: nothing is trained (--resume_from_checkpoint no would)")
        return finished

    def check_trained(self) -> None:
        """Refuse to publish what is not there.

        Raises:
            ValueError: The output folder holds no pipeline of this erasure.
        """
        if not self._finished(quietly=True):
            raise ValueError(f"{self.output_dir} holds no pipeline of this erasure: call train first")

    def _check_base(self) -> None:
        if self.subject.objective is None:
            raise ValueError("this erasure has run, and its base model is gone from memory: make a new one")

    @contextlib.contextmanager
    def _base_model(self) -> Iterator[None]:
        """The model in memory is the base model meanwhile, also after it was trained."""
        self._check_base()
        if self._anchor is None:
            yield
            return
        trained = {name: value.detach().cpu().clone() for name, value in self.subject.parameters.items()}
        _put_in(self.subject.parameters, self._anchor)
        try:
            yield
        finally:
            _put_in(self.subject.parameters, trained)


@torch.no_grad()
def _put_in(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _remembered(config: SelectiveAmnesiaConfig, replay: Samples | None) -> list[str] | None:
    """Prompts of the replay samples that are handed in; the empty one for bare images."""
    if replay is None:
        return None
    prompts = given_prompts("replay", replay)
    if prompts is None:
        return [""] * len(replay)
    if config.drop_naming_prompts and are_prompts(replay):
        return drop_naming_prompts(prompts, config.concept, "replay")
    return prompts
