"""The acid test of the defaults: bases that bring no learning rate, step count or weight, concepts that no default was
chosen on, several seeds, and the worst of them.

    python benchmarks/acid.py --base garments=sa_diffusers/models/embedded/pipeline --methods full xattn \\
        --pairs "bag:sandal" "trouser:coat" --output benchmarks/results/acid.json

Every finished erasure is written at once; the same command goes on where it stopped. Prints a Markdown table of all
that is written there, of each figure the worst seed. A base that does not name its classifier gets one by
`--classifier`; a class without a surrogate is erased to uniform noise.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from sa_diffusers.configuration import SelectiveAmnesiaConfig, base_defaults
from sa_diffusers.data.captions import load_vocabulary
from sa_diffusers.data.phrasings import fill_template
from sa_diffusers.erasure import Erasure
from sa_diffusers.files import read_json, write_json
from sa_diffusers.results.statistics import frechet_distance, moments, wilson_interval
from sa_diffusers.results.verdict import MOST_LEFT

# A row of its own; other labels share theirs.
NEIGHBOURS = 5
MANY_LABELS = 12
# No other seeds of the package begin there.
FIRST_SEED = 10**8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="NAME=FOLDER", help="name in the table, and its folder")
    parser.add_argument("--classifier", help="folder of the classifier [the base model's own]")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="CONCEPT[:SURROGATE]")
    parser.add_argument("--methods", nargs="+", default=["full"], help="parameters to train [full]")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE",
                        help="settings that are no defaults; give the base another name then")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=200, help="of concept, surrogate and neighbours, each [200]")
    parser.add_argument("--rest", type=int, default=20, help="of each other label, where there are many [20]")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark/acid.json"))
    return parser.parse_args()


class Judge:
    """What a classifier says of a model's samples.

    Args:
        erasure: Of the model, as it stands when it is called.
        folder: Where the base model's are kept.
    """

    def __init__(self, erasure: Erasure, folder: Path) -> None:
        self.subject, self.objective, self.folder = erasure.subject, erasure.objective, folder
        self.labels = self.objective.labels or load_vocabulary(erasure.subject.config.replay_prompts).subjects
        self.classifier = self.subject.classifier

    def __call__(self, label: str, count: int, keeps: bool = False, shift: int = 0) -> dict[str, torch.Tensor]:
        """Probabilities `[count, labels]` and features `[count, d]` of images in held-out phrasings."""
        file = self.folder / f"{label}-{count}-{shift}.safetensors"
        if keeps and file.is_file():
            return load_file(file)
        found = vars(self.classifier(self.pictures(label, count, shift)))
        found = {name: value.contiguous() for name, value in found.items()}
        if keeps:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(found, file)
        return found

    def pictures(self, label: str, count: int, shift: int = 0, trained: bool = False) -> list[Image.Image]:
        """Pictures in held-out phrasings, or in those of the training, one seed each."""
        templates = self.subject.config.concept_templates if trained else self.subject.eval_templates
        templates = ["{}"] if self.objective.labels else templates
        prompts = [fill_template(templates[place % len(templates)], label) for place in range(count)]
        first = FIRST_SEED + 1000 * (self.labels.index(label) + shift * len(self.labels))
        samples = self.objective.sample(prompts, range(first, first + count), self.subject.settings)
        return self.objective.decode(samples.to(self.objective.device))

    def share(self, found: dict[str, torch.Tensor], label: str) -> float:
        return (found["probabilities"].argmax(-1) == self.classifier.label_of(label)).float().mean().item()

    def probability(self, found: dict[str, torch.Tensor], label: str) -> float:
        return found["probabilities"][:, self.classifier.label_of(label)].mean().item()


def settings_of(words: list[str]) -> dict[str, Any]:
    """Of "name=value", with values as in YAML."""
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in words)}


def erased(pair: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One erasure with the defaults, and what is left."""
    name, _, folder = args.base.partition("=")
    concept, _, surrogate = pair.partition(":")
    given: dict[str, Any] = {"surrogate": surrogate} if surrogate else {}
    if args.classifier:
        given["classifier"] = args.classifier
    config = SelectiveAmnesiaConfig(**{
        **base_defaults({"pretrained_model_name_or_path": folder, **given}), "pretrained_model_name_or_path": folder,
        "concept": concept, "train_method": method, "seed": seed, "artifacts_dir": str(args.work_dir / "artifacts"),
        "output_dir": str(args.work_dir / "acid" / name), "overwrite_output_dir": True, "resume_from_checkpoint": "no",
        "report_to": "none", **given, **settings_of(args.set),
    })  # fmt: skip
    started = time.process_time()
    erasure = Erasure(config)
    judge = Judge(erasure, args.work_dir / "acid" / f"{name}-base")
    surrogates = erasure.surrogates()
    products = erasure.products(surrogates)
    made = time.process_time()

    own = judge(concept, args.images, keeps=True)
    # Neighbours are what the classifier takes the base model's images of the concept for, if not for it.
    likely = own["probabilities"].mean(0).argsort(descending=True).tolist()
    ranked = [judge.classifier.labels[index] for index in likely if judge.classifier.labels[index] in judge.labels]
    others = [label for label in ranked if label not in (concept, surrogate)]
    many = len(others) > MANY_LABELS
    counts = {label: args.rest if many and place >= NEIGHBOURS else args.images for place, label in enumerate(others)}
    before = {label: judge(label, count, keeps=True) for label, count in counts.items()}
    again = {label: judge(label, count, keeps=True, shift=1) for label, count in counts.items()}
    target = judge(surrogate, args.images, keeps=True) if surrogate else None

    began = time.process_time()
    with erasure.holding():
        training = erasure.training_stage.run(surrogates, *products)
    seconds = time.process_time() - began + made - started
    after = {label: judge(label, count) for label, count in counts.items()}
    left = judge(concept, args.images)
    # As many as a report has of either, of seeds of their own.
    index, usual = judge.classifier.label_of(concept), min(config.num_concept_eval_images, args.images)
    trained = judge.classifier(judge.pictures(concept, usual, shift=2, trained=True))
    called = [found.argmax(-1) == index for found in (left["probabilities"][:usual], trained.probabilities)]
    verdict = training.controller.verdict
    result: dict[str, Any] = {
        "steps": training.history[-1]["step"], "seconds": round(seconds, 1), "stopped": verdict.sentence,
        "done": verdict.done, "checks": training.controller.state.checks,
        "cost": {stage: vars(passes) for stage, passes in erasure.subject.passes.items()},
        "concept": [judge.share(own, concept), judge.share(left, concept)],
        "probability": [judge.probability(own, concept), judge.probability(left, concept)],
        "others": {label: [judge.share(before[label], label), judge.share(after[label], label), count]
                   for label, count in counts.items()},
        "neighbours": others[:NEIGHBOURS], "report": [[int(is_it.sum()), len(is_it)] for is_it in called],
    }  # fmt: skip
    if surrogate:
        result["surrogate"] = [judge.share(target, surrogate), judge.share(judge(surrogate, args.images), surrogate)]
    else:
        noise = surrogates.samples[~torch.tensor(surrogates.are_own)][:500]
        if judge.objective.shows_means:
            noise = noise.mean().expand_as(noise[:1])
        pictures = judge.objective.decode(noise.to(judge.objective.device))
        floor = judge.classifier(pictures).probabilities[:, judge.classifier.label_of(concept)]
        result["floor"] = floor.mean().item()
    reference = judge.classifier.reference_moments([judge.classifier.label_of(label) for label in others])
    if reference is not None:
        result["frechet"] = [
            frechet_distance(moments(torch.cat([found[label]["features"] for label in others])), reference)
            for found in (before, after, again)
        ]
    return result


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def kept(result: dict[str, Any], labels: list[str], place: int) -> float:
    return mean([result["others"][label][place] for label in labels])


def lost(result: dict[str, Any], labels: list[str]) -> float:
    return 100 * (kept(result, labels, 0) - kept(result, labels, 1))


def cells(base: str, method: str, pair: str, seeds: list[dict[str, Any]]) -> list[str]:
    """The worst seed of each figure."""
    left = max(seeds, key=lambda result: result["concept"][1])
    count = next(iter(left["others"].values()))[2]
    low, high = wilson_interval(round(left["concept"][1] * count), count)
    text = f"{100 * left['concept'][1]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    if "floor" in left:
        far = max(abs(result["probability"][1] - result["floor"]) for result in seeds)
        text += f"; probability off by {far:.3f}"
    label, (before, after, _) = max(
        ((label, result["others"][label]) for result in seeds for label in result["neighbours"]),
        key=lambda item: item[1][0] - item[1][1],
    )
    frechet = max((result.get("frechet", [0, 0, 0]) for result in seeds), key=lambda value: value[1])
    steps = [result["steps"] for result in seeds]
    return [
        base, method, pair.replace(":", " → "), f"{sum(result['done'] for result in seeds)} of {len(seeds)}",
        f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else str(steps[0]), text,
        " → ".join(f"{100 * value:.1f}" for value in min((result.get("surrogate", ()) for result in seeds),
                                                         key=lambda pair: pair[1:])),
        f"{max(lost(result, list(result['others'])) for result in seeds):.1f}",
        f"{max(lost(result, result['neighbours']) for result in seeds):.1f}",
        f"{label}: {100 * before:.1f} → {100 * after:.1f}", *(f"{value:.2f}" if value else "" for value in frechet),
        f"{max(result['seconds'] for result in seeds) / 60:.1f}",
    ]  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """A row for each pair, and the means over all pairs and seeds of a base."""
    header = ("base", "selection", "erased", "stopped by itself", "steps", "left, %", "surrogate, %",
              "others lost, points", "neighbours lost", "the worst neighbour", "Fréchet: before", "after",
              "other seeds", "training, core minutes")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, result in results.items():
        rows.setdefault(tuple(key.split("|")[:3]), []).append(result)
    lines += ["| " + " | ".join(cells(*of, seeds)) + " |" for of, seeds in rows.items()]
    for base, method in dict.fromkeys(of[:2] for of in rows):
        mine = [seeds for of, seeds in rows.items() if of[:2] == (base, method)]
        if len(mine) > 1:
            lines.append("| " + " | ".join(means(base, method, len(mine), sum(mine, []))) + " |")
    return "\n".join(lines)


def means(base: str, method: str, pairs: int, results: list[dict[str, Any]]) -> list[str]:
    """Of all runs of several pairs alike."""
    surrogates = [result["surrogate"][1] for result in results if "surrogate" in result]
    frechet = [result["frechet"] for result in results if "frechet" in result]
    return [
        base, method, f"**mean of {pairs}**", f"{sum(result['done'] for result in results)} of {len(results)}",
        f"{mean([result['steps'] for result in results]):.0f}",
        f"{100 * mean([result['concept'][1] for result in results]):.1f}",
        f"{100 * mean(surrogates):.1f}" if surrogates else "",
        f"{mean([lost(result, list(result['others'])) for result in results]):.1f}",
        f"{mean([lost(result, result['neighbours']) for result in results]):.1f}", "",
        *(f"{mean([value[place] for value in frechet]):.2f}" if frechet else "" for place in range(3)),
        f"{mean([result['seconds'] for result in results]) / 60:.1f}",
    ]  # fmt: skip


def verdicts(results: dict[str, Any]) -> str:
    """Of the runs that stopped by themselves, how many a report calls forgotten: one with as many images as are
    measured here, in held-out phrasings, and one with its own number, in held-out and in trained ones."""
    many: dict[str, list[bool]] = {}
    usual: dict[tuple[str, int], list[bool]] = {}
    for key, result in results.items():
        if not result["done"]:
            continue
        base, left, count = key.partition("|")[0], result["concept"][1], next(iter(result["others"].values()))[2]
        many.setdefault(base, []).append(is_gone(round(left * count), count))
        if "report" in result:
            gone = all(is_gone(*counted) for counted in result["report"])
            usual.setdefault((base, result["report"][0][1]), []).append(gone)
    lines = [
        f"{base}: {sum(runs)} of {len(runs)} runs that stopped by themselves are “forgotten” (upper end of the "
        f"interval at most {MOST_LEFT:.0%})"
        for base, runs in many.items()
    ]
    lines += [
        f"{base}: {sum(runs)} of {len(runs)} are by {images} images in held-out and as many in trained phrasings"
        for (base, images), runs in usual.items()
    ]
    return "\n".join(lines)


def is_gone(showing: int, count: int) -> bool:
    return wilson_interval(showing, count)[1] <= MOST_LEFT


def main() -> None:
    args = parse_args()
    results: dict[str, Any] = read_json(args.output) if args.output.is_file() else {}
    name = args.base.partition("=")[0]
    for pair in args.pairs:
        for method in args.methods:
            for seed in args.seeds:
                key = f"{name}|{method}|{pair}|{seed}"
                if key not in results:
                    results[key] = erased(pair, method, seed, args)
                    write_json(args.output, results)
                    print(table({key: results[key]}).splitlines()[-1], results[key]["stopped"], flush=True)
    print(f"\n{table(results)}\n\n{verdicts(results)}")


if __name__ == "__main__":
    main()
