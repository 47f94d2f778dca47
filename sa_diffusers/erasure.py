"""One erasure from configuration to report: which stages there are, what they reuse, in which order they run."""

import functools
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

from .cache import delete_evaluations
from .configuration import CONFIG_NAME, REPORT_NAME, SelectiveAmnesiaConfig
from .data.captions import builtin_vocabularies
from .data.classes import class_name, pair_classes
from .data.concepts import check_pairs, image_files, pair_concepts
from .data.generation import SampleGenerator, surrogate_requests
from .data.phrasings import check_phrasings, fill_template, warn_of_cut_prompts
from .data.pictures import read_picture
from .data.replay import class_replay_prompts, replay_prompts
from .data.sample_set import MANIFEST_NAME, SampleSet
from .data.sensitive import must_blur
from .environment import create_accelerator, precision_in_use, tracked
from .evaluation import (
    Classification,
    Comparison,
    ImageClassifier,
    compare,
    label_groups,
    prompt_groups,
    sample_groups,
    score_groups,
)
from .evaluation.clip import Clip, ZeroShotClassifier, local_clip
from .evaluation.concept_protocol import default_held_out, near_and_far
from .evaluation.groups import REMEMBERED_PROMPTS
from .families import SUPPORTED_PIPELINES, Objective, load_pipeline, objective_for
from .families.base import fingerprint_module
from .families.names import resolved_revision
from .files import DamagedArtefact, load_kept, read_json
from .fisher import FisherEstimator, FisherInformation, fisher_identity
from .fisher.information import FISHER_CONFIG_NAME, FORMAT_VERSION
from .hub import one_line
from .identity import Identity, fingerprint, plain
from .output_folder import OutputFolder
from .processes import finishing, say, wait_until
from .results.schema import DECODER, Report, Sampling
from .seeds import STREAMS, first_seed
from .training.checkpoints import Choice, choose_checkpoint
from .training.settings import TRAINING_SETTINGS, sampling_settings, settings_facts, training_identity
from .training.trainer import SelectiveAmnesiaTrainer

# What each artefact depends on: settings, which act through weights, prompts, seeds and the identities below. Each
# stands here or among those that no artefact depends on.
_MODEL = ("pretrained_model_name_or_path", "revision", "variant", "prediction_type", "mixed_precision", "allow_tf32")
_SAMPLING = ("concept", "seed", "sampler", "num_inference_steps", "guidance_scale", "resolution")
_SURROGATES = (*_MODEL, *_SAMPLING, "surrogate", "concept_templates", "num_surrogate_images", "naive",
               "surrogate_guidance_scale")  # fmt: skip
_REPLAY = (*_MODEL, *_SAMPLING, "num_replay_images", "replay_prompts", "drop_naming_prompts",
           "replay_unconditional_share", "replay_guidance_scale")  # fmt: skip
_FISHER = (*_REPLAY, "concept_templates", "num_fisher_samples", "fisher_timesteps", "fisher_concept_share",
           "train_method", "snr_gamma", "noise_offset")  # fmt: skip
_TRAINING = (*_SURROGATES, *_FISHER, "fisher", *TRAINING_SETTINGS, "train_batch_size", "gradient_accumulation_steps",
             "learning_rate", "scale_lr")  # fmt: skip
_REPORT = ("classifier", "reference_features", "clip", "num_eval_images", "eval_templates", "eval_seed", "blur")
DEPENDENCIES = {
    "surrogates": frozenset(_SURROGATES),
    "replay": frozenset(_REPLAY),
    "fisher": frozenset(_FISHER),
    "training": frozenset(_TRAINING),
    "report": frozenset((*_TRAINING, *_REPORT)),
}
# Places, rounding and speed, what is kept on the way, and what happens afterwards.
IRRELEVANT = frozenset((
    "cache_dir", "artifacts_dir", "output_dir", "overwrite_output_dir", "sample_batch_size", "fisher_batch_size",
    "gradient_checkpointing", "enable_xformers_memory_efficient_attention", "checkpointing_steps",
    "checkpointing_minutes", "checkpoints_total_limit", "resume_from_checkpoint", "validation_prompts",
    "validation_steps", "num_validation_images", "report_to", "logging_dir", "logging_steps", "tracker_project_name",
    "push_to_hub", "hub_model_id", "hub_private_repo", "require_forgotten",
))  # fmt: skip
_BYTES_PER_SECOND = 300e6


class Erasure:
    """The stages of one erasure; each is kept on disk under `artifacts_dir` and reused when nothing it depends on
    changed.

    Args:
        config: All settings.
        build_objective: What makes the objective of a loaded pipeline, for a kind of model of your own; it takes the
            arguments of `objective_for`, the default.
        pipeline: The base model, where it is in memory already; it is trained, and then no longer the base model.
            Default: loaded by its name.

    Raises:
        ValueError: The settings contradict each other, the model cannot be had or is of an unknown kind, the output
            folder holds something else.
        ConnectionError: The Hub cannot be reached and the model is not in its cache.
    """

    def __init__(
        self,
        config: SelectiveAmnesiaConfig,
        build_objective: Callable[..., Objective] | None = None,
        pipeline: DiffusionPipeline | None = None,
    ) -> None:
        self.config = config
        self._builder = build_objective or objective_for
        if config.surrogate:
            # Before the model is loaded: a mistake here should cost no time.
            check_pairs(config.concept, config.surrogate)
        self.blur = must_blur(config.blur, [*config.concept, *config.surrogate])
        self.output_dir = config.resolved_output_dir
        self.output = OutputFolder(self.output_dir, config.overwrite_output_dir)
        self._check_artifacts_dir()
        self.accelerator: Accelerator = create_accelerator(config, self.output_dir)
        if self.accelerator.is_main_process:
            self.output.check(self._settings())
        self.revision = None
        if pipeline is None:
            place = (config.pretrained_model_name_or_path, config.revision)
            known = None if build_objective else SUPPORTED_PIPELINES
            pipeline = load_pipeline(*place, config.variant, config.cache_dir, known)
            self.revision = resolved_revision(*place, config.cache_dir)
        self.objective: Objective = self._build_objective(pipeline)
        self.labels = self.objective.labels
        self._name_prompts()
        self.objective.to(self.accelerator.device)
        if config.enable_xformers_memory_efficient_attention:
            enable_xformers(self.objective.module)
        if config.gradient_checkpointing and not getattr(
            self.objective.module, "_supports_gradient_checkpointing", False
        ):
            raise ValueError(f"gradient_checkpointing: {type(self.objective.module).__name__} has none: leave it out")
        self.parameters = self.objective.select(config.train_method)
        self.classifier = self._scorer()
        self.base = self.objective.fingerprint()
        self.generator = SampleGenerator(
            self.objective, config.resolved_artifacts_dir, self.accelerator, self.base, self.blur
        )
        self.fisher_facts = fisher_identity(
            self.objective, fingerprint_module(self.objective.module), config.train_method, self.base
        )
        self.given_fisher: FisherInformation | None = None
        if config.fisher and config.ewc_weight > 0:
            self.given_fisher = FisherInformation.from_pretrained(config.fisher, cache_dir=config.cache_dir)
            self.given_fisher.check(self.fisher_facts, self.parameters)
        self.settings = sampling_settings(config)
        self.surrogate_settings = sampling_settings(config, config.surrogate_guidance_scale)
        self.replay_settings = sampling_settings(config, config.replay_guidance_scale)
        for settings in (self.settings, self.surrogate_settings, self.replay_settings):
            self.objective.check_sampling(settings, getattr(pipeline, "scheduler", None))
        self._check_seeds()
        self.identity = self._training_identity()
        if self.accelerator.is_main_process:
            self.output.check_identity(self.identity)
        self._choice: Choice | None = None
        if config.resume_from_checkpoint not in (None, "latest", "no"):
            # A checkpoint that will not do is told before anything is sampled.
            self.choice()
        self.seconds: dict[str, float] = {}

    def _scorer(self) -> ImageClassifier | ZeroShotClassifier | None:
        """What says whether images show the concept: the given classifier, else a CLIP that is at hand, or nothing."""
        config, device = self.config, self.accelerator.device
        concepts = [pair.concept for pair in self.pairs]
        if config.classifier:
            classifier = ImageClassifier(config.classifier, device, config.reference_features)
            if self.objective.labels is not None:
                classifier.check_classes(self.objective.labels, concepts)
            return classifier
        name = local_clip(config.clip) if self.objective.labels is None else None
        if name is None:
            return None
        clip = Clip(name, device)
        surrogates = [pair.surrogate.value for pair in self.pairs if pair.surrogate.kind == "prompt"]
        near, far = near_and_far(concepts, surrogates, clip.embed_texts)
        return ZeroShotClassifier(clip, [*concepts, *surrogates, *near, *far], near)

    @functools.cached_property
    def eval_templates(self) -> list[str]:
        """Phrasings of the evaluation: those that were asked for, else the built-in ones that no training saw and that
        the model reads to the end of the name."""
        config = self.config
        if config.eval_templates or self.labels is not None:
            return config.eval_templates or config.concept_templates
        values = [*config.concept, *(pair.surrogate.value for pair in self.pairs if pair.surrogate.kind == "prompt")]
        fitting = [
            template
            for template in default_held_out(config.concept_templates)
            if not any(self.objective.why_unseen(fill_template(template, value), value) for value in values)
        ]
        return fitting or config.concept_templates

    def _check_artifacts_dir(self) -> None:
        place = self.config.resolved_artifacts_dir
        for path in (place, *place.absolute().parents):
            if path.exists() and not path.is_dir():
                named = "artifacts_dir" if self.config.artifacts_dir else "the environment's SA_DIFFUSERS_CACHE"
                raise ValueError(f"{named}={place}: {path} is a file, where samples were to be kept: choose a folder")

    def _settings(self) -> dict[str, Any]:
        """The settings that the trained weights depend on."""
        config = self.config
        # The precision is that in use, and the batch that of all processes together.
        left_out = {"mixed_precision", "allow_tf32", "train_batch_size", "gradient_accumulation_steps", "scale_lr"}
        own = {name: getattr(config, name) for name in sorted(DEPENDENCIES["training"] - left_out)}
        base = Path(config.pretrained_model_name_or_path)
        if base.is_dir():
            # Folders move; whether the weights are the same, their digest says.
            own["pretrained_model_name_or_path"] = base.resolve().name
        precision = precision_in_use(self.accelerator)
        return {**own, **settings_facts(config, self.accelerator.num_processes), "precision": precision}

    def _training_identity(self) -> Identity:
        config = self.config
        digests = {
            "base": self.base,
            "surrogates": self.surrogate_identity().digest,
            "replay": self.replay_identity().digest if self.replay_prompts and config.replay_weight > 0 else None,
            "fisher": None,
        }
        if self.given_fisher is not None:
            digests["fisher"] = fingerprint(self.given_fisher.config)
        elif config.ewc_weight > 0:
            digests["fisher"] = self.fisher_identity().digest
        return training_identity(config, self.accelerator, digests)

    def _check_seeds(self) -> None:
        """Refuse an evaluation that shares its initial noise with what is trained on."""
        config = self.config
        groups = self.evaluation_groups()
        evaluation = range(config.eval_seed, config.eval_seed + sum(len(group.prompts) for group in groups))
        counts = {"surrogate": config.num_surrogate_images, "replay": len(self.replay_prompts),
                  "concept": config.num_fisher_samples}  # fmt: skip
        for stream, count in counts.items():
            first = first_seed(stream, config.seed)
            if count > STREAMS[stream].length:
                raise ValueError(f"{count} {stream} samples: there are seeds for {STREAMS[stream].length}")
            if first < evaluation.stop and evaluation.start < first + count:
                raise ValueError(
                    f"eval_seed={config.eval_seed}: the evaluation's {len(evaluation)} images would have the seeds of "
                    f"{stream} samples ({first} to {first + count - 1}): leave it at {STREAMS['evaluation'].first}"
                )

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
        self.replay_prompts = self._captions(config.num_replay_images, share)
        if labels is None:
            check_phrasings(self.objective, self.pairs, [*config.concept_templates, *self.eval_templates])
        if config.replay_prompts not in builtin_vocabularies():
            warn_of_cut_prompts(self.objective, self.replay_prompts, f"replay_prompts={config.replay_prompts}")
        warn_of_cut_prompts(self.objective, config.validation_prompts, "validation_prompts")

    def _captions(self, count: int, unconditional_share: float = 0.0) -> list[str]:
        """Prompts to remember."""
        config, labels = self.config, self.objective.labels
        concepts = [pair.concept for pair in self.pairs]
        if not count:
            return []
        if labels is None:
            return replay_prompts(
                config.replay_prompts, count, config.seed, concepts, unconditional_share, config.drop_naming_prompts
            )
        return class_replay_prompts(labels, count, concepts, unconditional_share)

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
            prompts = self._naive_prompts()
            own = self.generator.prompted(
                "naive", prompts, prompts, first_seed("surrogate", config.seed), self.surrogate_settings
            )
            # It goes away from the noise under either target: a teacher draws no one away from what it knows.
            return replace(own, sources=[None] * len(own))
        return self.generator.surrogates(
            self.pairs, config.concept_templates, config.num_surrogate_images, config.seed, self.surrogate_settings
        )

    def _naive_prompts(self) -> list[str]:
        config = self.config
        return surrogate_requests(self.pairs, config.concept_templates, config.num_surrogate_images)[1]

    def surrogate_identity(self) -> Identity:
        """What the surrogate set depends on."""
        config = self.config
        if config.naive:
            prompts = self._naive_prompts()
            first = first_seed("surrogate", config.seed)
            seeds = list(range(first, first + len(prompts)))
            return self.generator.identity("naive", prompts, prompts, seeds, self.surrogate_settings)
        return self.generator.surrogate_identity(
            self.pairs, config.concept_templates, config.num_surrogate_images, config.seed, self.surrogate_settings
        )

    def replay(self) -> SampleSet | None:
        """The replay set: p(x | theta*, c_r) of eq. 4, without the concepts."""
        return self._prompted("replay", self.replay_prompts, self._first_replay_seed) if self.replay_prompts else None

    def replay_identity(self) -> Identity:
        """What the replay set depends on."""
        return self._prompted_identity("replay", self.replay_prompts, self._first_replay_seed)

    @property
    def _first_replay_seed(self) -> int:
        return first_seed("replay", self.config.seed)

    def _prompted(self, name: str, prompts: list[str], first: int) -> SampleSet:
        return self.generator.prompted(name, prompts, prompts, first, self.replay_settings)

    def _prompted_identity(self, name: str, prompts: list[str], first: int) -> Identity:
        seeds = list(range(first, first + len(prompts)))
        return self.generator.identity(name, prompts, prompts, seeds, self.replay_settings)

    def _fisher_parts(self) -> tuple[list[str], int, list[str]]:
        """What the Fisher samples are: prompts of the concepts, how many of the replay set, and further prompts."""
        config, labels = self.config, self.objective.labels
        total, share = config.num_fisher_samples, config.fisher_concept_share
        if share is None:
            share = len(self.pairs) / len(labels) if labels else 0.0
        count = min(total, max(len(self.pairs), round(total * share))) if share else 0
        _, concepts, _ = surrogate_requests(self.pairs, config.concept_templates, count)
        from_replay = min(total - count, len(self.replay_prompts))
        others = self.replay_prompts or self._captions(total - count)
        further = [others[place % len(others)] for place in range(from_replay, total - count)]
        return concepts, from_replay, further

    def fisher_samples(self) -> SampleSet:
        """Samples of all prompts, the concepts' included."""
        concepts, from_replay, further = self._fisher_parts()
        first = first_seed("concept", self.config.seed)
        parts = [self._prompted("concept", concepts, first)] if concepts else []
        if from_replay:
            replay = self.replay()
            assert replay is not None
            parts.append(replay.subset(list(range(from_replay))))
        if further:
            parts.append(self._prompted("fisher-samples", further, first + len(concepts)))
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        return whole

    # Fisher information

    def _fisher_timesteps(self) -> int | None:
        """None for all: also where the model has no more of them than are asked for (a VAE has one)."""
        asked = self.config.fisher_timesteps
        return asked if asked and asked < self.objective.num_train_timesteps else None

    def fisher_identity(self) -> Identity:
        """What the Fisher information depends on."""
        config = self.config
        concepts, from_replay, further = self._fisher_parts()
        first = first_seed("concept", config.seed)
        facts = {
            **self.fisher_facts,
            "timesteps": self._fisher_timesteps(),
            "seed": config.seed,
            "precision": precision_in_use(self.accelerator),
            "concepts": self._prompted_identity("concept", concepts, first).digest,
            "replay": [self.replay_identity().digest, from_replay],
            "further": self._prompted_identity("fisher-samples", further, first + len(concepts)).digest,
            "format": FORMAT_VERSION,
        }
        return Identity("fisher", facts)

    def fisher_folder(self) -> Path:
        """Where the Fisher information is kept."""
        return self.fisher_identity().folder(self.config.resolved_artifacts_dir)

    def fisher(self) -> FisherInformation | None:
        """The Fisher information: the given one, the kept one, or a new one."""
        config = self.config
        if config.ewc_weight == 0:
            return None
        if self.given_fisher is not None:
            return self.given_fisher
        wanted = self.fisher_identity()
        folder = wanted.folder(config.resolved_artifacts_dir)

        def load(place: Path) -> FisherInformation:
            found = FisherInformation.from_pretrained(place)
            if found.config.get("identity") != wanted.digest:
                raise DamagedArtefact(f"{place} holds other Fisher information than its name says")
            return found

        information = load_kept(folder, load, self._is_main)
        if information is not None and self._is_main:
            # A run that died between its arrival and the removal of its parts.
            shutil.rmtree(self._partial(folder), ignore_errors=True)
        # The estimate takes all processes, or none.
        found = torch.tensor(float(information is not None), device=self.accelerator.device)
        if self.accelerator.reduce(found, reduction="sum") < self.accelerator.num_processes:
            information = self._estimated(folder, wanted)
        assert information is not None
        information.check(self.fisher_facts, self.parameters)
        return information

    def _estimated(self, folder: Path, identity: Identity) -> FisherInformation:
        config = self.config
        estimator = FisherEstimator(
            self.objective, self.parameters, self._fisher_timesteps(), config.fisher_batch_size, config.seed,
            self.accelerator,
        )  # fmt: skip
        recorded = {"base_model": config.pretrained_model_name_or_path, "revision": self.revision, **self.fisher_facts,
                    "identity": identity.digest}  # fmt: skip
        partial = self._partial(folder)
        information = estimator.estimate(self.fisher_samples(), recorded, partial)
        if self.accelerator.is_main_process:
            with finishing():
                information.save_pretrained(folder)
                shutil.rmtree(partial, ignore_errors=True)
        else:
            wait_until(folder.is_dir)
        return FisherInformation.from_pretrained(folder)

    @staticmethod
    def _partial(folder: Path) -> Path:
        return folder.with_name(f".part-{folder.name}")

    # The whole

    def plan(self) -> str:
        """What will be generated, computed and trained, and what is reused."""
        config = self.config
        settings, count = self.surrogate_settings, config.num_surrogate_images
        chosen, conditions, sources = surrogate_requests(self.pairs, config.concept_templates, count)
        first = first_seed("surrogate", config.seed)
        drawn = [i for i, pair in enumerate(chosen) if pair.surrogate.kind == "prompt"]
        reused = self._kept("surrogate", [conditions[i] for i in drawn], [sources[i] for i in drawn],
                            [first + i for i in drawn], settings) if drawn else ""  # fmt: skip
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
            seeds = [self._first_replay_seed + i for i in range(len(prompts))]
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
        if self.output.names_finished(self.identity) and not self._starts_over:
            lines.append("          these weights are there already: only what is missing is made")
        else:
            lines += self._checkpoint_plan()
        scored = f"scored by {self.classifier.name}" if self.classifier else "nothing knows the concept: pixel change"
        lines.append(f"evaluate  {config.num_eval_images} images a row, before and after, {scored}")
        lines.append(f"output    {self.output_dir}")
        return "\n".join(lines)

    def _kept(self, name: str, conditions: list[str], sources: list[str], seeds: list[int], settings: Any) -> str:
        folder = self.generator.folder(name, conditions, sources, seeds, settings)
        return f"; reused: {folder}" if (folder / MANIFEST_NAME).is_file() else ""

    def _checkpoint_plan(self) -> list[str]:
        """What checkpoints cost, and where the training goes on."""
        config = self.config
        size = sum(4 * parameter.numel() for parameter in self.parameters.values()) * (3 + config.use_ema)
        kept = config.checkpoints_total_limit or "all"
        lines = [
            f"keep      {kept} checkpoints of {size / 1e6:,.0f} MB (about {size / _BYTES_PER_SECOND:.1f} s each), one "
            f"every {config.checkpointing_steps} steps and every tenth of the training"
        ]
        choice = self.choice()
        if choice.folder:
            lines.append(f"          goes on after step {choice.step}: {choice.folder}")
        free = shutil.disk_usage(next(path for path in (self.output_dir, *self.output_dir.absolute().parents)
                                      if path.is_dir())).free  # fmt: skip
        needed = size * ((config.checkpoints_total_limit or config.max_train_steps // config.checkpointing_steps) + 1)
        if needed > free:
            lines.append(
                f"warning: they may take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on that disk: lower "
                "--checkpoints_total_limit, or choose another --output_dir"
            )
        return lines

    def choice(self) -> Choice:
        """The checkpoint that the training goes on from."""
        if self._choice is None:
            wanted = self.config.resume_from_checkpoint
            if wanted in (None, "latest") and not self.output.is_of(self.identity):
                # What lies there belongs to an erasure that this one replaces.
                return Choice(None)
            self._choice = choose_checkpoint(self.output_dir, wanted, self.identity, self.config.to_dict())
        return self._choice

    def run(self) -> Comparison | None:
        """Run every stage: samples, Fisher information, training, saving, evaluation. What an earlier call of the same
        settings finished is kept; only what is missing is made.

        Returns:
            The comparison with the base model, saved in the output folder; None in all processes but the main one.

        Raises:
            ValueError: Another run is using the output folder.
            Interrupted: The run is to stop; the same call goes on.
        """
        if self.generator is None:
            raise ValueError("this erasure has run, and its base model is gone from memory: make a new one")
        if not self._is_main:
            return self._run()
        with self.output.lock:
            self.output.begin(self.identity, self._settings(), self._starts_over)
            return self._run()

    def _run(self) -> Comparison | None:
        config = self.config
        self.accelerator.wait_for_everyone()
        finished = self._agreed(self._is_main and not self._starts_over and self.output.is_finished(self.identity, say))
        if finished and self._is_main:
            say(f"{self.output_dir} holds this very erasure: nothing is trained (--resume_from_checkpoint no would)")
            if not self._has_these_settings():
                self.output.save_settings(config)
        report = self._kept_report() if finished and self._is_main else None
        if self._agreed(report is not None):
            return Comparison(report) if report is not None else None
        groups = self.evaluation_groups()
        if not finished and self.accelerator.log_with:
            # A tracker that cannot be reached should cost no samples.
            self._start_tracker()
        surrogates = self._timed("surrogate samples", self.surrogates)
        if not finished:
            # Without a replay loss the Fisher information alone asks for these samples, and samples them itself.
            replay = self._timed("replay samples", self.replay) if config.replay_weight > 0 else None
            if replay is not None and config.replay_surrogates and not config.naive:
                # What lies nearest to the change is the surrogate itself: its samples are at hand, under its prompt.
                replay = replay + surrogates.under_their_sources()
            fisher = self._timed("fisher", self.fisher)
        before = self._timed("evaluation before", lambda: self._sampled(self.objective, groups))
        if not finished:
            self._train(surrogates, replay, fisher)
            del replay, fisher
        # The evaluation sees what a user will load, not what is in memory.
        self.objective = self.generator = self.parameters = self.given_fisher = None  # type: ignore[assignment]
        self.accelerator.free_memory()
        gc.collect()
        erased = self._build_objective(load_pipeline(str(self.output_dir))).to(self.accelerator.device)
        after = self._timed("evaluation after", lambda: self._sampled(erased, groups))
        # All have read the images before the main process deletes them.
        self.accelerator.wait_for_everyone()
        if not self._is_main:
            # The main process scores what all have sampled, and no other waits for it.
            return None
        pictures = self._timed("scoring", lambda: [score_groups(erased, groups, kept, self.classifier)
                                                   for kept in (before, after)])  # fmt: skip
        own = self._surrogates_as_seen(erased, surrogates) if self.classifier else None
        provenance = {**self._provenance(), "erased_module": fingerprint_module(erased.module)}
        # Nothing is denoised in a model that has one step.
        how = Sampling(DECODER, 1, 1.0) if erased.num_train_timesteps == 1 else self.settings
        comparison = compare(groups, *pictures, how, self.classifier, provenance, own)
        with finishing():
            delete_evaluations(config.resolved_artifacts_dir, erased.fingerprint())
            self.output.save_report(comparison.save, self.evaluation_identity())
        return comparison

    def _agreed(self, answer: bool) -> bool:
        """The main process's answer, in all of them: what it writes meanwhile must not part them."""
        said = torch.tensor(float(answer and self._is_main), device=self.accelerator.device)
        return bool(self.accelerator.reduce(said, reduction="sum") > 0)

    @property
    def _starts_over(self) -> bool:
        return self.config.resume_from_checkpoint == "no"

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def evaluation_identity(self) -> Identity:
        """What the report depends on."""
        facts = {name: getattr(self.config, name) for name in (*_REPORT, *_SAMPLING)}
        scorer = self.classifier and self.classifier.name
        return Identity("report", {**facts, "scorer": scorer, "training": self.identity.digest})

    def _has_these_settings(self) -> bool:
        try:
            recorded = read_json(self.output_dir / CONFIG_NAME)
        except (OSError, ValueError):
            return False
        return plain(self.config.to_dict()).items() <= recorded.items()

    def _kept_report(self) -> Report | None:
        whole = self.output.holds_report(self.evaluation_identity(), say)
        return Report.load(self.output_dir / REPORT_NAME) if whole else None

    def _surrogates_as_seen(self, objective: Objective, surrogates: SampleSet) -> dict[int, dict[str, Classification]]:
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
            samples = surrogates.samples[rows].to(objective.device)
            pictures = objective.decode(samples[: self.config.num_eval_images])
            seen[label] = {"samples": self.classifier(pictures)}
            if objective.shows_means and pair.surrogate.kind == "noise":
                mean = objective.decode(samples.mean(0, keepdim=True))
                seen[label]["mean"] = self.classifier(mean)
        return seen

    def _train(self, surrogates: SampleSet, replay: SampleSet | None, fisher: FisherInformation | None) -> None:
        config = self.config
        trainer = SelectiveAmnesiaTrainer(
            self.objective, config, surrogates, replay, fisher, self.accelerator, self.output_dir, self.identity,
            self.blur,
        )  # fmt: skip
        trainer.validation_dir = self.output.validation_folder(self.identity, self._starts_over)
        try:
            with finishing():
                self._timed("training", lambda: trainer.train(self.choice()))
                self._timed("saving", lambda: trainer.save(self.output_dir))
                # All of it has moved in before any process loads it.
                self.accelerator.wait_for_everyone()
        finally:
            # The processes still have the evaluation before them: `end_training` would part them.
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _start_tracker(self) -> None:
        config = self.config
        try:
            self.accelerator.init_trackers(config.tracker_project_name, tracked(config.to_dict()))
        except Exception as error:  # of whatever kind the tracker's network errors are
            raise ValueError(
                f'report_to="{config.report_to or "tensorboard"}" could not be started ({one_line(error)}): try again, '
                "or use another tracker, or none"
            ) from error

    def evaluation_groups(self) -> list:
        config = self.config
        prompts = [prompt for prompt in dict.fromkeys(self.replay_prompts) if prompt]
        where = (config.num_eval_images, config.eval_seed)
        if self.classifier is not None:
            return label_groups(self.classifier.labels, self.pairs, self.classifier.label_of, config.concept_templates,
                                self.eval_templates, *where, prompts, self.classifier.neighbours)  # fmt: skip
        remembered = prompts[:REMEMBERED_PROMPTS]
        return prompt_groups(self.pairs, remembered, self.eval_templates, *where, config.concept_templates)

    def _sampled(self, objective: Objective, groups: list) -> list[list[torch.Tensor]]:
        """Every group's samples, in the main process, sampled by all."""
        return sample_groups(objective, groups, self.settings, self.config.resolved_artifacts_dir, self.accelerator)

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
            "base_module": self.fisher_facts["trained_module"],
            "erased_model": str(self.output_dir),
            "pairs": [
                {"concept": pair.concept, "surrogate": pair.surrogate.value, "kind": pair.surrogate.kind}
                for pair in self.pairs
            ],  # fmt: skip
            "configuration": self.config.to_dict(),
            "identity": self.evaluation_identity().digest,
            "blur": self.blur,
            "mixed_precision": str(self.accelerator.mixed_precision),
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
