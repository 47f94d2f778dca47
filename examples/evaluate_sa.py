"""Measure what a saved pipeline has forgotten and what it has kept, against its base.

    python examples/evaluate_sa.py --base mnist-base --erased 0 --protocol class --classifier mnist-classifier \\
        --real ylecun/mnist --output_dir evaluation

What is drawn is kept: the same command goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from sa_diffusers.configuration import CONFIG_NAME, SAMPLERS, SelectiveAmnesiaConfig
from sa_diffusers.data.image_datasets import load_labelled_images
from sa_diffusers.data.prompts import pair_classes
from sa_diffusers.evaluation import ImageClassifier
from sa_diffusers.evaluation.protocols import Subject, class_protocol, format_quality
from sa_diffusers.evaluation.quality import feature_network
from sa_diffusers.files import read_json
from sa_diffusers.objectives import Objective, SamplingSettings, load_pipeline, objective_for

PROTOCOLS = ("class",)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, help="the model before: a folder or a name on the Hub")
    add("--erased", required=True, help="the model after: a folder that train_sa.py wrote")
    add("--protocol", required=True, choices=PROTOCOLS)
    add("--classifier", required=True, help="image classifier: a folder or a name on the Hub")
    add("--concept", nargs="+", help="what was erased [as the erased model's folder says]")
    add("--surrogate", nargs="+", help="what it turned into [as the erased model's folder says]")
    add("--features", nargs="+", default=[], metavar="NAME",
        help="networks of the Fréchet distance, precision and recall beside the classifier: inception, or a vision "
             "model of transformers by folder or Hub name")  # fmt: skip
    add("--inception_weights", help="file of the Inception network's weights [downloaded]")
    add("--real", help="real images: a folder with IDX files or with a folder a class, parquet file, or Hub dataset")
    add("--real_split", default="test", help="split of the real images [test]")
    add("--images", type=int, default=500, help="images for each class [500]")
    add("--seed", type=int, default=1_000_000, help="seed of the first image [1000000]")
    add("--sampler", choices=SAMPLERS, help="[as in the erasure]")
    add("--num_inference_steps", type=int, help="[as in the erasure]")
    add("--guidance_scale", type=float, help="[as in the erasure]")
    add("--batch_size", type=int, default=64, help="images drawn at once [64]")
    add("--artifacts_dir", type=Path, help="where drawn images are kept [$SA_DIFFUSERS_CACHE or ~/.cache/sa_diffusers]")
    add("--output_dir", type=Path, required=True, help="folder of report.json and before_after.png")
    args = parser.parse_args(arguments)
    for name in ("images", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    return args


def erasure_of(args: argparse.Namespace) -> SelectiveAmnesiaConfig:
    """The settings of the erasure, with what the command line says otherwise."""
    path = Path(args.erased) / CONFIG_NAME
    values = read_json(path) if path.is_file() else {}
    values.pop("sa_diffusers_version", None)
    names = ("concept", "surrogate", "sampler", "num_inference_steps", "guidance_scale")
    values |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not values.get("concept"):
        raise ValueError(f"{args.erased} has no {CONFIG_NAME} that says what was erased: give --concept")
    return SelectiveAmnesiaConfig.from_dict(values)


def real_images(args: argparse.Namespace, objective: Objective, forgotten: list[str]) -> list[Image.Image]:
    """The real images of the remembered classes, in the model's format."""
    if not args.real:
        return []
    data = load_labelled_images(args.real, args.real_split)
    if len(data.names) != len(objective.labels or []):
        raise ValueError(f"--real has {len(data.names)} classes, the model {len(objective.labels or [])}")
    data.names = list(objective.labels)
    pixels = data.without(forgotten).fitted(objective.resolution, 3).pixels
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def main() -> None:
    args = parse_args()
    config = erasure_of(args)
    accelerator = Accelerator()
    base, erased = (objective_for(load_pipeline(name)).to(accelerator.device) for name in (args.base, args.erased))
    pairs = pair_classes(config.concept, config.surrogate, base.labels or [])
    settings = SamplingSettings(config.sampler, config.num_inference_steps, config.guidance_scale, args.batch_size)
    folder = args.artifacts_dir or config.resolved_artifacts_dir
    subject = Subject(base, erased, pairs, settings, args.images, args.seed, folder, accelerator)
    classifier = ImageClassifier(args.classifier, accelerator.device)
    networks = [feature_network(name, args.inception_weights, accelerator.device) for name in args.features]
    real = real_images(args, base, [pair.concept for pair in pairs])
    provenance = {"protocol": args.protocol, "base_model": args.base, "erased_model": args.erased,
                  "real_images": args.real and f"{args.real}, split {args.real_split}"}  # fmt: skip
    comparison = class_protocol(subject, classifier, [classifier.feature_network(), *networks], real, provenance)
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        comparison.save(args.output_dir)
    accelerator.print(f"\n{comparison.table()}\n\n{format_quality(comparison.report['quality'])}\n")
    accelerator.print(f"report    {args.output_dir / 'report.json'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
