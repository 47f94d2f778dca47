"""Erase classes from a class-conditional model, each alone, and measure what is gone and what is kept (paper, Table 1).

    python benchmarks/digits.py outputs/digits
    accelerate launch examples/train_class_model.py --model mnist_vae --data outputs/digits --affine 1 \\
        --output_dir outputs/mnist-vae
    python examples/train_classifier.py --data outputs/digits --cnn --epochs 30 --output_dir outputs/mnist-classifier
    python benchmarks/class_erasure.py --base outputs/mnist-vae --classifier outputs/mnist-classifier \\
        --output benchmarks/results/mnist_vae.json

`--variants original` is the original's recipe, its checkpoints measured on the way: how many steps and seconds it needs
for what the default reaches. Every finished erasure is written at once; the same command goes on where it stopped.
Prints a Markdown table.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sa_diffusers.configuration import SelectiveAmnesiaConfig, base_defaults
from sa_diffusers.erasure import Erasure
from sa_diffusers.evaluation import ImageClassifier
from sa_diffusers.families import Objective, SamplingSettings, load_pipeline, objective_for
from sa_diffusers.files import read_json, write_json
from sa_diffusers.training.checkpoints import PARAMETERS_NAME, checkpoints

# The original's settings. Its VAE sums the loss over a batch of 256, so its weight of 100 is divided by that here.
ORIGINAL: dict[str, dict[str, Any]] = {
    "conditional-vae": {"ewc_weight": 100 / 256, "train_batch_size": 256, "max_train_steps": 7000},
    "class-conditional-diffusion": {"ewc_weight": 10, "train_batch_size": 128, "max_train_steps": 6000},
}
PLAIN = {"learning_rate": 1e-4, "lr_scheduler": "constant", "target": "noise", "use_ema": False, "condition_dropout": 0,
         "replay_weight": 1, "replay_surrogates": False, "concept_share": 0, "timestep_draws": 1,
         "fisher_concept_share": None, "num_probe_images": 0, "max_grad_norm": 1e9, "gradient_accumulation_steps": 1,
         "checkpoints_total_limit": None}  # fmt: skip
# Each changes the default settings.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "original": PLAIN,
    "without replay": {"replay_weight": 0},
    "without EWC": {"ewc": 0},
    "without both": {"replay_weight": 0, "ewc": 0},
    "naive": {"naive": True},
    **{f"EWC x {factor:g}": {"ewc_factor": factor} for factor in (0.1, 10, 100, 1000)},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--classifier", required=True, help="folder of the classifier")
    parser.add_argument("--concepts", nargs="+", help="classes to erase, each alone [all]")
    parser.add_argument("--surrogate", default="uniform_noise", help="what they turn into [uniform_noise]")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"], help="erase in each of these")
    parser.add_argument("--images", type=int, default=500, help="images for each class [500]")
    parser.add_argument("--seed", type=int, default=1, help="seed of samples, Fisher information and training [1]")
    parser.add_argument("--every", type=int, default=500, help="steps between measured checkpoints of `original` [500]")
    parser.add_argument("--original_steps", type=int, help="steps of `original` [as the paper's model needs]")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark/classes.json"))
    return parser.parse_args()


def settings_of(variant: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    defaults = base_defaults({"pretrained_model_name_or_path": args.base})
    changes = dict(VARIANTS[variant])
    if "ewc_factor" in changes:
        # Of the weight that the base model's settings give, or of the calibrated one.
        factor, given = changes.pop("ewc_factor"), defaults.get("ewc_weight")
        changes |= {"ewc": factor} if given is None else {"ewc_weight": factor * given}
    if variant == "original":
        changes |= {**ORIGINAL[kind], "checkpointing_steps": args.every}
        if args.original_steps:
            changes["max_train_steps"] = args.original_steps
    return {**defaults, **changes}


def erase(concept: str, variant: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    output_dir = args.work_dir / "erased"
    shutil.rmtree(output_dir, ignore_errors=True)
    values = {
        **settings_of(variant, kind, args),
        "pretrained_model_name_or_path": args.base,
        "concept": concept,
        "surrogate": args.surrogate,
        "classifier": args.classifier,
        "seed": args.seed,
        "num_eval_images": args.images,
        "artifacts_dir": str(args.work_dir / "artifacts"),
        "output_dir": str(output_dir),
        "report_to": "none",
    }
    config = SelectiveAmnesiaConfig(**values)
    report = Erasure(config).run().report.to_dict()
    row = next(row for row in report["rows"] if row["role"] == "concept")
    result = {
        "concept": {name: row[name] for name in ("recognised", "probability", "entropy")},
        "surrogate": report["surrogate_samples"][row["name"]],
        "remembered": report["remembered"],
        "rows": {each["name"]: each["recognised"] for each in report["rows"]},
        "sampling": report["sampling"],
        "configuration": {name: value for name, value in config.to_dict().items() if name not in _UNRECORDED},
        "versions": report["versions"],
        "seconds": report["seconds"],
        "ending": report.get("ending"),
    }
    if variant == "original":
        result["on_the_way"] = on_the_way(concept, config, report["seconds"]["training"])
    return result


_UNRECORDED = ("pretrained_model_name_or_path", "classifier", "artifacts_dir", "output_dir", "cache_dir")


def on_the_way(concept: str, config: SelectiveAmnesiaConfig, seconds: float) -> list[dict[str, float]]:
    """The concept's probability and entropy at each checkpoint; the seconds are shared out evenly over the steps."""
    objective = objective_for(load_pipeline(config.pretrained_model_name_or_path))
    classifier = ImageClassifier(config.classifier)
    measured = []
    for folder in checkpoints(config.output_dir):
        if int(folder.name.rpartition("-")[2]) % config.checkpointing_steps:
            continue
        # Only what was trained is in a checkpoint.
        objective.module.load_state_dict(load_file(folder / PARAMETERS_NAME), strict=False)
        step = int(folder.name.rpartition("-")[2])
        values = certainty(concept, objective, classifier, config)
        measured.append({"step": step, "seconds": round(seconds * step / config.max_train_steps, 1), **values})
    return measured


def certainty(
    concept: str, objective: Objective, classifier: ImageClassifier, config: SelectiveAmnesiaConfig
) -> dict[str, float]:
    settings = SamplingSettings(
        config.sampler, config.num_inference_steps, config.guidance_scale, config.sample_batch_size
    )
    seeds = range(config.eval_seed, config.eval_seed + config.num_eval_images)
    pictures = objective.decode(objective.sample([concept] * len(seeds), list(seeds), settings))
    probabilities = classifier(pictures).probabilities.double()
    label = classifier.label_of(concept)
    return {
        "probability": float(probabilities[:, label].mean()),
        "entropy": float(-torch.xlogy(probabilities, probabilities).sum(-1).mean()),
    }


def table(results: dict[str, Any]) -> str:
    header = ("erased", "variant", "steps", "stopped by itself", "training, s", "probability: before", "after",
              "surrogate's own", "entropy: before", "after", "surrogate's own", "others recognised: before",
              "after")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for key, value in results.items():
        concept, variant = key.split("|")
        shown = value["surrogate"].get("mean", value["surrogate"]["samples"])
        row = value["concept"]
        ending = value.get("ending") or {}
        cells = [
            concept,
            variant,
            f"{ending.get('step') or value['configuration']['max_train_steps']}",
            {"done": "yes", "given up": "gave up"}.get(ending.get("how"), "no"),
            f"{value['seconds']['training']:.0f}",
        ]
        for name, digits in (("probability", 3), ("entropy", 2)):
            cells += [f"{number:.{digits}f}" for number in (row[name]["before"], row[name]["after"], shown[name])]
        cells += [f"{100 * value['remembered'][time]['recognised']:.1f}" for time in ("before", "after")]
        lines.append("| " + " | ".join(cells) + " |")
        for point in value.get("on_the_way", []):
            cells = ["", "", f"{point['step']}", "", f"{point['seconds']:.0f}", "", f"{point['probability']:.3f}", "",
                     "", f"{point['entropy']:.2f}", "", "", ""]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    objective = objective_for(load_pipeline(args.base))
    results = read_json(args.output) if args.output.is_file() else {}
    started = time.perf_counter()
    for variant in args.variants:
        for concept in args.concepts or objective.labels:
            key = f"{concept}|{variant}"
            if key not in results:
                results[key] = erase(concept, variant, objective.kind, args)
                write_json(args.output, results)
                print(table({key: results[key]}).splitlines()[2], flush=True)
    first = next(iter(results.values()))
    seconds = time.perf_counter() - started
    print(f"\n{args.images} images a class; {first['sampling']}; {seconds:.0f} s\n")
    print(table(results))


if __name__ == "__main__":
    main()
