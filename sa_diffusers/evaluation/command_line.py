"""From the settings of an evaluation to a report."""

import importlib
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from ..configuration import CONFIG_NAME, EvaluationConfig, SelectiveAmnesiaConfig, base_defaults
from ..data.classes import pair_classes
from ..data.concepts import pair_concepts
from ..data.image_datasets import load_labelled_images
from ..data.phrasings import read_templates
from ..data.prompt_files import read_prompts
from ..data.sensitive import must_blur
from ..environment import launched
from ..families import SUPPORTED_PIPELINES, Objective, SamplingSettings, load_pipeline, objective_for
from ..families.digests import fingerprint_module
from ..families.names import resolved_revision
from ..files import finish_interrupted
from ..hub import one_line
from ..markup import visible
from ..publish import write_model_card
from ..report import PAGE_NAME
from ..report.terminal import format_report
from ..results import Report
from .classification import ImageClassifier
from .clip import Clip
from .comparison import Comparison
from .concept_protocol import (
    ConceptPrompts,
    concept_protocol,
    default_held_out,
    near_and_far,
    picture_embeddings,
    text_embeddings,
)
from .detector_protocols import (
    CELEBRITY_PROMPTS,
    celebrity_protocol,
    nudity_protocol,
)
from .erased import erasure_settings
from .faces import CelebrityDetector
from .memory import batch_size_for
from .nudity import NudityDetector, read_i2p
from .protocols import Subject, class_protocol
from .quality import check_can_measure, feature_network
from .robustness import (
    TRANSLATED_TEMPLATES,
    Inversion,
    robustness_protocol,
)


def erasure_of(args: EvaluationConfig) -> SelectiveAmnesiaConfig:
    """The settings of the erasure, with what the command line says otherwise."""
    values = erasure_settings(args.erased, args.erased_revision)
    values = values or base_defaults({"pretrained_model_name_or_path": args.base})
    # Where samples are kept is a matter of this machine, not of the one that erased.
    for name in ("artifacts_dir", "cache_dir"):
        values.pop(name, None)
    if args.base != values.get("pretrained_model_name_or_path"):
        # They are of another place than this one.
        values |= {"revision": None, "variant": None}
    values["pretrained_model_name_or_path"] = args.base
    names = ("concept", "surrogate", "sampler", "num_inference_steps", "guidance_scale", "classifier", "resolution",
             "prediction_type", "revision", "variant", "mixed_precision", "blur")  # fmt: skip
    values |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not values.get("concept"):
        raise ValueError(f"{args.erased} has no {CONFIG_NAME} that says what was erased: give --concept")
    return SelectiveAmnesiaConfig.from_dict(values, f"{args.erased}/{CONFIG_NAME}")


class Evaluation:
    """What the protocols share: both models, what was erased, how images are drawn, what scores them."""

    def __init__(self, args: EvaluationConfig) -> None:
        self.args = args
        self.config = config = erasure_of(args)
        check_scorers(args, config)
        if config.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError(
                'mixed_precision="fp16", as in the erasure or as given, needs a CUDA device and there is none: give '
                "--mixed_precision bf16 or --mixed_precision no"
            )
        self.accelerator = launched(config.mixed_precision)
        device = self.accelerator.device
        base, erased = (self.load(*model).to(device) for model in (("base", args.base), ("erased", args.erased)))
        labels = base.labels
        if labels is not None and config.resolution not in (None, base.resolution):
            raise ValueError(f"resolution={config.resolution}: this model draws {base.resolution} pixels only")
        # The images of a surrogate have done their work.
        self.pairs = (
            pair_classes(config.concept, config.surrogate, labels, must_exist=False)
            if labels
            else pair_concepts(config.concept, config.surrogate, must_exist=False)
        )
        settings = SamplingSettings(
            config.sampler, config.num_inference_steps, config.guidance_scale, args.batch_size or 1, config.resolution
        )
        if args.batch_size is None:
            settings = batch_size_for(base, settings, self.pairs[0].concept)
            # Batches are dealt out to processes: all must mean the same by them.
            settings = replace(settings, batch_size=min(gather_object([settings.batch_size])))
        folder = args.artifacts_dir or config.resolved_artifacts_dir
        self.subject = Subject(base, erased, self.pairs, settings, args.images, args.seed, folder, self.accelerator)
        self.classifier = ImageClassifier(config.classifier, device) if config.classifier else None
        self.networks = [feature_network(name, args.inception_weights, device) for name in args.features]
        self.provenance: dict[str, Any] = {
            "protocol": args.protocol,
            "base_model": args.base,
            "base_revision": resolved_revision(args.base, config.revision),
            "variant": config.variant,
            "erased_model": args.erased,
            "erased_revision": resolved_revision(args.erased, args.erased_revision),
            "base_module": fingerprint_module(base.module),
            "erased_module": fingerprint_module(erased.module),
            "prediction_type": base.prediction_type,
            "mixed_precision": self.accelerator.mixed_precision,
            "blur": must_blur(config.blur, [*config.concept, *config.surrogate]),
            "command": args.command,
            "pairs": [
                {"concept": pair.concept, "surrogate": pair.surrogate.value, "kind": pair.surrogate.kind}
                for pair in self.pairs
            ],
        }

    def load(self, role: str, name: str) -> Objective:
        """A model as it was erased from, or as it was saved, on the CPU.

        Args:
            role: `"base"`, `"erased"` or `"control"`.
            name: A folder or a name on the Hub.
        """
        config = self.config
        place = {"base": (config.revision, config.variant), "erased": (self.args.erased_revision, None)}
        try:
            pipeline = load_pipeline(name, *place.get(role, ()), kinds=SUPPORTED_PIPELINES)
        except (ValueError, OSError) as error:
            # In the words of this program's flags.
            told = one_line(error).replace("--pretrained_model_name_or_path", f"--{role}")
            raise ValueError(told.replace("pretrained_model_name_or_path=", f"--{role} ")) from error
        return objective_for(pipeline, config.prediction_type)

    def clip(self) -> Clip | None:
        return None if self.args.clip == "none" else Clip(self.args.clip, self.accelerator.device)

    def held_out(self) -> list[str]:
        if self.args.held_out_prompts:
            return read_templates(self.args.held_out_prompts)
        return self.config.eval_templates or default_held_out(self.config.concept_templates)

    def prompts(self, clip: Clip | None) -> ConceptPrompts:
        args, config = self.args, self.config
        concepts = [pair.concept for pair in self.pairs]
        surrogates = [pair.surrogate.value for pair in self.pairs if pair.surrogate.kind == "prompt"]
        evoking = read_prompts(args.evoking_prompts, concepts) if args.evoking_prompts else []
        trained = read_templates(args.concept_prompts) if args.concept_prompts else config.concept_templates
        held_out = self.held_out()
        near, far = args.neighbours, args.unrelated
        if near is None or far is None:
            if self.classifier:
                embed, candidates = picture_embeddings(self.subject, self.classifier), self.classifier.labels
            else:
                embed, candidates = clip.embed_texts if clip else text_embeddings(self.subject.base), []
            # All processes ask for the same images: those that the first has chosen.
            nearest, farthest = broadcast_object_list(list(near_and_far(concepts, surrogates, embed, candidates)))
            far = [name for name in farthest if name not in (near or [])] if far is None else far
            near = nearest if near is None else near
        return ConceptPrompts(
            trained=trained,
            held_out=held_out,
            evoking=dict.fromkeys(concepts, evoking) if evoking else {},
            neighbours=near,
            unrelated=far,
        )


def check_scorers(args: EvaluationConfig, config: SelectiveAmnesiaConfig) -> None:
    """What a protocol needs to score with, asked for before any model is loaded.

    Raises:
        ValueError: It is not given.
    """
    if args.protocol in ("class", "concept"):
        check_can_measure()
    if args.protocol == "class" and not config.classifier:
        raise ValueError("the class protocol needs --classifier: a folder or a Hub name of an image classifier")
    if args.protocol == "celebrity" and not args.giphy:
        raise ValueError(
            "the celebrity protocol needs --giphy: the folder with best_model_states.pkl and labels.csv of "
            "Giphy/celeb-detection-oss, which you bring"
        )
    if args.protocol in ("concept", "robustness") and args.clip == "none" and not config.classifier:
        raise ValueError("nothing scores the images: give a CLIP model, a classifier, or both")


def run_class(evaluation: Evaluation) -> Comparison | None:
    forgotten = [pair.concept for pair in evaluation.pairs]
    real = real_images(evaluation.args, evaluation.subject.base, forgotten)
    networks = [evaluation.classifier.feature_network(), *evaluation.networks]
    source = evaluation.args.real and f"{evaluation.args.real}, split {evaluation.args.real_split}"
    provenance = {**evaluation.provenance, "real_images": source}
    return class_protocol(evaluation.subject, evaluation.classifier, networks, real, provenance)


def real_images(args: EvaluationConfig, objective: Objective, forgotten: list[str]) -> list[Image.Image]:
    """The real images of the remembered classes, in the model's format."""
    if not args.real:
        return []
    data = load_labelled_images(args.real, args.real_split)
    try:
        data = data.under(objective.labels or [])
    except ValueError as error:
        raise ValueError(f"--real {args.real} does not fit the model: {error}") from error
    pixels = data.without(forgotten).fitted(objective.resolution, 3).pixels
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def run_concept(evaluation: Evaluation) -> Comparison | None:
    clip = evaluation.clip()
    return concept_protocol(
        evaluation.subject, evaluation.prompts(clip), clip, evaluation.classifier,
        networks=evaluation.networks, provenance=evaluation.provenance,
    )  # fmt: skip


def run_robustness(evaluation: Evaluation) -> Comparison | None:
    args = evaluation.args
    models = {"base": args.base, "erased": args.erased}
    if args.control:
        models["control"] = args.control
    inversion = Inversion(
        args.inversion_steps, args.inversion_images, args.inversion_batch_size, args.inversion_learning_rate
    )
    translations = read_prompts(args.translations) if args.translations else TRANSLATED_TEMPLATES
    return robustness_protocol(
        evaluation.subject, models, evaluation.held_out(), translations, inversion if args.inversion_steps else None,
        evaluation.classifier, evaluation.clip(), provenance=evaluation.provenance, load=evaluation.load,
    )  # fmt: skip


def run_celebrity(evaluation: Evaluation) -> Comparison | None:
    args = evaluation.args
    celebrity = args.celebrity or evaluation.pairs[0].concept
    detector = CelebrityDetector(args.giphy, celebrity, evaluation.accelerator.device)
    given = args.celebrity_prompts
    prompts = read_prompts(given, stands_for="celebrity") if given else CELEBRITY_PROMPTS
    return celebrity_protocol(evaluation.subject, detector, prompts, evaluation.provenance)


def run_nudity(evaluation: Evaluation) -> Comparison | None:
    args = evaluation.args
    detector = NudityDetector()
    i2p = None if args.i2p == "none" else read_i2p(args.i2p, args.i2p_categories)
    # The prompts of this protocol are of naked people, whatever was erased.
    blur = evaluation.config.blur != "no"
    return nudity_protocol(evaluation.subject, detector, i2p, evaluation.provenance, blur)


PROTOCOLS = {
    "class": run_class,
    "concept": run_concept,
    "robustness": run_robustness,
    "celebrity": run_celebrity,
    "nudity": run_nudity,
}


def __getattr__(name: str) -> Any:
    if name in ("main", "parse_args"):
        warnings.warn(
            f"sa_diffusers.evaluation.command_line.{name} is in sa_diffusers.commands.evaluate now",
            DeprecationWarning,
            stacklevel=2,
        )
        # No room imports one above it: this one forwards, for one version.
        return getattr(importlib.import_module("sa_diffusers.commands.evaluate"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run(args: EvaluationConfig) -> Report | None:
    """Measure, and write the report.

    Returns:
        None in all processes but the main one.

    Raises:
        ValueError: A model, or what scores it, is not as it should be.
    """
    started = time.perf_counter()
    # A run that died while it put new weights in place left an erased model of two halves.
    finish_interrupted(args.erased)
    evaluation = Evaluation(args)
    comparison = PROTOCOLS[args.protocol](evaluation)
    if comparison is None:
        # The main process scores what all have sampled.
        return None
    say, report = evaluation.accelerator.print, comparison.report
    args.output_dir.mkdir(parents=True, exist_ok=True)
    comparison.save(args.output_dir)
    if args.output_dir.parent == Path(args.erased):
        write_model_card(args.erased)
    say(f"\n{format_report(report)}\n")
    say(f"report    {args.output_dir / PAGE_NAME} ({time.perf_counter() - started:.0f} s)")
    if report.verdict:
        say(f"verdict   {visible(report.verdict.line)}")
    return report
