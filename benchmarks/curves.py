"""How much work is an erasure: what is left of a concept, and of the rest, over network evaluations.

    python benchmarks/curves.py --output benchmarks/results/curves.json

One concept, three recipes: what a run finds by itself, what was tuned by hand on the garments, and the original's. Each
checkpoint on the way is measured. Every evaluation of the network counts, forward and backward, those of samples,
Fisher information, probes and checks too, but not those of the measurement. The original's Fisher information, of 5,000
samples at 1,000 timesteps each, and its 6,000 samples are counted as they are and computed smaller here; its average of
the weights, which hardly moves in so few steps, is left out. Every recipe is written at once; the same command goes on
where it stopped. Prints a Markdown table and writes a figure beside the results.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from acid import Judge
from embedded_erasure import BY_HAND

from sa_diffusers.configuration import SelectiveAmnesiaConfig, base_defaults
from sa_diffusers.erasure import Erasure
from sa_diffusers.files import read_json, write_json
from sa_diffusers.models import embedded_pipeline
from sa_diffusers.passes import Passes, together
from sa_diffusers.training.checkpoints import checkpoints, read_checkpoint

# As `--config brad_pitt_man`, but for what the docstring says.
ORIGINAL: dict[str, Any] = {
    **BY_HAND,
    "concept_templates": ["{}"],
    "replay_unconditional_share": 0.0,
    "replay_surrogates": False,
    "concept_share": 0,
    "timestep_draws": 1,
    "fisher_concept_share": None,
    "ewc_weight": 50,
    "replay_weight": 1,
    "target": "noise",
    "train_batch_size": 16,
    "learning_rate": 1.6e-4,
    "lr_scheduler": "constant",
    "adam_weight_decay": 0.01,
    "max_grad_norm": 1e9,
    "use_ema": False,
    "condition_dropout": 0,
    "max_train_steps": 1600,
}
# 1,000 surrogates and 5,000 samples to replay, 50 steps with guidance; Fisher information.
ORIGINAL_PREPARED = Passes(6000 * 50 * 2 + 5000 * 1000, 5000 * 1000)
RECIPES: dict[str, dict[str, Any]] = {
    "by itself": {"checkpointing_steps": 15},
    "tuned by hand": {**BY_HAND, "checkpointing_steps": 40},
    "the original's": {**ORIGINAL, "checkpointing_steps": 200},
}
# The share of images that may show the concept.
_LEFT = 0.02
PREPARATION = ("surrogate samples", "replay samples", "fisher", "probe samples")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="sneaker:dress", metavar="CONCEPT:SURROGATE")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--images", type=int, default=100, help="of each garment at each point [100]")
    parser.add_argument("--seed", type=int, default=1, help="seed of samples, Fisher information and training [1]")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/benchmark/curves"))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark/curves.json"))
    return parser.parse_args()


def measured(judge: Judge, concept: str, images: int) -> dict[str, float]:
    """Shares of images that the classifier calls the concept, and the mean of what it recognises of the others."""
    others = [label for label in judge.labels if label != concept]
    return {
        "concept": judge.share(judge(concept, images), concept),
        "others": sum(judge.share(judge(label, images), label) for label in others) / len(others),
    }


def curve(recipe: str, args: argparse.Namespace) -> dict[str, Any]:
    """One erasure, and its points."""
    base, (concept, surrogate) = str(embedded_pipeline()), args.pair.split(":")
    # Another run's samples and Fisher information would cost nothing here.
    shutil.rmtree(args.work_dir, ignore_errors=True)
    config = SelectiveAmnesiaConfig(**{
        **base_defaults({"pretrained_model_name_or_path": base}), "pretrained_model_name_or_path": base,
        "concept": concept, "surrogate": surrogate, "seed": args.seed, "checkpoints_total_limit": None,
        "artifacts_dir": str(args.work_dir / "artifacts"), "output_dir": str(args.work_dir / "erased"),
        "report_to": "none", **RECIPES[recipe],
    })  # fmt: skip
    erasure = Erasure(config)
    judge = Judge(erasure, args.work_dir)
    before = measured(judge, concept, args.images)
    started = time.process_time()
    surrogates = erasure.surrogates()
    products = erasure.products(surrogates)
    prepared_seconds = time.process_time() - started
    passes = erasure.subject.passes
    prepared = together(passes.get(name, Passes()) for name in PREPARATION)
    assert prepared is not None
    computed = Passes(prepared.forward, prepared.backward)
    if recipe == "the original's":
        prepared = ORIGINAL_PREPARED
    with erasure.holding():
        started = time.process_time()
        training = erasure.training_stage.run(surrogates, *products)
        seconds = time.process_time() - started
    steps = training.history[-1]["step"]

    objective = erasure.objective
    parameters = objective.select(config.train_method)
    # The last weights are in no checkpoint.
    last = {"step": steps, "forward": prepared.forward + training.progress.passes.forward,
            "backward": prepared.backward + training.progress.passes.backward,
            **measured(judge, concept, args.images)}  # fmt: skip
    points = [{"step": 0, "forward": prepared.forward, "backward": prepared.backward, **before}]
    for folder in checkpoints(config.output_dir):
        state = read_checkpoint(folder)
        assert state.passes is not None
        saved = (state.average or {}).get("shadow_params") or [state.parameters[name] for name in parameters]
        for parameter, value in zip(parameters.values(), saved, strict=True):
            parameter.data.copy_(value)
        points.append({
            "step": state.step, "forward": prepared.forward + state.passes.forward,
            "backward": prepared.backward + state.passes.backward, **measured(judge, concept, args.images),
        })  # fmt: skip
    points.append(last)
    ending = training.ending.sentence if training.ending else f"after {steps} steps"
    return {"points": points, "steps": steps, "ending": ending, "computed": computed.to_dict(),
            "prepared_seconds": round(prepared_seconds, 1), "training_seconds": round(seconds, 1)}  # fmt: skip


def evaluations(point: dict[str, float]) -> float:
    return point["forward"] + point["backward"]


def table(results: dict[str, Any]) -> str:
    header = ("recipe", "step", "evaluations, thousands", "left of the concept, %", "others recognised, %",
              "training, CPU s")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for recipe, result in results.items():
        for point in result["points"]:
            spent = result["training_seconds"] * point["step"] / result["steps"]
            cells = (recipe, f"{point['step']}", f"{evaluations(point) / 1000:,.0f}", f"{100 * point['concept']:.1f}",
                     f"{100 * point['others']:.1f}", f"{spent:.0f}")  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def needed(result: dict[str, Any]) -> tuple[float, float] | None:
    """Evaluations and seconds of training until no more than a fiftieth is left for good; None if that is never."""
    points = result["points"]
    enough = 1 + max((place for place, point in enumerate(points) if point["concept"] > _LEFT), default=-1)
    if enough == len(points):
        return None
    return evaluations(points[enough]), result["training_seconds"] * points[enough]["step"] / result["steps"]


def summary(results: dict[str, Any]) -> str:
    """What each recipe takes until the concept is gone, and how many times what a run takes by itself."""
    found = {recipe: needed(result) for recipe, result in results.items()}
    base = found.get(next(iter(RECIPES)))
    lines = [f"Until at most {100 * _LEFT:g} % of the concept are left:"]
    for recipe, spent in found.items():
        told = "never" if spent is None else f"{spent[0]:,.0f} evaluations, {spent[1]:.0f} CPU s of training"
        times = f" ({spent[0] / base[0]:,.1f} and {spent[1] / base[1]:,.1f} times)" if spent and base else ""
        lines.append(f"- {recipe}: {told}{times}")
    return "\n".join(lines)


def draw(results: dict[str, Any], pair: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for recipe, result in results.items():
        spent = [evaluations(point) for point in result["points"]]
        for axes, name in ((left, "concept"), (right, "others")):
            axes.plot(spent, [100 * point[name] for point in result["points"]], marker="o", markersize=3, label=recipe)
    concept, _, surrogate = pair.partition(":")
    left.set_title(f"“{concept}” into “{surrogate}”: still recognised, %", fontsize=10)
    right.set_title("the nine other garments recognised, %", fontsize=10)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("network evaluations, forward and backward")
    left.legend(fontsize=8)
    figure.savefig(file, dpi=130)


def main() -> None:
    args = parse_args()
    results: dict[str, Any] = read_json(args.output) if args.output.is_file() else {}
    for recipe in args.recipes:
        if recipe not in results:
            results[recipe] = curve(recipe, args)
            write_json(args.output, results)
            print(recipe, results[recipe]["ending"], flush=True)
    draw(results, args.pair, args.output.with_suffix(".png"))
    print(f"\n{args.pair}, {args.images} images of each garment at each point\n\n{table(results)}")
    print(f"\n{summary(results)}")


if __name__ == "__main__":
    main()
