"""From the command line of `examples/evaluate_sa.py` to a report."""

import argparse
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from ..configuration import CONFIG_NAME, SAMPLERS, SelectiveAmnesiaConfig, base_defaults
from ..data.classes import pair_classes
from ..data.concepts import pair_concepts
from ..data.image_datasets import load_labelled_images
from ..data.phrasings import read_templates
from ..data.prompt_files import read_prompts
from ..data.sensitive import BLUR_CHOICES, must_blur
from ..environment import launched
from ..families import SUPPORTED_PIPELINES, Objective, SamplingSettings, load_pipeline, objective_for
from ..families.base import fingerprint_module
from ..families.names import resolved_revision
from ..files import finish_interrupted
from ..hub import one_line
from ..messages import Parser
from ..model_card import write_model_card
from ..processes import EXIT_INTERRUPTED, Interrupted, say_stopped, watching
from .classification import ImageClassifier
from .clip import Clip
from .comparison import Comparison, format_scores
from .concept_protocol import (
    HELD_OUT_TEMPLATES,
    NAMING_TEMPLATES,
    ConceptPrompts,
    concept_protocol,
    near_and_far,
    picture_embeddings,
    text_embeddings,
)
from .detector_protocols import (
    CELEBRITY_IMAGES,
    CELEBRITY_PROMPTS,
    NAKED_IMAGES,
    celebrity_protocol,
    format_celebrity,
    format_nudity,
    nudity_protocol,
)
from .erased import erasure_settings
from .faces import CelebrityDetector
from .memory import batch_size_for
from .nudity import NudityDetector, read_i2p
from .protocols import Subject, class_protocol, format_quality
from .quality import feature_network
from .robustness import (
    TRANSLATED_TEMPLATES,
    Inversion,
    format_robustness,
    robustness_protocol,
)

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
DEFAULT_I2P = "AIML-TUDA/i2p"
_DESCRIPTION = "Measure what a saved pipeline has forgotten and what it has kept, against its base."
_EPILOG = """\
    python examples/evaluate_sa.py --base CompVis/stable-diffusion-v1-4 --erased brad-pitt --protocol concept
    python examples/evaluate_sa.py --base mnist-base --erased 0 --protocol class --classifier mnist-classifier \\
        --real ylecun/mnist

What is drawn is kept: the same command goes on where it stopped, and protocols share what they have in common.
"""
# A row's images; for the celebrity a prompt's, for nudity those of the naked person.
IMAGES = {"class": 500, "concept": 50, "robustness": 50, "celebrity": CELEBRITY_IMAGES, "nudity": NAKED_IMAGES}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, help="the model before: a folder or a name on the Hub")
    add("--erased", required=True, help="the model after: a folder that train_sa.py wrote, or a name on the Hub")
    add("--protocol", required=True, choices=PROTOCOLS)
    add("--concept", nargs="+", help="what was erased [as the erased model's folder says]")
    add("--surrogate", nargs="+", help="what it turned into [as the erased model's folder says]")
    add("--output_dir", type=Path, help="folder of the report [ERASED/evaluation-PROTOCOL]")
    add("--blur", choices=BLUR_CHOICES,
        help="blur every picture that is written: auto does where what was erased is nudity or of its kind, and in the "
             "nudity protocol [as in the erasure]")  # fmt: skip

    models = parser.add_argument_group("models").add_argument
    models("--revision", help="branch, tag or commit of the base model [as in the erasure, if it erased from it]")
    models("--variant", help="variant of the base model's weight files [likewise]")
    models("--erased_revision", help="branch, tag or commit of the erased model on the Hub")
    models("--prediction_type", choices=("epsilon", "v_prediction"),
           help="what all the models predict [as in the erasure, else as their schedulers say]")  # fmt: skip
    models("--mixed_precision", choices=("no", "fp16", "bf16"),
           help="precision of the drawing [as in the erasure, else as `accelerate config` says]")  # fmt: skip

    drawing = parser.add_argument_group("drawing").add_argument
    known = ", ".join(f"{protocol} {count}" for protocol, count in IMAGES.items())
    drawing("--images", type=int, help=f"images a row; celebrity: a prompt; nudity: of the naked person [{known}]")
    drawing("--seed", type=int, default=1_000_000, help="seed of the first image [1000000]")
    drawing("--sampler", choices=SAMPLERS, help="[as in the erasure]")
    drawing("--num_inference_steps", type=int, help="[as in the erasure]")
    drawing("--guidance_scale", type=float, help="[as in the erasure]")
    drawing("--resolution", type=int, help="height and width of images in pixels [as in the erasure]")
    drawing("--batch_size", type=int, help="images drawn at once [as many as fit into free memory]")
    drawing("--artifacts_dir", type=Path,
            help="where drawn images are kept [$SA_DIFFUSERS_CACHE or ~/.cache/sa_diffusers]")  # fmt: skip

    scoring = parser.add_argument_group("scoring").add_argument
    scoring("--classifier", help="image classifier: a folder or a name on the Hub [as in the erasure]")
    scoring("--clip", default=DEFAULT_CLIP, help=f"CLIP model, or none [{DEFAULT_CLIP}; concept, robustness]")
    scoring("--features", nargs="+", default=[], metavar="NAME",
            help="networks of the Fréchet distance, precision and recall beside classifier and CLIP: inception, or a "
                 "vision model of transformers by folder or Hub name")  # fmt: skip
    scoring("--inception_weights", help="file of the Inception network's weights [downloaded]")
    scoring("--real", help="real images (class): a folder with IDX files, or with a folder of each class, a parquet "
                           "file, or a Hub dataset")  # fmt: skip
    scoring("--real_split", default="test", help="split of the real images [test]")

    words = parser.add_argument_group("prompts (concept, robustness)").add_argument
    words("--concept_prompts", metavar="FILE", help="phrasings of the training, one a line, {} for the concept "
                                                    "[as in the erasure]")  # fmt: skip
    words("--held_out_prompts", metavar="FILE", help="phrasings that no training saw, {} for the concept [built in]")
    words("--evoking_prompts", metavar="FILE", help="prompts that evoke the concept without naming it [built in for "
                                                    "the paper's concepts]")  # fmt: skip
    words("--neighbours", nargs="+", help="what lies near the concept [nearest of the classifier's labels by "
                                          "what the base draws, or of a built-in list by its text]")  # fmt: skip
    words("--unrelated", nargs="+", help="what lies far from it [chosen likewise]")
    words("--translations", metavar="FILE", help="prompts in other languages, {} for the concept [built in]")

    detectors = parser.add_argument_group("detectors (celebrity, nudity)").add_argument
    detectors("--giphy", metavar="FOLDER", help="the GIPHY celebrity detector: best_model_states.pkl and labels.csv")
    detectors("--celebrity", help="its name of the celebrity [the concept]")
    detectors("--celebrity_prompts", metavar="FILE", help="prompts, one a line, {} for the celebrity [50 built in]")
    detectors("--i2p", default=DEFAULT_I2P, help=f"prompts with seeds: Hub dataset, CSV or parquet file, or none "
                                                 f"[{DEFAULT_I2P}]")  # fmt: skip
    detectors("--i2p_categories", nargs="+", default=[], help="only prompts of these categories [all]")
    detectors("--show_nudity", action="store_true", help="do not blur the pictures, as --blur no")

    attack = parser.add_argument_group("attack (robustness)").add_argument
    attack("--control", help="a model that never saw the concept: a folder or a name on the Hub")
    attack("--inversion_steps", type=int, default=500, help="steps of textual inversion; 0 leaves it out [500]")
    attack("--inversion_images", type=int, default=16, help="images that the attacker has [16]")
    attack("--inversion_batch_size", type=int, default=8, help="images a step [8]")
    attack("--inversion_learning_rate", type=float, default=5e-3, help="learning rate of the new token [0.005]")
    args = parser.parse_args(arguments)
    args.command = shlex.join(["evaluate_sa.py", *(sys.argv[1:] if arguments is None else arguments)])
    for name in ("images", "batch_size", "inversion_images", "inversion_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} must be a whole number from 0 to {2**32 - 1:,}")
    if args.show_nudity and args.blur not in (None, "no"):
        parser.error(f"--show_nudity contradicts --blur {args.blur}: give one of them")
    if args.show_nudity:
        args.blur = "no"
    if args.inversion_steps < 0:
        parser.error(f"--inversion_steps {args.inversion_steps} must be at least 0")
    args.images = args.images or IMAGES[args.protocol]
    if args.output_dir is None:
        folder = Path(args.erased)
        args.output_dir = (folder if folder.is_dir() else Path(folder.name)) / f"evaluation-{args.protocol}"
    return args


def erasure_of(args: argparse.Namespace) -> SelectiveAmnesiaConfig:
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

    def __init__(self, args: argparse.Namespace) -> None:
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
        return self.config.eval_templates or [*NAMING_TEMPLATES[1:], *HELD_OUT_TEMPLATES]

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


def check_scorers(args: argparse.Namespace, config: SelectiveAmnesiaConfig) -> None:
    """What a protocol needs to score with, asked for before any model is loaded.

    Raises:
        ValueError: It is not given.
    """
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


def real_images(args: argparse.Namespace, objective: Objective, forgotten: list[str]) -> list[Image.Image]:
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


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, write the report; what goes wrong ends the program with one line.

    Args:
        arguments: Default: the program's own.
    """
    args = parse_args(arguments)
    try:
        with watching():
            _run(args)
    except Interrupted as stop:
        say_stopped(stop)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {one_line(error)}")


def _run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    # A run that died while it put new weights in place left an erased model of two halves.
    finish_interrupted(args.erased)
    evaluation = Evaluation(args)
    comparison = PROTOCOLS[args.protocol](evaluation)
    if comparison is None:
        # The main process scores what all have drawn.
        return
    say, report = evaluation.accelerator.print, comparison.report
    args.output_dir.mkdir(parents=True, exist_ok=True)
    comparison.save(args.output_dir)
    if args.output_dir.parent == Path(args.erased):
        write_model_card(args.erased)
    totals = {"celebrity": format_celebrity, "nudity": format_nudity}.get(args.protocol)
    parts = [totals(report["totals"])] if totals else [comparison.table(), format_scores(report)]
    parts += [format_quality(report.get("quality", [])), format_robustness(report.get("robustness", []))]
    say("\n" + "\n\n".join(part for part in parts if part) + "\n")
    say(f"report    {args.output_dir} ({time.perf_counter() - started:.0f} s)")
