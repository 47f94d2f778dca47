"""From the command line of `examples/evaluate_sa.py` to a report."""

import argparse
import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from ..configuration import CONFIG_NAME, SAMPLERS, SelectiveAmnesiaConfig, base_defaults
from ..data.image_datasets import load_labelled_images
from ..data.prompts import pair_classes, pair_concepts, read_prompts, read_templates
from ..files import read_json
from ..model_card import write_model_card
from ..objectives import Objective, SamplingSettings, load_pipeline, objective_for
from ..objectives.base import fingerprint_module
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
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, help="the model before: a folder or a name on the Hub")
    add("--erased", required=True, help="the model after: a folder that train_sa.py wrote, or a name on the Hub")
    add("--protocol", required=True, choices=PROTOCOLS)
    add("--concept", nargs="+", help="what was erased [as the erased model's folder says]")
    add("--surrogate", nargs="+", help="what it turned into [as the erased model's folder says]")
    add("--output_dir", type=Path, help="folder of the report [ERASED/evaluation-PROTOCOL]")

    drawing = parser.add_argument_group("drawing").add_argument
    known = ", ".join(f"{protocol} {count}" for protocol, count in IMAGES.items())
    drawing("--images", type=int, help=f"images a row; celebrity: a prompt; nudity: of the naked person [{known}]")
    drawing("--seed", type=int, default=1_000_000, help="seed of the first image [1000000]")
    drawing("--sampler", choices=SAMPLERS, help="[as in the erasure]")
    drawing("--num_inference_steps", type=int, help="[as in the erasure]")
    drawing("--guidance_scale", type=float, help="[as in the erasure]")
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
    detectors("--show_nudity", action="store_true", help="do not blur the pictures")

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
    if args.inversion_steps < 0:
        parser.error(f"--inversion_steps {args.inversion_steps} must be at least 0")
    args.images = args.images or IMAGES[args.protocol]
    if args.output_dir is None:
        folder = Path(args.erased)
        args.output_dir = (folder if folder.is_dir() else Path(folder.name)) / f"evaluation-{args.protocol}"
    return args


def erasure_of(args: argparse.Namespace) -> SelectiveAmnesiaConfig:
    """The settings of the erasure, with what the command line says otherwise."""
    path = Path(args.erased) / CONFIG_NAME
    if not Path(args.erased).exists():
        with contextlib.suppress(HfHubHTTPError, OSError, ValueError):
            path = Path(hf_hub_download(args.erased, CONFIG_NAME))
    values = base_defaults({"pretrained_model_name_or_path": args.base})
    if path.is_file():
        values = read_json(path)
    # Where samples are kept is a matter of this machine, not of the one that erased.
    for name in ("sa_diffusers_version", "artifacts_dir", "cache_dir"):
        values.pop(name, None)
    names = ("concept", "surrogate", "sampler", "num_inference_steps", "guidance_scale", "classifier")
    values |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not values.get("concept"):
        raise ValueError(f"{args.erased} has no {CONFIG_NAME} that says what was erased: give --concept")
    return SelectiveAmnesiaConfig.from_dict(values)


class Evaluation:
    """What the protocols share: both models, what was erased, how images are drawn, what scores them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = config = erasure_of(args)
        self.accelerator = Accelerator()
        device = self.accelerator.device
        base, erased = (objective_for(load_pipeline(name)).to(device) for name in (args.base, args.erased))
        labels = base.labels
        # The images of a surrogate have done their work.
        self.pairs = (
            pair_classes(config.concept, config.surrogate, labels, must_exist=False)
            if labels
            else pair_concepts(config.concept, config.surrogate, must_exist=False)
        )
        settings = SamplingSettings(
            config.sampler, config.num_inference_steps, config.guidance_scale, args.batch_size or 1
        )
        if args.batch_size is None:
            settings = batch_size_for(base, settings, self.pairs[0].concept)
        folder = args.artifacts_dir or config.resolved_artifacts_dir
        self.subject = Subject(base, erased, self.pairs, settings, args.images, args.seed, folder, self.accelerator)
        self.classifier = ImageClassifier(config.classifier, device) if config.classifier else None
        self.networks = [feature_network(name, args.inception_weights, device) for name in args.features]
        self.provenance: dict[str, Any] = {
            "protocol": args.protocol,
            "base_model": args.base,
            "erased_model": args.erased,
            "base_module": fingerprint_module(base.module),
            "erased_module": fingerprint_module(erased.module),
            "command": args.command,
            "pairs": [
                {"concept": pair.concept, "surrogate": pair.surrogate.value, "kind": pair.surrogate.kind}
                for pair in self.pairs
            ],
        }

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
        if self.classifier:
            embed, candidates = picture_embeddings(self.subject, self.classifier), self.classifier.labels
        else:
            embed, candidates = clip.embed_texts if clip else text_embeddings(self.subject.base), []
        near, far = near_and_far(concepts, surrogates, embed, candidates)
        evoking = read_prompts(args.evoking_prompts, concepts) if args.evoking_prompts else []
        return ConceptPrompts(
            trained=read_templates(args.concept_prompts) if args.concept_prompts else config.concept_templates,
            held_out=self.held_out(),
            evoking=dict.fromkeys(concepts, evoking) if evoking else {},
            neighbours=args.neighbours or near,
            unrelated=args.unrelated or [name for name in far if name not in (args.neighbours or [])],
        )


def run_class(evaluation: Evaluation) -> Comparison:
    if evaluation.classifier is None:
        raise ValueError("the class protocol needs --classifier: a folder or a Hub name of an image classifier")
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


def run_concept(evaluation: Evaluation) -> Comparison:
    clip = evaluation.clip()
    return concept_protocol(
        evaluation.subject, evaluation.prompts(clip), clip, evaluation.classifier,
        networks=evaluation.networks, provenance=evaluation.provenance,
    )  # fmt: skip


def run_robustness(evaluation: Evaluation) -> Comparison:
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
        evaluation.classifier, evaluation.clip(), provenance=evaluation.provenance,
    )  # fmt: skip


def run_celebrity(evaluation: Evaluation) -> Comparison:
    args = evaluation.args
    if not args.giphy:
        raise ValueError(
            "the celebrity protocol needs --giphy: the folder with best_model_states.pkl and labels.csv of "
            "Giphy/celeb-detection-oss, which you bring"
        )
    celebrity = args.celebrity or evaluation.pairs[0].concept
    detector = CelebrityDetector(args.giphy, celebrity, evaluation.accelerator.device)
    given = args.celebrity_prompts
    prompts = read_prompts(given, stands_for="celebrity") if given else CELEBRITY_PROMPTS
    return celebrity_protocol(evaluation.subject, detector, prompts, evaluation.provenance)


def run_nudity(evaluation: Evaluation) -> Comparison:
    args = evaluation.args
    detector = NudityDetector()
    i2p = None if args.i2p == "none" else read_i2p(args.i2p, args.i2p_categories)
    return nudity_protocol(evaluation.subject, detector, i2p, evaluation.provenance, blur=not args.show_nudity)


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
        _run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    evaluation = Evaluation(args)
    comparison = PROTOCOLS[args.protocol](evaluation)
    say, report = evaluation.accelerator.print, comparison.report
    if evaluation.accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        comparison.save(args.output_dir)
        if args.output_dir.parent == Path(args.erased):
            write_model_card(args.erased)
    totals = {"celebrity": format_celebrity, "nudity": format_nudity}.get(args.protocol)
    parts = [totals(report["totals"])] if totals else [comparison.table(), format_scores(report)]
    parts += [format_quality(report.get("quality", [])), format_robustness(report.get("robustness", []))]
    say("\n" + "\n\n".join(part for part in parts if part) + "\n")
    say(f"report    {args.output_dir} ({time.perf_counter() - started:.0f} s)")
