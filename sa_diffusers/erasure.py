"""One erasure from configuration to report: which stages there are, what they reuse, in which order they run."""

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from .configuration import CONFIG_NAME, SelectiveAmnesiaConfig
from .data.generation import CONCEPT_SEEDS, REPLAY_SEEDS, SampleGenerator, surrogate_requests
from .data.pictures import read_picture
from .data.prompts import (
    check_pairs,
    class_name,
    class_replay_prompts,
    fill_template,
    image_files,
    pair_classes,
    pair_concepts,
    replay_prompts,
)
from .data.sample_set import MANIFEST_NAME, SampleSet, fingerprint
from .evaluation import Classification, Comparison, ImageClassifier, compare, draw_groups, label_groups, prompt_groups
from .files import read_json
from .fisher import FisherEstimator, FisherInformation, fisher_identity
from .fisher.information import FISHER_CONFIG_NAME
from .objectives import Objective, load_pipeline, objective_for
from .objectives.base import fingerprint_module
from .objectives.loading import resolved_revision
from .parameter_selection import select_parameters
from .trainer import SelectiveAmnesiaTrainer, checkpoints, create_accelerator, sampling_settings

# Settings that say what an output folder holds: a run that changes one of them needs another folder.
_IDENTITY = ("concept", "surrogate", "pretrained_model_name_or_path", "revision", "train_method")
_CONCEPT_SHARE = 10
REMEMBERED_PROMPTS = 6


class Erasure:
    """The stages of one erasure; each is kept on disk under `artifacts_dir` and reused when nothing it depends on
    changed.

    Args:
        config: All settings.
        build_objective: What makes the objective of a loaded pipeline, for a kind of model of your own; it takes the
            arguments of `objective_for`, the default.

    Raises:
        ValueError: The settings contradict each other, the model cannot be had or is of an unknown kind, the output
            folder holds something else.
        ConnectionError: The Hub cannot be reached and the model is not in its cache.
    """

    def __init__(
        self,
        config: SelectiveAmnesiaConfig,
        build_objective: Callable[..., Objective] | None = None,
    ) -> None:
        self.config = config
        self._builder = build_objective or objective_for
        if config.surrogate:
            # Before the model is loaded: a mistake here should cost no time.
            check_pairs(config.concept, config.surrogate)
        self.output_dir = config.resolved_output_dir
        check_output_dir(config)
        self.accelerator: Accelerator = create_accelerator(config, self.output_dir)
        pipeline = load_pipeline(
            config.pretrained_model_name_or_path, config.revision, config.variant, config.cache_dir
        )
        self.revision = resolved_revision(config.pretrained_model_name_or_path, config.revision, config.cache_dir)
        self.objective: Objective = self._build_objective(pipeline)
        self._name_prompts()
        self.objective.to(self.accelerator.device)
        if config.enable_xformers_memory_efficient_attention:
            enable_xformers(self.objective.module)
        if config.gradient_checkpointing and not getattr(
            self.objective.module, "_supports_gradient_checkpointing", False
        ):
            raise ValueError(f"gradient_checkpointing: {type(self.objective.module).__name__} has none: leave it out")
        self.parameters = select_parameters(self.objective.module, config.train_method)
        self.classifier: ImageClassifier | None = None
        if config.classifier:
            self.classifier = ImageClassifier(config.classifier, self.accelerator.device, config.reference_features)
            if self.objective.labels is not None:
                self.classifier.check_classes(self.objective.labels, [pair.concept for pair in self.pairs])
        self.generator = SampleGenerator(self.objective, config.resolved_artifacts_dir, self.accelerator)
        self.identity = fisher_identity(self.objective, fingerprint_module(self.objective.module), config.train_method)
        self.given_fisher: FisherInformation | None = None
        if config.fisher and config.ewc_weight > 0:
            self.given_fisher = FisherInformation.from_pretrained(config.fisher, cache_dir=config.cache_dir)
            self.given_fisher.check(self.identity, self.parameters)
        self.settings = sampling_settings(config)
        self.surrogate_settings = sampling_settings(config, config.surrogate_guidance_scale)
        self.replay_settings = sampling_settings(config, config.replay_guidance_scale)
        self.seconds: dict[str, float] = {}

    def _build_objective(self, pipeline: DiffusionPipeline) -> Objective:
        config = self.config
        return self._builder(pipeline, config.prediction_type, config.snr_gamma, config.noise_offset)

    def _name_prompts(self) -> None:
        """What is forgotten and what is remembered: phrases, or classes where the model knows classes."""
        config, labels = self.config, self.objective.labels
        if config.condition_dropout and not self.objective.unconditional:
            raise ValueError("condition_dropout has no meaning for a model without an empty prompt: leave it out")
        share = config.replay_unconditional_share if self.objective.unconditional else 0.0
        if labels is None:
            self.pairs = pair_concepts(config.concept, config.surrogate)
        else:
            self.pairs = pair_classes(config.concept, config.surrogate, labels)
            self._check_class_settings(labels)
        for pair in self.pairs:
            if pair.surrogate.kind == "images":
                for file in image_files(pair.surrogate.value)[: config.num_surrogate_images]:
                    read_picture(file, str(file))
        concepts = [pair.concept for pair in self.pairs]
        self.replay_prompts: list[str] = []
        if config.num_replay_images and labels is None:
            self.replay_prompts = replay_prompts(
                config.replay_prompts, config.num_replay_images, config.seed, concepts, share
            )
        elif config.num_replay_images:
            self.replay_prompts = class_replay_prompts(labels, config.num_replay_images, concepts, share)

    def _check_class_settings(self, labels: list[str]) -> None:
        config = self.config
        without_meaning = {
            name: any(template != "{}" for template in getattr(config, name))
            for name in ("concept_templates", "eval_templates")
        }
        default = SelectiveAmnesiaConfig.__dataclass_fields__["replay_prompts"].default
        without_meaning["replay_prompts"] = config.replay_prompts != default
        for name, given in without_meaning.items():
            if given:
                raise ValueError(f"{name} has no meaning for a model of classes: leave it out")
        if config.resolution not in (None, self.objective.resolution):
            raise ValueError(
                f"resolution={config.resolution}: this model draws {self.objective.resolution} pixels only"
            )
        for prompt in config.validation_prompts:
            if prompt:
                class_name(prompt, labels)

    # Samples

    def surrogates(self) -> SampleSet:
        """The surrogate set: q(x | c_f) of eq. 4; for eq. 3 the concept's own samples."""
        config = self.config
        if config.naive:
            _, prompts, _ = surrogate_requests(self.pairs, config.concept_templates, config.num_surrogate_images)
            own = self.generator.prompted("naive", prompts, prompts, self._first_seed(0), self.surrogate_settings)
            # It goes away from the noise under either target: a teacher draws no one away from what it knows.
            return replace(own, sources=[None] * len(own))
        return self.generator.surrogates(
            self.pairs, config.concept_templates, config.num_surrogate_images, config.seed, self.surrogate_settings
        )

    def replay(self) -> SampleSet | None:
        """The replay set: p(x | theta*, c_r) of eq. 4, without the concepts."""
        if not self.replay_prompts:
            return None
        return self.generator.prompted(
            "replay", self.replay_prompts, self.replay_prompts, self._first_seed(REPLAY_SEEDS), self.replay_settings
        )

    def _first_seed(self, stream: int) -> int:
        return stream + self.config.seed * 1000

    def _concept_prompts(self) -> list[str]:
        """The concept's part of the Fisher samples: one in ten, at least one for each concept."""
        count = max(len(self.pairs), round(self.config.num_fisher_samples / _CONCEPT_SHARE))
        _, conditions, _ = surrogate_requests(self.pairs, self.config.concept_templates, count)
        return conditions

    def fisher_samples(self) -> SampleSet:
        """Samples of all prompts, the concepts' included."""
        prompts = self._concept_prompts()
        concepts = self.generator.prompted(
            "concept", prompts, prompts, self._first_seed(CONCEPT_SEEDS), self.replay_settings
        )
        replay = self.replay()
        if replay is None:
            return concepts
        others = max(self.config.num_fisher_samples - len(concepts), 0)
        return concepts + replay.subset(list(range(min(others, len(replay)))))

    # Fisher information

    def _fisher_timesteps(self) -> int | None:
        """None for all: also where the model has no more of them than are asked for (a VAE has one)."""
        asked = self.config.fisher_timesteps
        return asked if asked and asked < self.objective.num_train_timesteps else None

    def fisher_folder(self) -> Path:
        config = self.config
        key = {
            **self.identity,
            "timesteps": self._fisher_timesteps(),
            "samples": config.num_fisher_samples,
            "seed": config.seed,
            "prompts": [self._concept_prompts(), self.replay_prompts],
            "sampling": self.replay_settings.to_dict(),
        }
        return config.resolved_artifacts_dir / f"fisher-{fingerprint(key)}"

    def fisher(self) -> FisherInformation | None:
        """The Fisher information: the given one, the kept one, or a new one."""
        config = self.config
        if config.ewc_weight == 0:
            return None
        if self.given_fisher is not None:
            return self.given_fisher
        folder = self.fisher_folder()
        if not (folder / FISHER_CONFIG_NAME).is_file():
            estimator = FisherEstimator(
                self.objective,
                self.parameters,
                self._fisher_timesteps(),
                config.fisher_batch_size,
                config.seed,
                self.accelerator,
            )
            identity = {
                "base_model": config.pretrained_model_name_or_path,
                "revision": self.revision,
                **self.identity,
            }
            information = estimator.estimate(self.fisher_samples(), identity)
            if self.accelerator.is_main_process:
                information.save_pretrained(folder)
            self.accelerator.wait_for_everyone()
        information = FisherInformation.from_pretrained(folder)
        information.check(self.identity, self.parameters)
        return information

    # The whole

    def plan(self) -> str:
        """What will be generated, computed and trained, and what is reused."""
        config = self.config
        settings, count = self.surrogate_settings, config.num_surrogate_images
        chosen, conditions, sources = surrogate_requests(self.pairs, config.concept_templates, count)
        first_seed = self._first_seed(0)
        drawn = [i for i, pair in enumerate(chosen) if pair.surrogate.kind == "prompt"]
        reused = self._kept("surrogate", [conditions[i] for i in drawn], [sources[i] for i in drawn],
                            [first_seed + i for i in drawn], settings) if drawn else ""  # fmt: skip
        lines = [
            f'forget    "{pair.concept}"'
            + (" (eq. 3)" if config.naive else f' -> "{pair.surrogate.value}" ({pair.surrogate.kind})')
            for pair in self.pairs
        ]
        lines.append(f"model     {config.pretrained_model_name_or_path}, {self.objective.kind}, "
                     f"{self.objective.prediction_type}, on {self.accelerator.device}")  # fmt: skip
        lines.append(f"sample    {count} surrogate images, {describe(settings)}{reused}")
        if self.replay_prompts:
            prompts = self.replay_prompts
            seeds = [self._first_seed(REPLAY_SEEDS) + i for i in range(len(prompts))]
            reused = self._kept("replay", prompts, prompts, seeds, self.replay_settings)
            source = "classes" if self.objective.labels else config.replay_prompts
            lines.append(f"          {len(prompts)} replay images of {len(set(prompts))} prompts "
                         f"({source}), {describe(self.replay_settings)}{reused}")  # fmt: skip
        if config.ewc_weight == 0:
            lines.append("fisher    none: ewc_weight is 0")
        elif self.given_fisher is not None:
            lines.append(f"fisher    reused: {config.fisher}")
        else:
            known = (self.fisher_folder() / FISHER_CONFIG_NAME).is_file()
            steps = self._fisher_timesteps() or self.objective.num_train_timesteps
            note = f"; reused: {self.fisher_folder()}" if known else ""
            lines.append(f"fisher    {config.num_fisher_samples} samples x {steps} timesteps{note}")
        trained = sum(parameter.numel() for parameter in self.parameters.values())
        total = sum(parameter.numel() for parameter in self.objective.module.parameters())
        batch = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        lines.append(
            f"train     {config.max_train_steps} steps of {batch} + {batch if self.replay_prompts else 0} images, "
            f"{config.train_method}: {trained:,} of {total:,} parameters, learning rate {config.learning_rate:g}, "
            f"EWC weight {config.ewc_weight:g}, replay weight {config.replay_weight:g}, target {config.target}"
        )
        scored = f"scored by {config.classifier}" if config.classifier else "no classifier: pixel change"
        lines.append(f"evaluate  {config.num_eval_images} images a row, before and after, {scored}")
        lines.append(f"output    {self.output_dir}")
        return "\n".join(lines)

    def _kept(self, name: str, conditions: list[str], sources: list[str], seeds: list[int], settings: Any) -> str:
        folder = self.generator.folder(name, conditions, sources, seeds, settings)
        return f"; reused: {folder}" if (folder / MANIFEST_NAME).is_file() else ""

    def run(self) -> Comparison:
        """Run every stage: samples, Fisher information, training, saving, evaluation.

        Returns:
            The comparison with the base model, already saved in the output folder.
        """
        config = self.config
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if differing_settings(config):
                # Another erasure's checkpoints would be taken up by resume_from_checkpoint=latest.
                for folder in checkpoints(self.output_dir):
                    shutil.rmtree(folder)
            config.save(self.output_dir / CONFIG_NAME)
        self.accelerator.wait_for_everyone()
        groups = self.evaluation_groups()
        surrogates = self._timed("surrogate samples", self.surrogates)
        # Without a replay loss the Fisher information alone asks for these samples, and draws them itself.
        replay = self._timed("replay samples", self.replay) if config.replay_weight > 0 else None
        if replay is not None and not config.naive:
            # What lies nearest to the change is the surrogate itself: its samples are at hand, under its own prompt.
            replay = replay + surrogates.under_their_sources()
        fisher = self._timed("fisher", self.fisher)
        before = self._timed("evaluation before", lambda: self._draw(self.objective, groups))
        own = self._surrogates_as_seen(surrogates) if self.classifier else None
        self._train(surrogates, replay, fisher)
        # The evaluation sees what a user will load, not what is in memory.
        self.objective = self.generator = None  # type: ignore[assignment]
        gc.collect()
        erased = self._build_objective(load_pipeline(str(self.output_dir))).to(self.accelerator.device)
        after = self._timed("evaluation after", lambda: self._draw(erased, groups))
        provenance = {**self._provenance(), "erased_module": fingerprint_module(erased.module)}
        comparison = compare(groups, before, after, self.settings, self.classifier, provenance, own)
        if self.accelerator.is_main_process:
            comparison.save(self.output_dir)
        return comparison

    def _surrogates_as_seen(self, surrogates: SampleSet) -> dict[int, dict[str, Classification]]:
        """What the classifier says of the surrogate samples themselves, by label: as far as forgetting can go.

        A decoder that shows the pixels' means can show no noise, only its mean: that is seen too.
        """
        assert self.classifier is not None
        seen: dict[int, dict[str, Classification]] = {}
        for pair in self.pairs:
            label = self.classifier.label_of(pair.concept)
            if label is None:
                continue
            prompts = {fill_template(template, pair.concept) for template in self.config.concept_templates}
            rows = [row for row, prompt in enumerate(surrogates.conditions) if prompt in prompts]
            samples = surrogates.samples[rows].to(self.objective.device)
            pictures = self.objective.decode(samples[: self.config.num_eval_images])
            seen[label] = {"samples": self.classifier(pictures)}
            if self.objective.shows_means and pair.surrogate.kind == "noise":
                mean = self.objective.decode(samples.mean(0, keepdim=True))
                seen[label]["mean"] = self.classifier(mean)
        return seen

    def _train(self, surrogates: SampleSet, replay: SampleSet | None, fisher: FisherInformation | None) -> None:
        config = self.config
        if self.accelerator.log_with:
            self.accelerator.init_trackers(config.tracker_project_name)
        trainer = SelectiveAmnesiaTrainer(
            self.objective, config, surrogates, replay, fisher, self.accelerator, self.output_dir
        )
        self._timed("training", trainer.train)
        self._timed("saving", lambda: trainer.save(self.output_dir))
        self.accelerator.end_training()

    def evaluation_groups(self) -> list:
        config = self.config
        templates = config.eval_templates or config.concept_templates
        if self.classifier is not None:
            return label_groups(
                self.classifier.labels, self.pairs, self.classifier.label_of, config.concept_templates, templates,
                config.num_eval_images, config.eval_seed,
            )  # fmt: skip
        remembered = [prompt for prompt in dict.fromkeys(self.replay_prompts) if prompt][:REMEMBERED_PROMPTS]
        return prompt_groups(self.pairs, remembered, templates, config.num_eval_images, config.eval_seed)

    def _draw(self, objective: Objective, groups: list) -> list:
        return draw_groups(
            objective, groups, self.settings, self.config.resolved_artifacts_dir, self.accelerator, self.classifier
        )

    def _timed(self, name: str, stage: Any) -> Any:
        started = time.perf_counter()
        result = stage()
        self.seconds[name] = round(time.perf_counter() - started, 2)
        return result

    def _provenance(self) -> dict[str, Any]:
        from .version import __version__

        return {
            "sa_diffusers_version": __version__,
            "base_model": self.config.pretrained_model_name_or_path,
            "base_revision": self.revision,
            "base_module": self.identity["trained_module"],
            "erased_model": str(self.output_dir),
            "pairs": [
                {"concept": pair.concept, "surrogate": pair.surrogate.value, "kind": pair.surrogate.kind}
                for pair in self.pairs
            ],  # fmt: skip
            "configuration": self.config.to_dict(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "seconds": self.seconds,
        }


def describe(settings: Any) -> str:
    return f"{settings.sampler}, {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}"


def enable_xformers(module: torch.nn.Module) -> None:
    """Switch attention to xformers.

    Raises:
        ValueError: xformers is not installed, or there is no CUDA device.
    """
    try:
        module.enable_xformers_memory_efficient_attention()
    except (ModuleNotFoundError, ValueError) as error:
        raise ValueError(
            f"enable_xformers_memory_efficient_attention needs xformers and a CUDA device ({error}): pip install "
            "xformers, or leave the flag out (PyTorch's own attention is about as fast)"
        ) from error


def differing_settings(config: SelectiveAmnesiaConfig) -> dict[str, Any]:
    """What the erasure in the output folder was made with, where it differs from the configuration."""
    path = config.resolved_output_dir / CONFIG_NAME
    if not path.is_file():
        return {}
    earlier = read_json(path)
    return {name: earlier.get(name) for name in _IDENTITY if earlier.get(name) != getattr(config, name)}


def check_output_dir(config: SelectiveAmnesiaConfig) -> None:
    """Refuse an output folder that holds something other than this erasure.

    Raises:
        ValueError: The folder is a file, holds foreign files, or another erasure and `overwrite_output_dir` is off.
    """
    folder = config.resolved_output_dir
    if folder.is_file():
        raise ValueError(f"output_dir={folder} is a file: choose a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"output_dir={folder} already holds something else (no {CONFIG_NAME} in it): choose an empty folder with "
            "--output_dir"
        )
    differing = differing_settings(config)
    if differing and not config.overwrite_output_dir:
        changes = ", ".join(f"{name}={old!r} (now {getattr(config, name)!r})" for name, old in differing.items())
        raise ValueError(
            f"output_dir={folder} holds another erasure: {changes}. Choose another folder with --output_dir, or "
            "replace it with --overwrite_output_dir"
        )
