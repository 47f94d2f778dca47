"""Do the probes rank models as sampling does? Erasures at learning rates, weights and steps far from one another, each
read by the probes and sampled from on its way.

    python benchmarks/probes.py --base sa_diffusers/models/embedded/pipeline --pairs sneaker:dress coat:pullover \
        --output benchmarks/results/probes.json

Prints Spearman's correlation of each figure of the probes with the mean probability that the classifier gives the
concept in sampled images, over all models of a pair and over all of the base, and over those whose drift is tolerated
by default: only of such does a training look at images. What is in the output is not made again.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from sa_diffusers import SelectiveAmnesiaConfig
from sa_diffusers.erasure import Erasure
from sa_diffusers.files import read_json, write_json
from sa_diffusers.training.callbacks import StepState

STEPS = (5, 10, 20, 40, 80)
TOLERATED = SelectiveAmnesiaConfig.drift_tolerance or 0.1
FIGURES = ("forgotten", "forgotten_surrogate", "forgotten_unguided")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--classifier", help="folder of the classifier [the base model's own]")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="CONCEPT:SURROGATE")
    parser.add_argument("--method", default="full", help="parameters to train [full]")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4, 1e-3], help="learning rates")
    parser.add_argument("--protection", type=float, nargs="+", default=[1, 8], help="weights of replay and EWC")
    parser.add_argument("--images", type=int, default=40, help="sampled images of each model [40]")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark/probes.json"))
    return parser.parse_args()


def measured(pair: str, rate: float, protection: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Readings and sampled probabilities of one training."""
    concept, surrogate = pair.split(":")
    given = {"classifier": args.classifier} if args.classifier else {}
    config = SelectiveAmnesiaConfig(
        pretrained_model_name_or_path=args.base, concept=concept, surrogate=surrogate, train_method=args.method,
        learning_rate=rate, replay_weight=protection, ewc=protection, max_train_steps=max(STEPS), use_ema=False,
        forget_target=None, artifacts_dir=str(args.work_dir / "artifacts"), output_dir=str(args.work_dir / "probed"),
        overwrite_output_dir=True, resume_from_checkpoint="no", report_to="none", **given,
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    erasure = Erasure(config)
    stage = erasure.training_stage

    def look(state: StepState) -> None:
        if state.step not in STEPS:
            return
        subject, module = erasure.subject, erasure.objective.module
        label = subject.classifier.label_of(concept)
        prompts = [template.replace("{}", concept) for template in subject.eval_templates]
        prompts = [prompts[number % len(prompts)] for number in range(args.images)]
        seeds = list(range(config.eval_seed, config.eval_seed + args.images))
        module.eval()
        reading = probes.read(module)
        pictures = erasure.objective.decode(erasure.objective.sample(prompts, seeds, subject.settings))
        module.train()
        probability = subject.classifier(pictures).probabilities[:, label].mean().item()
        found.append({"pair": pair, "rate": rate, "protection": protection, "step": state.step,
                      "probability": probability, **reading.values()})  # fmt: skip

    stage.callbacks = [look]
    surrogates = erasure.surrogates()
    products = erasure.products(surrogates)
    probes = products[-1][0]
    with erasure.holding():
        stage.run(surrogates, *products)
    return found


def ranked(rows: list[dict[str, Any]]) -> str:
    between = sum(0.02 <= row["probability"] <= 0.98 for row in rows)
    figures = ", ".join(
        f"{name} {spearmanr([row[name] for row in rows], [-row['probability'] for row in rows]).statistic:.2f}"
        for name in FIGURES
        if name in rows[0]
    )
    return f"{len(rows)} models, {between} of them with 2 to 98 % sampled: {figures}"


def main() -> None:
    args = parse_args()
    results: dict[str, list[dict[str, Any]]] = read_json(args.output) if args.output.is_file() else {}
    runs = list(itertools.product(args.pairs, args.rates, args.protection))
    base = Path(args.base).resolve()
    names = [json.dumps([base.parent.name, args.method, *run]) for run in runs]
    for name, run in zip(names, runs, strict=True):
        if name not in results:
            results[name] = measured(*run, args)
            write_json(args.output, results)
    for pair in args.pairs:
        rows = [row for name in names for row in results[name] if row["pair"] == pair]
        print(f"{pair}, {args.method}: {ranked(rows)}")
    rows = [row for name in names for row in results[name]]
    print(f"all, {args.method}: {ranked(rows)}")
    rows = [row for row in rows if max(row["drift_p90"], row.get("drift_neighbours", 0.0)) <= TOLERATED]
    print(f"all with a drift of at most {TOLERATED:g}, {args.method}: {ranked(rows)}")


if __name__ == "__main__":
    main()
