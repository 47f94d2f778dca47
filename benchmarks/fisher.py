"""Which Fisher information predicts drift best? Erasures at learning rates and weights far from one another; what they
pass through, and the weights half as far and twice as far from the base model's, are measured by the probes, and by the
EWC penalty of every estimate.

    python benchmarks/fisher.py --output benchmarks/results/fisher.json

Prints Markdown tables of log(drift / penalty): its standard deviation over all weights of an erasure, and within a run;
and how far it is, in runs with EWC, from that after twenty steps without, by which a training weighs the term. Then
Spearman's correlation of drift and penalty over all weights of a base. What is in the output is not made again.
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from sa_diffusers import SelectiveAmnesiaConfig
from sa_diffusers.configuration import base_defaults
from sa_diffusers.erasure import Erasure
from sa_diffusers.files import read_json, write_json
from sa_diffusers.training.callbacks import StepState
from sa_diffusers.training.probes import Probes

Tensors = dict[str, torch.Tensor]
MODELS = Path(__file__).resolve().parent.parent / "sa_diffusers" / "models"
CASES = ("embedded:sneaker:dress:full", "embedded:coat:pullover:full", "embedded:sneaker:dress:xattn",
         "embedded:coat:pullover:xattn", "coloured:fox:dog:full")  # fmt: skip
COUNTS = ("50x10", "50x5", "50x2")
KINDS = ("gradient", "jacobian")
# Of the undone steps without EWC by which a training weighs the term.
CALIBRATED = 20
RATES = (1e-4, 3e-4, 1e-3)
# EWC by either kind, so that neither has shaped more of the weights than the other.
PROTECTION: dict[str, dict[str, Any]] = {
    "none": {"replay_weight": 0, "ewc": 0},
    "replay": {"replay_weight": 1, "ewc": 0},
    "EWC, gradient": {"replay_weight": 0, "ewc": 4, "fisher_kind": "gradient"},
    "EWC, jacobian": {"replay_weight": 0, "ewc": 4, "fisher_kind": "jacobian"},
}
STEPS = (5, 20, 60)
SCALES = (0.5, 1, 2)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="BASE:CONCEPT:SURROGATE:METHOD")
    parser.add_argument("--counts", nargs="+", default=COUNTS, metavar="SAMPLESxTIMESTEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark/fisher.json"))
    return parser.parse_args()


def erasure_of(case: str, args: argparse.Namespace, **settings: Any) -> Erasure:
    base, concept, surrogate, method = case.split(":")
    folder = str(MODELS / base / "pipeline")
    values = {
        **base_defaults({"pretrained_model_name_or_path": folder}),
        "pretrained_model_name_or_path": folder, "concept": concept, "surrogate": surrogate, "train_method": method,
        "num_surrogate_images": 64, "num_replay_images": 128, "replay_guidance_scale": 1.0, "num_fisher_samples": 50,
        "fisher_timesteps": 10, "train_batch_size": 4, "gradient_accumulation_steps": 1, "max_train_steps": max(STEPS),
        "use_ema": False, "forget_target": None, "classifier": None, "reference_features": None, "clip": "none",
        "seed": args.seed, "report_to": "none",
        "artifacts_dir": str(args.work_dir / "artifacts"), "output_dir": str(args.work_dir / "fisher"),
        "overwrite_output_dir": True, "resume_from_checkpoint": "no", **settings,
    }  # fmt: skip
    return Erasure(SelectiveAmnesiaConfig(**values))


def shifts_of(case: str, run: str, args: argparse.Namespace) -> tuple[list[dict[str, float]], Tensors]:
    """Drifts of one training, and `step/parameter` -> its shift from the base model; kept in the working folder."""
    file = args.work_dir / "shifts" / f"{case} {run}.safetensors"
    if not file.is_file():
        drifts, shifts = train(case, run, args)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(shifts, f"{file}.part", metadata={"drifts": json.dumps(drifts)})
        Path(f"{file}.part").rename(file)
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["drifts"]), load_file(file)


def train(case: str, run: str, args: argparse.Namespace) -> tuple[list[dict[str, float]], Tensors]:
    rate, protection = run.split(" ", 1)
    erasure = erasure_of(case, args, learning_rate=float(rate), **PROTECTION[protection])
    stage, objective = erasure.training_stage, erasure.objective
    before = {name: parameter.detach().clone() for name, parameter in erasure.subject.parameters.items()}
    drifts: list[dict[str, float]] = []
    shifts: Tensors = {}

    @torch.no_grad()
    def look(state: StepState) -> None:
        if state.step not in STEPS:
            return
        after = {name: parameter.clone() for name, parameter in state.parameters.items()}
        shifts.update({f"{state.step}/{name}": value - before[name] for name, value in after.items()})
        objective.module.eval()
        for scale in SCALES:
            for name, parameter in state.parameters.items():
                parameter.copy_(torch.lerp(before[name], after[name], scale))
            drifts.append({"step": state.step, "scale": scale, "drift": probes.read(objective.module).rise})
        for name, parameter in state.parameters.items():
            parameter.copy_(after[name])
        objective.module.train()

    stage.callbacks = [look]
    surrogates = erasure.surrogates()
    products = erasure.products(surrogates)
    remembered = [part for part in products[-1][0].sets if part.role == "remembered"]
    # What the penalty is to predict is the rise of the loss, which is without guidance.
    probes = Probes(objective, remembered, 1.0, args.seed, erasure.subject.accelerator)
    probes.prepare(objective.module)
    with erasure.holding():
        stage.run(surrogates, *products)
    return drifts, shifts


def estimates_of(case: str, counts: str, kind: str, args: argparse.Namespace) -> tuple[int | None, dict[str, Tensors]]:
    """Backward passes of an estimate; by name it, and for the first counts what is left of it without its elements."""
    samples, timesteps = map(int, counts.split("x"))
    settings = {"fisher_kind": kind, "num_fisher_samples": samples, "fisher_timesteps": timesteps}
    information = erasure_of(case, args, **settings).fisher()
    values, generator = information.values, torch.Generator().manual_seed(0)
    found = {f"{kind}, {counts}": values}
    if counts == COUNTS[0]:
        found[f"{kind}, {counts}, shuffled within each tensor"] = {
            name: value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)
            for name, value in values.items()
        }
        found[f"{kind}, {counts}, mean of each tensor"] = {
            name: value.mean().expand_as(value) for name, value in values.items()
        }
    return information.passes and information.passes.backward, found


def penalties_of(shifts: Tensors, weights: Tensors | None) -> dict[str, float]:
    """Step -> penalty; without weights all count alike."""
    sums: dict[str, float] = {}
    for key, shift in shifts.items():
        step, name = key.split("/", 1)
        square = shift.square() if weights is None else shift.square() * weights[name]
        sums[step] = sums.get(step, 0.0) + square.sum().item()
    return sums


def measure(case: str, results: dict[str, Any], args: argparse.Namespace) -> None:
    own = results.setdefault(case, {"drift": {}, "penalty": {}, "backward": {}})
    runs = [f"{rate:g} {protection}" for rate, protection in itertools.product(RATES, PROTECTION)]
    wanted: dict[str, Tensors | None] = {"all alike": None}
    for kind, counts in itertools.product(KINDS, args.counts):
        if f"{kind}, {counts}" not in own["penalty"]:
            own["backward"][f"{kind}, {counts}"], estimates = estimates_of(case, counts, kind, args)
            wanted |= estimates
    for run in runs if len(wanted) > 1 else []:
        drifts, shifts = shifts_of(case, run, args)
        own["drift"][run] = drifts
        for name, weights in wanted.items():
            own["penalty"].setdefault(name, {})[run] = penalties_of(shifts, weights)
        print(f"{case}, {run}", flush=True)
    write_json(args.output, results)


def pairs(own: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Drift and penalty of all weights of a case, a row a run."""
    rows = [[(row["drift"], row["scale"] ** 2 * own["penalty"][name][run][str(row["step"])]) for row in drifts]
            for run, drifts in own["drift"].items()]  # fmt: skip
    drift, penalty = np.moveaxis(np.array(rows), 2, 0)
    return drift, penalty


def over_all(own: dict[str, Any], name: str) -> float:
    drift, penalty = pairs(own, name)
    return np.log(drift / penalty).std()


def within_a_run(own: dict[str, Any], name: str) -> float:
    drift, penalty = pairs(own, name)
    return math.sqrt(np.log(drift / penalty).var(1).mean())


def after_calibration(own: dict[str, Any], name: str) -> float:
    """Root mean square, over rates and steps of the runs with EWC of this kind; of controls there were none."""
    kind, _, control = (name.split(", ", 2) + ["", ""])[:3]
    if kind not in KINDS or control:
        return math.nan

    def ratio(run: str, step: int) -> float:
        drift = next(row["drift"] for row in own["drift"][run] if (row["step"], row["scale"]) == (step, 1))
        return math.log(drift / own["penalty"][name][run][str(step)])

    errors = [ratio(f"{rate:g} EWC, {kind}", step) - ratio(f"{rate:g} none", CALIBRATED)
              for rate, step in itertools.product(RATES, STEPS)]  # fmt: skip
    return float(np.sqrt(np.square(errors).mean()))


def tables(results: dict[str, Any], cases: list[str]) -> str:
    """Three spreads of each case; of each base the correlation."""
    names = list(results[cases[0]]["penalty"])
    passes = {name: str(results[cases[0]]["backward"].get(", ".join(name.split(", ")[:2]), 0)) for name in names}
    heads = ["Fisher information, samples x timesteps", "backward passes"]
    titles = ["{1} → {2}, {3}".format(*case.split(":")) for case in cases]
    found = []
    for measure in (over_all, within_a_run, after_calibration):
        rows = [[name, passes[name], *(measure(results[case], name) for case in cases)] for name in names]
        found.append(markdown([*heads, *titles], rows, measure.__name__.replace("_", " ")))
    bases = list(dict.fromkeys(case.split(":")[0] for case in cases))
    rows = [[name, passes[name]] for name in names]
    for name, row in zip(names, rows, strict=True):
        for base in bases:
            of_base = [pairs(results[case], name) for case in cases if case.split(":")[0] == base]
            drift, penalty = (np.concatenate([part[place].flatten() for part in of_base]) for place in (0, 1))
            row.append(spearmanr(drift, penalty).statistic)
    return "\n\n".join([*found, markdown([*heads, *bases], rows, "Spearman's correlation")])


def markdown(heads: list[str], rows: list[list[Any]], title: str) -> str:
    shown = [[cell if isinstance(cell, str) else f"{cell:.3f}" for cell in row] for row in rows if row[-1] == row[-1]]
    return "\n".join([f"{title}:", "", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *shown))])


def main() -> None:
    args = parse_args()
    results: dict[str, Any] = read_json(args.output) if args.output.is_file() else {}
    for case in args.cases:
        measure(case, results, args)
    print(tables(results, list(args.cases)))


if __name__ == "__main__":
    main()
