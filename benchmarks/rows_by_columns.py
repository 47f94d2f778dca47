"""What does an adapter's penalty lose where the Fisher information is taken as rows by columns? Of an erasure that was
made, both are computed from the same Fisher information, which is reused where the run has kept it.

    make demo METHOD=lora
    python benchmarks/rows_by_columns.py outputs/demo --output benchmarks/results/rows_by_columns.json

Each layer counts alike: the last one may hold nearly all of the Fisher information. Printed are the least, the median
and the largest of the layers, for rows by columns and, to compare with, for each layer's mean in place of every entry:
the penalty of the erasure's own update in units of the exact one's; the cosine between the gradients of A and B and
the exact ones; and the share of the diagonal, as a sum of squares, that is not held. Sums over rows and columns are
kept, so that the first is near 1 for any update that has nothing to do with the Fisher information, and shows little.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

from sa_diffusers import Erasure, SelectiveAmnesiaConfig
from sa_diffusers.families.adapters import LowRankAdapter, factors, read_adapter
from sa_diffusers.files import write_json
from sa_diffusers.training.trainable import AdapterWeights

COLUMNS = ("penalty", "cosine of gradients", "share not held")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("erased", type=Path, help="folder of an erasure as an adapter")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark/rows_by_columns.json"))
    return parser.parse_args()


def gradient(update, fisher, first, second):
    pull = fisher * update
    return torch.cat([(second.T @ pull).flatten(), (pull @ first.T).flatten()])


@torch.no_grad()
def of_layer(update, exact, simple, first, second):
    penalty = (simple * update.square()).sum() / (exact * update.square()).sum()
    cosine = cosine_similarity(*(gradient(update, fisher, first, second) for fisher in (exact, simple)), dim=0)
    outside = (exact - simple).square().sum() / exact.square().sum()
    return [value.item() for value in (penalty, cosine, outside)]


def main() -> None:
    args = parse_args()
    settings = json.loads((args.erased / "selective_amnesia.json").read_text())
    del settings["sa_diffusers_version"]
    erasure = Erasure(SelectiveAmnesiaConfig(**{**settings, "output_dir": str(args.output.parent / "unused")}))
    information = erasure.fisher()
    if information is None:
        raise SystemExit("error: this erasure has no EWC term: give one that has")
    adapter = LowRankAdapter(erasure.objective.module, erasure.subject.layers.sizes, settings["lora_rank"])
    weights = AdapterWeights(erasure.objective.module, adapter.parameters, adapter)
    state = read_adapter(args.erased)[0]
    part = next(iter(state)).partition(".")[0]
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            parameter.copy_(state[f"{part}.{name.replace('.default.', '.')}"])
    found = {"rows by columns": [], "the layer's mean": []}
    sizes = {}
    for name, layer in adapter.layers.items():
        exact = information.values[name].flatten(1).double()
        sizes[name] = exact.square().sum().item()
        update = weights.shift(name).detach().flatten(1).double()
        first, second = (value.detach().flatten(1).double() for value in factors(layer))
        product = torch.outer(exact.sum(1), exact.sum(0)) / exact.sum()
        for kind, simple in zip(found, (product, exact.mean().expand_as(exact)), strict=True):
            found[kind].append(of_layer(update, exact, simple, first, second))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {"layers": list(adapter.layers), "columns": list(COLUMNS), "found": found})
    print(f"| Fisher information | {' | '.join(COLUMNS)} |\n| --- | --- | --- | --- |")
    for kind, rows in found.items():
        columns = [sorted(column) for column in zip(*rows, strict=True)]
        texts = [f"{column[0]:.3f}, {statistics.median(column):.3f}, {column[-1]:.3f}" for column in columns]
        print(f"| {kind} | {' | '.join(texts)} |")
    largest = max(sizes, key=sizes.__getitem__)
    share = sizes[largest] / sum(sizes.values())
    print(f"\n{len(sizes)} layers: least, median, largest. {largest} holds {share:.1%} of the sum of squares")


if __name__ == "__main__":
    main()
