"""One erasure from configuration to report: its stages, in order."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from .configuration import SelectiveAmnesiaConfig
from .data.concepts import ErasurePair, check_pairs
from .data.given import Samples, are_prompts, given_prompts, taken
from .data.replay import drop_naming_prompts
from .data.sample_set import SampleSet
from .data.sensitive import must_blur
from .environment import create_accelerator
from .evaluation import Comparison
from .families import SUPPORTED_PIPELINES, Objective, family_of, kind_in, load_pipeline, objective_for
from .families.adapters import ADAPTER_FILE, KOHYA_FILE, export_kohya, has_adapter, load_adapter
from .families.digests import digested_once, fingerprint_module
from .families.distilled import Distilled, distilled_as_said, distilled_in_memory
from .fisher import FisherInformation
from .hub import repository_name
from .identity import Identity
from .output_folder import OutputFolder
from .passes import Passes, counted, over_processes, together
from .processes import say
from .results.schema import FUSED
from .stages import (
    DEPENDENCIES,
    IRRELEVANT,
    CardStage,
    EvaluationImages,
    FisherStage,
    ProbeStage,
    PushStage,
    ReplayStage,
    ReportStage,
    Stage,
    Subject,
    SurrogateStage,
    TrainingStage,
    prepare,
)
from .stages.subject import built, check_artifacts_dir
from .training.callbacks import Callback, step_functions

__all__ = ["DEPENDENCIES", "IRRELEVANT", "Erasure"]

# Of a training that is soon done, for the plan.
_FEW_STEPS = 150
# What timings call the frozen model's predictions that tell whether there is anything to measure.
_PROBES = "probes"


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
        callbacks: Functions, or objects with `after_step`, that are called with a `StepState` after every step, and may
            stop the training.

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
        if not isinstance(config, SelectiveAmnesiaConfig):
            raise ValueError(
                f"config: what is of type {type(config).__name__} is no configuration: give a SelectiveAmnesiaConfig"
            )
        # A copy: what is written into the given one afterwards changes nothing.
        usual, told = _usual(config, pipeline)
        self.config = config = config.over_base_defaults(usual)
        surrogates, replay = taken("surrogates", surrogates), taken("replay", replay)
        step_functions(callbacks)
        self._builder = build_objective or objective_for
        if config.surrogate:
            # Before the model is loaded: a mistake here should cost no time.
            check_pairs(config.concept, config.surrogate)
        if surrogates is not None and not (config.surrogate or config.naive):
            raise ValueError("surrogates are handed in: say in the setting surrogate what they are, for the report")
        remembered = _remembered(config, replay)
        self.output_dir = config.resolved_output_dir
        base = Path(config.pretrained_model_name_or_path)
        if base.is_dir() and self.output_dir.is_dir() and base.samefile(self.output_dir):
            raise ValueError(f"output_dir={self.output_dir} is the base model's own folder: choose another")
        if config.push_to_hub:
            # A name that the Hub refuses should not come to light after hours.
            repository_name(self.output_dir, config.hub_model_id)
        self.output = OutputFolder(self.output_dir, config.overwrite_output_dir)
        check_artifacts_dir(config)
        self.accelerator: Accelerator = create_accelerator(config, self.output_dir)
        self._settings_at_first = self._settings()
        if self.accelerator.is_main_process:
            self.output.check(self._settings_at_first)
        blur = must_blur(config.blur, [*config.concept, *config.surrogate])
        known = None if build_objective else SUPPORTED_PIPELINES
        self.subject: Subject = prepare(config, self.accelerator, blur, self._builder, pipeline, known, remembered)
        self.labels = self.subject.labels
        if surrogates is not None or replay is not None:
            # They are encoded right here.
            self.subject.objective.place(self.accelerator.device)
        self.surrogate_stage = SurrogateStage(self.subject, surrogates)
        self.replay_stage = ReplayStage(self.subject, replay)
        self.fisher_stage = FisherStage(self.subject, self.replay_stage, fisher)
        self.probe_stage = ProbeStage(self.subject, self.replay_stage)
        self.image_stage = EvaluationImages(self.subject)
        self.image_stage.check_seeds(self.surrogate_stage, self.replay_stage)
        self.training_stage = TrainingStage(
            self.subject, self.output, self.surrogate_stage, self.replay_stage, self.fisher_stage, self.probe_stage,
            callbacks,
        )  # fmt: skip
        self.report_stage = ReportStage(self.subject, self.output, self.image_stage, self.training_stage)
        self.card_stage = CardStage(self.output, self.report_stage)
        self.push_stage = PushStage(config, self.output, self.card_stage)
        self.subject.distilled = told and told.sentence
        self.subject.handed_in = _told_of(surrogates, replay, fisher, self.subject.fused)
        self._is_given = pipeline is not None
        if len(set(gather_object([self.identity.digest]))) > 1:
            raise ValueError("the processes of this run were given different settings, samples or Fisher information")
        if self.accelerator.is_main_process:
            self.output.check_identity(self.identity)
        if config.resume_from_checkpoint not in (None, "latest", "no"):
            # A checkpoint that will not do is told before anything is sampled.
            self.training_stage.choice()

    def _settings(self) -> dict[str, Any]:
        return TrainingStage.settings(self.config, self.accelerator)

    @property
    def stages(self) -> list[Stage]:
        """All stages, in the order of the plan."""
        return [self.surrogate_stage, self.replay_stage, self.probe_stage, self.fisher_stage, self.training_stage,
                self.image_stage, self.report_stage, self.card_stage, self.push_stage]  # fmt: skip

    @property
    def objective(self) -> Objective:
        """The base model."""
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
        return self.training_stage.identity()

    def surrogates(self) -> SampleSet:
        """The surrogate set: q(x | c_f) of eq. 4; for eq. 3 the concept's own samples."""
        self.check_base()
        return self.surrogate_stage.run()

    def replay(self) -> SampleSet | None:
        """The replay set: p(x | theta*, c_r) of eq. 4, without the concepts."""
        self.check_base()
        return self.replay_stage.run()

    def fisher_samples(self) -> SampleSet:
        """Samples of all prompts, the concepts' included."""
        self.check_base()
        return self.fisher_stage.samples()

    def fisher(self) -> FisherInformation | None:
        """The Fisher information: the given one, the kept one, or a new one."""
        self.check_base()
        return self.fisher_stage.run()

    def plan(self) -> str:
        """What will be generated, computed and trained, and what is reused."""
        if self.objective is None:
            self.check_base()
        config, objective = self.config, self.objective
        lines = [
            f'forget    "{pair.concept}"'
            + (" (eq. 3)" if config.naive else f' -> "{pair.surrogate.value}" ({pair.surrogate.kind})')
            for pair in self.pairs
        ]
        lines.append(f"model     {config.pretrained_model_name_or_path}, {objective.kind}, "
                     f"{objective.prediction_type}, on {self.accelerator.device}")  # fmt: skip
        if self.subject.distilled:
            lines.append(f"distilled {self.subject.distilled}")
        return "\n".join([*lines, *(line for stage in self.stages for line in stage.plan()), self._cost_plan()])

    def costs(self) -> dict[str, Passes]:
        """About what a run will take of the network, by what it is for; what is kept costs nothing."""
        if self.output.names_finished(self.identity) and not self.training_stage.starts_over:
            if self.output.holds_report(self.report_stage.identity(), lambda _: None):
                return {}
            return {"samples": self.surrogate_stage.cost(), "evaluation": self.image_stage.cost()}
        samples = self.surrogate_stage.cost()
        if self.config.replays:
            samples.add(self.replay_stage.cost())
        samples.add(self.probe_stage.cost())
        asked = self.probe_stage.asked() if self._refuses_early else Passes()
        return {"samples": samples, _PROBES: asked, "Fisher": self.fisher_stage.cost(),
                "training": self.training_stage.cost(), "evaluation": self.image_stage.cost()}  # fmt: skip

    @property
    def _refuses_early(self) -> bool:
        """Whether what cannot be measured is told before the replay samples and the Fisher information are made."""
        made = [*([self.replay_stage] if self.config.replays else []), self.fisher_stage]
        return self.config.probes and not self.config.naive and any(stage.cost().forward for stage in made)

    def _cost_plan(self) -> str:
        costs = {name: passes for name, passes in self.costs().items() if passes.forward}
        whole = together(costs.values()) or Passes()
        if not whole.forward:
            return "cost      no pass through the network: all is there"
        parts = ", ".join(
            f"{name} {passes.forward:,}" + (f" and {passes.backward:,}" if passes.backward else "")
            for name, passes in costs.items()
        )
        line = (f"cost      about {whole.forward:,} forward and {whole.backward:,} backward passes of the network, an "
                f"image each ({parts})")  # fmt: skip
        if "training" not in costs or not self.config.stops or self.training_stage.is_over:
            return line
        few = self.training_stage.choice().step + _FEW_STEPS
        if few >= self.config.max_train_steps:
            return line
        others = [passes for name, passes in costs.items() if name != "training"]
        less = together([*others, self.training_stage.cost(few)]) or Passes()
        return (f"{line}\n          at the most: where the training stops after step {few}, about {less.forward:,} and "
                f"{less.backward:,}")  # fmt: skip

    def run(self, parts: bool = False) -> Comparison | None:
        """Run every stage: samples, Fisher information, training, saving, evaluation. What an earlier call of the same
        settings finished is kept; only what is missing is made.

        Args:
            parts: Whether the processes let go of each other before the main one scores what all have sampled.

        Returns:
            The comparison with the base model, saved in the output folder; None in all processes but the main one.

        Raises:
            ValueError: Another run is using the output folder.
            Interrupted: The run is to stop; the same call goes on.
        """
        self.check_base()
        with self.holding():
            finished = self.finished()
            if finished and self.is_main:
                self.report_stage.keep_settings()
            report = self.report_stage.kept() if finished and self.is_main else None
            if self.subject.agreed(report is not None):
                if parts:
                    self._part()
                return Comparison(report) if report is not None else None
            if not finished:
                self.training_stage.start_trackers()
            surrogates = self.timed(self.surrogate_stage)
            products = None if finished else self.products(surrogates)
            before = self.timed(self.image_stage, "evaluation before", self.objective, self.base)
            if products is not None:
                self.training_stage.run(surrogates, *products)
                del products
            # The evaluation sees what a user will load, not what is in memory.
            if not self.config.adapter:
                self.subject.release()
                gc.collect()
            comparison = self.compared(before, surrogates, parts)
            if self.config.adapter:
                self.subject.release()
            return comparison

    def products(self, surrogates: SampleSet) -> tuple[Any, ...]:
        """What is trained with beside the surrogates: replay set, Fisher information, and probes with their check."""
        if self.subject.agreed(self._refuses_early):
            with self.subject.timed(self.probe_stage.title):
                self.probe_stage.sample()
            with self.subject.timed(_PROBES), counted(self.objective.module) as asked:
                self.probe_stage.refuse_what_cannot_be_measured(surrogates)
            self.subject.made[_PROBES] = over_processes(asked, self.accelerator)
        # Without a replay loss the Fisher information alone asks for these samples, and samples them itself.
        replay = self.timed(self.replay_stage) if self.config.replays else None
        fisher = self.timed(self.fisher_stage, None, *([replay] if replay is not None else []))
        return replay, fisher, self.timed(self.probe_stage, None, surrogates) if self.config.probes else None

    def compared(self, before: list, surrogates: SampleSet, parts: bool = False) -> Comparison | None:
        """The comparison of the saved pipeline with what the base model has sampled."""
        erased = self.erased().place(self.accelerator.device)
        with digested_once():
            digests = fingerprint_module(erased.module), erased.fingerprint()
        after = self.timed(self.image_stage, "evaluation after", erased, digests[1], model=erased)
        # All have read the images before the main process deletes them.
        self.accelerator.wait_for_everyone()
        self.subject.add_up()
        if parts:
            self._part()
        # The main process scores what all have sampled, and no other waits for it.
        return self.report_stage.run(erased, *digests, before, after, surrogates) if self.is_main else None

    def _part(self) -> None:
        """Leave the other processes, all at once: with NCCL this is a collective, in which none is to wait for scores
        or an upload."""
        self.accelerator.state.destroy_process_group()

    def erased(self) -> Objective:
        """The model that was saved, as a user loads it; an adapter is loaded into the base model at hand."""
        config = self.config
        if config.adapter:
            if not has_adapter(self.objective):
                load_adapter(self.objective, self.output_dir / ADAPTER_FILE)
            return self.objective
        pipeline = load_pipeline(str(self.output_dir), weights_dtype=config.weights_dtype)
        return built(config, self._builder, pipeline)

    def timed(self, stage: Stage, title: str | None = None, *inputs: Any, model: Objective | None = None) -> Any:
        """A stage's product.

        Args:
            stage: The stage.
            title: What timings call it. Default: its own title.
            *inputs: Products of earlier stages.
            model: Whose network it calls. Default: the base model.
        """
        title = title or stage.title
        with self.subject.timed(title, model):
            product = stage.run(*inputs)
        self.subject.made[title] = stage.made
        return product

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator.is_main_process

    @contextlib.contextmanager
    def holding(self, begin: bool = True, trains: bool = True) -> Iterator[None]:
        """Nobody else writes into the output folder meanwhile."""
        with self.output.lock if self.is_main else contextlib.nullcontext():
            if begin and self.is_main:
                # Who only looks at what is there removes no checkpoints of it.
                self.output.begin(self.identity, self._settings(), trains and self.training_stage.starts_over)
            self.accelerator.wait_for_everyone()
            yield

    def finished(self, quietly: bool = False) -> bool:
        """Whether the weights of this very erasure are there, and are to be kept."""
        starts_over = self.training_stage.starts_over and not quietly
        whole = self.is_main and not starts_over and self.output.is_finished(self.identity, say)
        finished = self.subject.agreed(whole)
        if finished and self.is_main and not quietly:
            say(f"{self.output_dir} holds this very erasure: nothing is trained (--resume_from_checkpoint no would)")
            if self.config.lora_format == "kohya" and not self.output.holds(KOHYA_FILE):
                with self.output.adding(KOHYA_FILE) as staging:
                    export_kohya(self.objective, self.output_dir, staging)
        return finished

    def check_base(self) -> None:
        """Refuse to go on where the base model is gone, or settings and weights are others than at first."""
        if self.subject.objective is None:
            raise ValueError("this erasure has run, and its base model is gone from memory: make a new one")
        if self._settings() != self._settings_at_first:
            raise ValueError("the settings were changed after they were read: make a new one with the new settings")
        self.objective.place(self.accelerator.device)
        # What was loaded here nobody else has.
        if self._is_given and self.objective.fingerprint() != self.base:
            raise ValueError(
                "the pipeline was changed after it was handed in (trained, moved to another precision): load it anew, "
                "and make a new one"
            )


def _usual(
    config: SelectiveAmnesiaConfig, pipeline: DiffusionPipeline | None
) -> tuple[Mapping[str, Any], Distilled | None]:
    """How models of the base's kind are sampled where nobody says otherwise, and whether it is distilled."""
    if pipeline is not None:
        family, told = family_of(type(pipeline).__name__), distilled_in_memory(pipeline)
    else:
        family, told = kind_in(
            config.pretrained_model_name_or_path, config.revision, config.cache_dir, config.single_file_config
        )
    if config.train_distilled and told is None:
        told = distilled_as_said(family)
    if family is None:
        return {}, told
    adapted = {"train_method": family.adapted} if config.adapter and family.adapted else {}
    return {**family.defaults, **(told.defaults if told else {}), **adapted}, told


def _told_of(surrogates: Any, replay: Any, fisher: Any, fused: Sequence[str]) -> dict[str, str]:
    """What was handed in, in words, for the report."""
    told = {FUSED: ", ".join(fused)} if fused else {}
    for name, given in (("surrogates", surrogates), ("replay", replay)):
        if given is not None:
            kind = "prompts to sample with" if are_prompts(given) else "samples"
            told[name] = f"{len(given)} {kind}"
    if fisher is not None:
        told["Fisher information"] = repr(fisher) if isinstance(fisher, FisherInformation) else Path(fisher).name
    return told


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
