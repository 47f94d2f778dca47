"""Erase garments from the embedded pipeline and measure what is gone and what is kept.

    python benchmarks/embedded_erasure.py --methods full xattn noxattn --output benchmarks/results/erasures.json
    python benchmarks/embedded_erasure.py --concepts sneaker --variants "without replay" "without EWC" "without both" \\
        --output benchmarks/results/erasures.json

Every finished erasure is written at once; the same command goes on where it stopped. Prints Markdown tables.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from sa_diffusers.configuration import HISTORY_NAME, SelectiveAmnesiaConfig, base_defaults
from sa_diffusers.data.captions import load_vocabulary
from sa_diffusers.erasure import Erasure
from sa_diffusers.files import read_json, write_json
from sa_diffusers.models import embedded_pipeline

# Some pairs are alike (a shirt and a t-shirt), some are not; none was chosen for its figures.
SURROGATES = {
    "t-shirt": "dress",
    "trouser": "coat",
    "pullover": "bag",
    "dress": "trouser",
    "coat": "pullover",
    "sandal": "ankle boot",
    "shirt": "t-shirt",
    "sneaker": "dress",
    "bag": "sandal",
    "ankle boot": "sneaker",
}
# What was tuned by hand on these garments, before runs measured themselves.
BY_HAND: dict[str, Any] = {
    "num_surrogate_images": 200,
    "num_replay_images": 1512,
    "replay_unconditional_share": 0.15,
    "num_fisher_samples": 48,
    "fisher_timesteps": 50,
    "fisher_batch_size": 50,
    "concept_share": 0,
    "timestep_draws": 1,
    "ewc_weight": 0.02,
    "replay_weight": 2.0,
    "condition_dropout": 0.3,
    "max_train_steps": 360,
    "train_batch_size": 32,
    "learning_rate": 0.0005,
    "lr_scheduler": "cosine",
    "use_ema": True,
    "ema_decay": 0.95,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "num_probe_images": 0,
}
# Each changes settings of the demo.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tuned by hand": BY_HAND,
    "without replay": {**BY_HAND, "replay_weight": 0},
    "without EWC": {**BY_HAND, "ewc_weight": 0},
    "without both": {**BY_HAND, "replay_weight": 0, "ewc_weight": 0},
    "noise target": {**BY_HAND, "target": "noise"},
    "bare prompt": {**BY_HAND, "concept_templates": ["{}"]},
    "as the paper": {
        **BY_HAND,
        "target": "noise",
        "concept_templates": ["{}"],
        "replay_surrogates": False,
        "fisher_concept_share": None,
        "ema_warmup": False,
    },
}


RECORDED = (
    "seed", "eval_seed", "num_eval_images", "concept_templates", "eval_templates", "num_surrogate_images",
    "surrogate_guidance_scale", "num_replay_images", "replay_guidance_scale", "replay_unconditional_share",
    "num_fisher_samples", "fisher_timesteps", "ewc", "ewc_weight", "replay_weight", "target", "max_train_steps",
    "train_batch_size", "learning_rate", "lr_scheduler", "use_ema", "ema_decay", "ema_warmup",
    "replay_surrogates", "concept_share", "timestep_draws", "fisher_concept_share",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    garments = load_vocabulary("garments").subjects
    parser.add_argument("--concepts", nargs="+", choices=garments, default=garments)
    parser.add_argument("--surrogate", choices=garments, help="default: one fixed for each concept")
    parser.add_argument("--methods", nargs="+", default=["full"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"], help="erase in each of these")
    parser.add_argument("--images", type=int, default=500, help="images for each garment")
    parser.add_argument("--seed", type=int, default=1, help="seed of samples, Fisher information and training")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings that differ from the demo's"
    )
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark/erasures.json"))
    return parser.parse_args()


def erase(concept: str, surrogate: str, method: str, settings: dict, args: argparse.Namespace) -> dict:
    base = str(embedded_pipeline())
    started = time.perf_counter()
    values = {
        **base_defaults({"pretrained_model_name_or_path": base}),
        "pretrained_model_name_or_path": base,
        "concept": concept,
        "surrogate": surrogate,
        "train_method": method,
        "seed": args.seed,
        "num_eval_images": args.images,
        "artifacts_dir": str(args.work_dir / "artifacts"),
        "output_dir": str(args.work_dir / "erased"),
        "overwrite_output_dir": True,
        "report_to": "none",
        **settings,
    }
    report = Erasure(SelectiveAmnesiaConfig(**values)).run().report.to_dict()
    held_out = next(row for row in report["rows"] if row["name"] == concept)
    trained = next(row for row in report["rows"] if row["name"] == f"{concept} (trained phrasings)")
    target = next(row for row in report["rows"] if row["name"] == surrogate)
    return {
        "recognised": held_out["recognised"],
        "recognised_trained_phrasings": trained["recognised"],
        "as_surrogate": held_out["as_surrogate"],
        "surrogate_recognised": target["recognised"],
        "remembered": report["remembered"],
        "rows": {row["name"]: row["recognised"] for row in report["rows"]},
        "sampling": report["sampling"],
        "configuration": {name: report["configuration"][name] for name in RECORDED},
        "versions": report["versions"],
        "seconds": report["seconds"],
        "cost": report["cost"],
        "steps": read_json(args.work_dir / "erased" / HISTORY_NAME)[-1]["step"],
        "total_seconds": round(time.perf_counter() - started, 1),
    }


def table(results: dict) -> str:
    header = ("erased", "selection", "variant", "recognised: before", "after", "after, trained phrasings",
              "as surrogate", "other nine: before", "after", "Fréchet: before", "after", "growth")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for key, value in results.items():
        concept, surrogate, method, variant = key.split("|")
        old, new = value["remembered"]["before"], value["remembered"]["after"]
        cells = [
            f"{concept} → {surrogate}",
            method,
            variant,
            f"{100 * value['recognised']['before']['share']:.1f}",
            share(value["recognised"]["after"]),
            share(value["recognised_trained_phrasings"]["after"]),
            share(value["as_surrogate"]["after"]),
            f"{100 * old['recognised']:.1f}",
            f"{100 * new['recognised']:.1f}",
            f"{old['frechet_distance']:.2f}",
            f"{new['frechet_distance']:.2f}",
            f"{100 * (new['frechet_distance'] / old['frechet_distance'] - 1):+.1f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(value: dict) -> str:
    low, high = value["interval"]
    return f"{100 * value['share']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    args = parse_args()
    settings = dict(item.split("=", 1) for item in args.set)
    settings = {name: int(value) if value.isdigit() else value for name, value in settings.items()}
    results = read_json(args.output) if args.output.is_file() else {}
    for method in args.methods:
        for concept in args.concepts:
            for variant in args.variants:
                surrogate = args.surrogate or SURROGATES[concept]
                key = f"{concept}|{surrogate}|{method}|{variant}"
                if key not in results:
                    results[key] = erase(concept, surrogate, method, {**VARIANTS[variant], **settings}, args)
                    write_json(args.output, results)
                    print(table({key: results[key]}).splitlines()[-1], flush=True)
    print(f"\n{args.images} images a garment; {next(iter(results.values()))['sampling']}\n\n{table(results)}")


if __name__ == "__main__":
    main()
