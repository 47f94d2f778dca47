"""What is to be forgotten, by which model: the parts that the stages of an erasure share."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnAddedKVProcessor,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)

from ..configuration import SelectiveAmnesiaConfig
from ..data.captions import builtin_vocabularies
from ..data.classes import class_name, pair_classes
from ..data.concepts import ErasurePair, image_files, pair_concepts
from ..data.generation import SampleGenerator
from ..data.phrasings import check_phrasings, fill_template, warn_of_cut_prompts
from ..data.pictures import read_picture
from ..data.replay import check_replay_prompts, class_replay_prompts, replay_prompts
from ..evaluation import ImageClassifier
from ..evaluation.groups import default_held_out
from ..evaluation.measures.clip import Clip, ZeroShotClassifier, local_clip
from ..evaluation.neighbours import near_and_far
from ..families import SUPPORTED_PIPELINES, Objective, SamplingSettings, load_pipeline
from ..families.adapters import AdapterLayers, hold_quantized
from ..families.digests import digested_once, fingerprint_module
from ..families.distilled import check_given
from ..families.fused import fuse_adapters, fused_adapters
from ..families.names import resolved_revision
from ..families.trained import check_apart
from ..messages import shown_error
from ..names import names_concept
from ..passes import Passes, counted
from ..training.settings import adapted_layers, sampling_settings

# What every sample depends on, and every figure: the model, and how it is sampled.
MODEL = ("pretrained_model_name_or_path", "revision", "variant", "prediction_type", "mixed_precision", "allow_tf32",
         "no_t5", "weights_dtype", "base_quantization")  # fmt: skip
SAMPLING = ("concept", "seed", "sampler", "num_inference_steps", "guidance_scale", "resolution")


@dataclass
class Subject:
    """A base model and what it is to forget, checked as far as can be before anything is sampled.

    Attributes:
        config: All settings.
        accelerator: Processes and precision.
        objective: The base model; its module is trained in place.
        pipeline: Its pipeline.
        revision: Commit of the base model on the Hub, if it is from there.
        labels: Names of the model's classes; None where it takes prompts.
        pairs: What is forgotten, and what it turns into.
        replay_prompts: What is remembered, one prompt for each replay image.
        eval_templates: Phrasings of the evaluation.
        classifier: What says whether images show the concept, if anything does.
        base: Digest of the whole base model.
        module: Digest of the module that is trained.
        parameters: Name and parameter: what is selected.
        generator: Samples from the base model.
        blur: Whether pictures are blurred.
        layers: Those of the selection that take an adapter, where one is trained in place of the weights.
        names: What the classifier knows, to be remembered beside the default prompts; see `replay_prompts`.
        fused: Adapters that are in the base model's weights, in words, as far as they are known.
        distilled: What it means that the base model is distilled to few steps, as a sentence; None if it is not.
        handed_in: What a caller gave in place of what would be made, in words.
        seconds: Title of a stage and how long it took.
        passes: Title of a stage and what it took of the network in this process.
        made: Title of a stage and what its product took of the network when it was made, in all processes.
    """

    config: SelectiveAmnesiaConfig
    accelerator: Accelerator
    objective: Objective
    pipeline: DiffusionPipeline
    revision: str | None
    labels: list[str] | None
    pairs: list[ErasurePair]
    replay_prompts: list[str]
    eval_templates: list[str]
    classifier: ImageClassifier | ZeroShotClassifier | None
    base: str
    module: str
    parameters: dict[str, torch.nn.Parameter]
    generator: SampleGenerator
    blur: bool
    layers: AdapterLayers | None = None
    names: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    distilled: str | None = None
    handed_in: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, Passes] = field(default_factory=dict)
    made: dict[str, Passes | None] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        if self.layers is not None:
            return self.layers.numbers(self.config.lora_rank)
        return sum(parameter.numel() for parameter in self.parameters.values())

    @cached_property
    def scorer(self) -> str | None:
        """Digest of the classifier; None if nothing says what images show."""
        return self.classifier and self.classifier.fingerprint()

    @property
    def settings(self) -> SamplingSettings:
        """How the evaluation's images are sampled."""
        return sampling_settings(self.config)

    @property
    def surrogate_settings(self) -> SamplingSettings:
        return sampling_settings(self.config, self.config.surrogate_guidance_scale)

    @property
    def replay_settings(self) -> SamplingSettings:
        return sampling_settings(self.config, self.config.replay_guidance_scale)

    @contextlib.contextmanager
    def timed(self, title: str, model: Objective | None = None) -> Iterator[None]:
        """Record seconds and passes through the network; what ran before under the same title counts too.

        Args:
            title: Of a stage.
            model: Whose network is counted. Default: the base model, if it is in memory.
        """
        model = model or self.objective
        started = time.perf_counter()
        with counted(model.module if model is not None else None) as passes:
            yield
        self.seconds[title] = round(self.seconds.get(title, 0.0) + time.perf_counter() - started, 2)
        self.passes.setdefault(title, Passes()).add(passes)

    def add_up(self) -> None:
        """Let the main process hold what all have counted, and the others nothing; all must call it."""
        every = gather_object([self.passes])
        self.passes = {}
        for part in every if self.is_main else ():
            for title, passes in part.items():
                self.passes.setdefault(title, Passes()).add(passes)

    def sampling(self, images: int, settings: SamplingSettings) -> Passes:
        """About what sampling so many images takes of the network."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        return Passes(images * self.objective.passes_of_sample(settings, scheduler))

    def agreed(self, answer: bool) -> bool:
        """The main process's answer, in all of them: what it writes meanwhile must not part them."""
        said = torch.tensor(float(answer and self.is_main), device=self.accelerator.device)
        return bool(self.accelerator.reduce(said, reduction="sum") > 0)

    def mentions(self, text: str, concept: str) -> bool:
        """Whether a prompt names a concept; where the model takes classes, whether it is that class.

        Raises:
            ValueError: The model takes classes, and this is none of them.
        """
        return names_concept(text, concept) if self.labels is None else class_name(text, self.labels) == concept

    def captions(self, count: int) -> list[str]:
        """Prompts to remember, none of them empty."""
        concepts = [pair.concept for pair in self.pairs]
        return _captions(self.config, self.labels, concepts, count, names=self.names)

    def release(self) -> None:
        """Let go of the base model, so that there is room for the erased one."""
        self.objective = self.pipeline = self.generator = self.parameters = None  # type: ignore[assignment]
        self.accelerator.free_memory()


def prepare(
    config: SelectiveAmnesiaConfig,
    accelerator: Accelerator,
    blur: bool,
    build_objective: Callable[..., Objective],
    pipeline: DiffusionPipeline | None = None,
    known: Any = SUPPORTED_PIPELINES,
    remembered: Sequence[str] | None = None,
) -> Subject:
    """Load a base model and name what it is to forget and to remember.

    Args:
        config: All settings.
        accelerator: Processes and precision.
        blur: Whether pictures are blurred.
        build_objective: With the arguments of `objective_for`.
        pipeline: The base model, where it is in memory already.
        known: Names of pipelines' classes that can be loaded; None for any.
        remembered: Prompts to remember, where they are given otherwise than by the settings.

    Raises:
        ValueError: The model cannot be had or is of an unknown kind, or the settings do not fit it.
        ConnectionError: The Hub cannot be reached and the model is not in its cache.
    """
    revision, given, alone = None, pipeline, config.save_components == "trained"
    if alone:
        check_apart(config.pretrained_model_name_or_path, given is not None)
    if pipeline is None:
        place = (config.pretrained_model_name_or_path, config.revision)
        pipeline = load_pipeline(
            *place, config.variant, config.cache_dir, known, config.no_t5, not config.train_distilled,
            config.single_file_config, config.weights_dtype, config.base_quantization,
        )  # fmt: skip
        revision = resolved_revision(*place, config.cache_dir)
    # Before anything is told by its digest: what is in the weights is the base model.
    fused = fuse_adapters(pipeline) if config.fuse_adapters else fused_adapters(pipeline)
    objective = built(config, build_objective, pipeline)
    hold_quantized(objective, config.base_quantization)
    if alone:
        check_apart(config.pretrained_model_name_or_path, given is not None, objective)
    if given is not None:
        check_given(given, config.no_t5, not config.train_distilled)
    pairs = _pairs(config, objective)
    classifier = _classifier(config, objective, pairs, accelerator.device)
    names = _named(config, objective, classifier)
    prompts = _remembered(config, objective, pairs, remembered, names)
    templates = _eval_templates(config, objective, pairs)
    if objective.labels is None:
        check_phrasings(objective, pairs, [*config.concept_templates, *templates])
    if remembered is not None:
        warn_of_cut_prompts(objective, prompts, "replay")
    elif config.replay_prompts not in builtin_vocabularies():
        warn_of_cut_prompts(objective, prompts, f"replay_prompts={config.replay_prompts}")
    warn_of_cut_prompts(objective, config.validation_prompts, "validation_prompts")
    if config.enable_xformers_memory_efficient_attention:
        enable_xformers(objective.module)
    if config.gradient_checkpointing and not getattr(objective.module, "_supports_gradient_checkpointing", False):
        raise ValueError(f"gradient_checkpointing: {type(objective.module).__name__} has none: leave it out")
    parameters = objective.select(config.train_method)
    layers = adapted_layers(config, objective)
    with digested_once():
        base, module = objective.fingerprint(), fingerprint_module(objective.module)
    generator = SampleGenerator(objective, config.resolved_artifacts_dir, accelerator, base, blur)
    subject = Subject(config, accelerator, objective, pipeline, revision, objective.labels, pairs, prompts, templates,
                      classifier, base, module, parameters, generator, blur, layers, names, fused)  # fmt: skip
    for settings in (subject.settings, subject.surrogate_settings, subject.replay_settings):
        objective.check_sampling(settings, getattr(pipeline, "scheduler", None))
    return subject


def built(
    config: SelectiveAmnesiaConfig, build_objective: Callable[..., Objective], pipeline: DiffusionPipeline
) -> Objective:
    """The objective of a pipeline, by the settings.

    Args:
        config: The settings.
        build_objective: With the arguments of `objective_for`; `weights_dtype` only where it is none of float32.
        pipeline: The base model's, or the erased one.
    """
    half = {} if config.weights_dtype == "float32" else {"weights_dtype": config.weights_dtype}
    return build_objective(pipeline, config.prediction_type, config.snr_gamma, config.noise_offset, **half)


def check_artifacts_dir(config: SelectiveAmnesiaConfig) -> None:
    """Refuse a file where samples are to be kept.

    Raises:
        ValueError: It is one.
    """
    place = config.resolved_artifacts_dir
    for path in (place, *place.absolute().parents):
        if path.exists() and not path.is_dir():
            given = "the environment's SA_DIFFUSERS_CACHE=" if os.environ.get("SA_DIFFUSERS_CACHE") else "the default "
            named = "artifacts_dir=" if config.artifacts_dir else given
            raise ValueError(f"{named}{place}: {path} is a file, where samples were to be kept: choose a folder")


def _pairs(config: SelectiveAmnesiaConfig, objective: Objective) -> list[ErasurePair]:
    """What is forgotten, and what it turns into: phrases, or classes where the model knows classes."""
    labels = objective.labels
    if config.condition_dropout and not objective.unconditional:
        raise ValueError("condition_dropout has no meaning for a model without an empty prompt: leave it out")
    if labels is None:
        pairs = pair_concepts(config.concept, config.surrogate)
    else:
        pairs = pair_classes(config.concept, config.surrogate, labels)
        _check_class_settings(config, objective, labels)
    for pair in pairs:
        if pair.surrogate.kind == "images":
            for file in image_files(pair.surrogate.value)[: config.num_surrogate_images]:
                read_picture(file, str(file))
    return pairs


def _check_class_settings(config: SelectiveAmnesiaConfig, objective: Objective, labels: Sequence[str]) -> None:
    without_meaning = {
        name: any(template != "{}" for template in getattr(config, name))
        for name in ("concept_templates", "eval_templates")
    }
    default = SelectiveAmnesiaConfig.__dataclass_fields__["replay_prompts"].default
    without_meaning["replay_prompts"] = config.replay_prompts != default
    for name, given in without_meaning.items():
        if given:
            raise ValueError(f"{name} has no meaning for a model of classes: leave it out")
    if config.resolution not in (None, objective.resolution):
        raise ValueError(f"resolution={config.resolution}: this model draws {objective.resolution} pixels only")
    for prompt in config.validation_prompts:
        if prompt:
            class_name(prompt, labels)


def _remembered(
    config: SelectiveAmnesiaConfig,
    objective: Objective,
    pairs: Sequence[ErasurePair],
    given: Sequence[str] | None,
    names: Sequence[str] = (),
) -> list[str]:
    concepts = [pair.concept for pair in pairs]
    if given is None:
        share = config.replay_unconditional_share if objective.unconditional else 0.0
        return _captions(config, objective.labels, concepts, config.num_replay_images, share, names)
    labels = objective.labels
    if "" in given and not objective.unconditional:
        raise ValueError(
            "replay: this model has no empty prompt that bare images could belong to: give dictionaries of an image "
            'and its "text"'
        )
    if labels is None:
        check_replay_prompts(given, concepts)
        return list(given)
    prompts = [class_name(prompt, labels) if prompt else "" for prompt in given]
    for prompt in prompts:
        if prompt in concepts:
            raise ValueError(f'replay of "{prompt}", which is to be forgotten, would teach it again: leave it out')
    return prompts


def _captions(
    config: SelectiveAmnesiaConfig, labels: Sequence[str] | None, concepts: Sequence[str], count: int,
    unconditional_share: float = 0.0, names: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    if not count:
        return []
    if labels is not None:
        return class_replay_prompts(labels, count, concepts, unconditional_share)
    return replay_prompts(
        config.replay_prompts, count, config.seed, concepts, unconditional_share, config.drop_naming_prompts, names
    )


def _named(
    config: SelectiveAmnesiaConfig, objective: Objective, classifier: ImageClassifier | ZeroShotClassifier | None
) -> list[str]:
    """The names that a given classifier has for what the model makes: where nobody said what to remember, a model of
    another world than that of the built-in prompts is remembered by them."""
    is_told = objective.labels is not None or "replay_prompts" in config.written
    if is_told or not isinstance(classifier, ImageClassifier):
        return []
    # Some label files give several names for one label.
    return [label.split(",")[0] for label in classifier.prompted]


def _eval_templates(config: SelectiveAmnesiaConfig, objective: Objective, pairs: Sequence[ErasurePair]) -> list[str]:
    """Phrasings of the evaluation: those that were asked for, else the built-in ones that no training saw and that the
    model reads to the end of the name."""
    if config.eval_templates or objective.labels is not None:
        return config.eval_templates or config.concept_templates
    values = [*config.concept, *(pair.surrogate.value for pair in pairs if pair.surrogate.kind == "prompt")]
    fitting = [
        template
        for template in default_held_out(config.concept_templates)
        if not any(objective.why_unseen(fill_template(template, value), value) for value in values)
    ]
    return fitting or config.concept_templates


def _classifier(
    config: SelectiveAmnesiaConfig, objective: Objective, pairs: Sequence[ErasurePair], device: torch.device
) -> ImageClassifier | ZeroShotClassifier | None:
    """What says whether images show the concept: the given classifier, else a CLIP that is at hand, or nothing."""
    concepts = [pair.concept for pair in pairs]
    if config.classifier:
        classifier = ImageClassifier(config.classifier, device, config.reference_features)
        if objective.labels is not None:
            classifier.check_classes(objective.labels, concepts)
        return classifier
    name = local_clip(config.clip) if objective.labels is None else None
    if name is None:
        return None
    clip = Clip(name, device)
    surrogates = [pair.surrogate.value for pair in pairs if pair.surrogate.kind == "prompt"]
    near, far = near_and_far(concepts, surrogates, clip.embed_texts)
    return ZeroShotClassifier(clip, [*concepts, *surrogates, *near, *far], near)


# What diffusers puts the like of xformers in place of. In place of any other it puts plain attention, which knows no
# places that turn (Z-Image), is not linear (Sana), and has one stream (Qwen-Image).
_EXCHANGED = (
    AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, AttnAddedKVProcessor, AttnAddedKVProcessor2_0,
    XFormersAttnAddedKVProcessor, JointAttnProcessor2_0, XFormersJointAttnProcessor,
)  # fmt: skip


def hands_to_xformers(module: torch.nn.Module) -> bool:
    """Whether a denoiser of diffusers has attention that xformers takes over, and all of it computes the same there."""
    parts = [part for part in module.modules() if isinstance(part, (Attention, AttentionModuleMixin))]
    return bool(parts) and all(
        isinstance(part, AttentionModuleMixin) or isinstance(part.processor, _EXCHANGED) for part in parts
    )


def enable_xformers(module: torch.nn.Module) -> None:
    """Switch attention to xformers.

    Raises:
        ValueError: xformers is not installed, there is no CUDA device, or the module has no attention that it knows.
    """
    if not hands_to_xformers(module):
        raise ValueError(
            f"enable_xformers_memory_efficient_attention: diffusers hands no attention of {type(module).__name__} to "
            "xformers, or another in its place: leave the flag out (PyTorch's own attention is about as fast)"
        )
    try:
        module.enable_xformers_memory_efficient_attention()
    except Exception as error:  # its kernels fail on some devices, each in its own way
        raise ValueError(
            f"enable_xformers_memory_efficient_attention needs xformers and a CUDA device ({shown_error(error)}): pip "
            "install xformers, or leave the flag out (PyTorch's own attention is about as fast)"
        ) from error


def reused(folder: Path, marker: str) -> str:
    """What the plan says of an artefact that is there already."""
    return f"; reused: {folder}" if (folder / marker).is_file() else ""


def describe(settings: SamplingSettings) -> str:
    return f"{settings.sampler}, {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}"
