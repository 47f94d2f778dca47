"""What adapters do on the embedded pipeline: ranks against weights, strengths, several at once, a user's own on top.

    python benchmarks/adapters.py --output benchmarks/results/adapters.json

`ranks` trains erasures of three garments, as weights and as adapters; `strengths` switches those of rank 8 between -1
and 1, and draws a picture of one; `several` loads them together, and compares that with one run of all concepts;
`own` loads a plain LoRA that turns garments upside down, as somebody else might have trained it, on top of one. Every
finished row is written at once; the same command goes on where it stopped. Prints Markdown tables.
"""

import argparse
import contextlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from acid import Judge, settings_of
from PIL import Image, ImageDraw, ImageOps

from sa_diffusers.configuration import HISTORY_NAME, SelectiveAmnesiaConfig, base_defaults
from sa_diffusers.data.image_datasets import DEBIAN_FASHION_MNIST, load_labelled_images
from sa_diffusers.erasure import Erasure
from sa_diffusers.families import Objective
from sa_diffusers.families.adapters import ADAPTER_FILE, LowRankAdapter, adapter_layers, save_adapter
from sa_diffusers.files import new_folder, read_json, write_json
from sa_diffusers.models import embedded_pipeline
from sa_diffusers.results.statistics import frechet_distance, moments, wilson_interval

PAIRS = {"sneaker": "dress", "coat": "pullover", "bag": "sandal"}
KINDS: dict[str, dict[str, Any]] = {"weights": {}} | {
    f"rank {rank}": {"adapter": "lora", "lora_rank": rank} for rank in (4, 8, 16)
}
KINDS["rank 8, rows by columns"] = {**KINDS["rank 8"], "fisher_form": "rows_by_columns"}
STRENGTHS = (-1.0, 0.0, 0.5, 1.0)
# The picture's: what is erased, a near and a far neighbour.
SHOWN = ("sneaker", "ankle boot", "trouser")
# Steps of the LoRA that turns garments upside down, its batch, and how many images it is trained on.
OWN_STEPS, OWN_BATCH, OWN_IMAGES = 400, 32, 4000
PARTS = ("ranks", "strengths", "several", "own")
Histograms = dict[str, list[int]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to measure [all]; none: tables")
    parser.add_argument("--concepts", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", default=["full", "xattn"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings that are no defaults")
    parser.add_argument("--images", type=int, default=230, help="of a garment that is erased [230]")
    parser.add_argument("--rest", type=int, default=30, help="of each other garment [30]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", type=Path, default=DEBIAN_FASHION_MNIST, help="Fashion-MNIST, for the own LoRA")
    parser.add_argument("--picture", type=Path, default=Path("docs/adapter_strengths.png"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark/adapters.json"))
    return parser.parse_args()


class Bench:
    """Erasures that are made once, and what has been measured of them.

    Args:
        args: The command line.

    Attributes:
        results: Part -> name of a row -> figures; `keep` writes it.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: dict[str, dict[str, Any]] = read_json(args.output) if args.output.is_file() else {}

    def has(self, part: str, row: str) -> bool:
        return row in self.results.get(part, {})

    def keep(self, part: str, row: str, figures: Mapping[str, Any]) -> None:
        self.results.setdefault(part, {})[row] = dict(figures)
        write_json(self.args.output, self.results)
        print(part, row, "Fréchet", figures.get("frechet"), flush=True)

    def erasure(self, concepts: Sequence[str], method: str, kind: str) -> tuple[Erasure, dict[str, Any]]:
        """An erasure whose base model is as it was, and what its training took; trained if it is not."""
        base, name = str(embedded_pipeline()), "-".join((*concepts, method, *kind.replace(",", "").split()))
        place = self.args.work_dir / "adapters" / name
        config = SelectiveAmnesiaConfig(**{
            **base_defaults({"pretrained_model_name_or_path": base}), "pretrained_model_name_or_path": base,
            "concept": list(concepts), "surrogate": [PAIRS[concept] for concept in concepts], "train_method": method,
            **KINDS[kind], **settings_of(self.args.set), "seed": self.args.seed,
            "artifacts_dir": str(self.args.work_dir / "artifacts"),
            "output_dir": str(place), "report_to": "none",
        })  # fmt: skip
        erasure, told = Erasure(config), place.with_suffix(".json")
        with erasure.holding():
            finished = erasure.finished()
            if not finished:
                surrogates = erasure.surrogates()
                products = erasure.products(surrogates)
                resumed, began = erasure.training_stage.choice().step > 0, time.process_time()
                training = erasure.training_stage.run(surrogates, *products)
                # Of a training that was stopped and goes on, nobody knows the whole.
                seconds = None if resumed else round(time.process_time() - began, 1)
                verdict = training.controller.verdict
                files = [place / ADAPTER_FILE] if config.adapter else (place / "unet").glob("*.safetensors")
                write_json(told, {
                    "steps": read_json(place / HISTORY_NAME)[-1]["step"], "seconds": seconds, "done": verdict.done,
                    "stopped": verdict.sentence, "bytes": sum(file.stat().st_size for file in files),
                })  # fmt: skip
        return (erasure, read_json(told)) if finished else self.erasure(concepts, method, kind)

    def judge(self, erasure: Erasure, objective: Objective | None = None) -> Judge:
        """Of the base model, or of another in its place."""
        judge = Judge(erasure, self.args.work_dir / "adapters" / "base")
        judge.objective = objective or judge.objective
        return judge

    def recognised(self, judge: Judge, concepts: Sequence[str], base: bool = False, shift: int = 0) -> dict[str, Any]:
        """As what each garment's images are recognised, and the distance of all others' to real images."""
        found = {label: judge(label, self.args.images if label in concepts else self.args.rest, base, shift)
                 for label in judge.labels}  # fmt: skip
        others = [label for label in judge.labels if label not in concepts]
        reference = judge.classifier.reference_moments([judge.classifier.label_of(label) for label in others])
        features = torch.cat([found[label]["features"] for label in others])
        return {
            "recognised": {label: histogram(judge, value["probabilities"]) for label, value in found.items()},
            "frechet": frechet_distance(moments(features), reference),
        }

    def base(self, judge: Judge, concepts: Sequence[str]) -> None:
        """The base model's own figures, and once those of other seeds, which show what chance does."""
        for shift in (0, 1) if concepts == [SHOWN[0]] else (0,):
            row = "-".join(concepts) + " other seeds" * shift
            if not self.has("base", row):
                self.keep("base", row, self.recognised(judge, concepts, base=True, shift=shift))


def histogram(judge: Judge, probabilities: torch.Tensor) -> list[int]:
    """How many images are taken for each label, in the order of the classifier's."""
    return probabilities.argmax(-1).bincount(minlength=len(judge.classifier.labels)).tolist()


@contextlib.contextmanager
def loaded(objective: Objective, folders: Mapping[str, Path]) -> Iterator[Any]:
    """The pipeline with adapters in it, as plain diffusers loads them, each at full strength."""
    pipeline: Any = objective.pipeline  # type: ignore[attr-defined]
    for name, folder in folders.items():
        pipeline.load_lora_weights(folder, weight_name=ADAPTER_FILE, adapter_name=name)
    if folders:
        pipeline.set_adapters(list(folders), [1.0] * len(folders))
    try:
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


# --- ranks and selections ----------------------------------------------------------------------------------------


def ranks(bench: Bench) -> None:
    for kind in bench.args.kinds:
        for concept in bench.args.concepts:
            for method in bench.args.methods:
                row = f"{concept}|{method}|{kind}"
                if not bench.has("ranks", row):
                    erasure, told = bench.erasure([concept], method, kind)
                    bench.base(bench.judge(erasure), [concept])
                    judge = bench.judge(erasure, erasure.erased())
                    bench.keep("ranks", row, {**told, **bench.recognised(judge, [concept])})


# --- strengths ---------------------------------------------------------------------------------------------------


def strengths(bench: Bench) -> None:
    for concept in bench.args.concepts:
        rows = [f"{concept}|{strength:g}" for strength in STRENGTHS]
        if all(bench.has("strengths", row) for row in rows) and (concept != SHOWN[0] or bench.args.picture.is_file()):
            continue
        erasure, _ = bench.erasure([concept], "full", "rank 8")
        judge, drawn = bench.judge(erasure), []
        bench.base(judge, [concept])
        plain = samples(judge, concept)
        with loaded(erasure.objective, {"erasure": erasure.output_dir}) as pipeline:
            for row, strength in zip(rows, STRENGTHS, strict=True):
                pipeline.set_adapters("erasure", strength)
                if concept == SHOWN[0]:
                    drawn.append([picture for label in SHOWN for picture in judge.pictures(label, 6)])
                if not bench.has("strengths", row):
                    is_base = torch.equal(samples(judge, concept), plain)
                    # What is the same model need not be measured twice.
                    known = bench.results["base"][concept] if is_base else None
                    known = bench.results.get("ranks", {}).get(f"{concept}|full|rank 8") if strength == 1 else known
                    figures = known or bench.recognised(judge, [concept])
                    kept = {name: figures[name] for name in ("recognised", "frechet")}
                    bench.keep("strengths", row, {"is_base": is_base, **kept})
        if drawn:
            sheet(drawn).save(bench.args.picture, optimize=True)


def samples(judge: Judge, label: str) -> torch.Tensor:
    return judge.objective.sample([label] * 32, range(32), judge.subject.settings)


def sheet(drawn: list[list[Image.Image]], size: int = 48, left: int = 96, top: int = 20) -> Image.Image:
    """A line for each strength, a block of columns for each of `SHOWN`."""
    columns, gap = len(drawn[0]), size // 4
    block = columns // len(SHOWN)
    image = Image.new("RGB", (left + columns * size + gap * len(SHOWN), top + len(drawn) * size), "white")
    draw = ImageDraw.Draw(image)
    for place, label in enumerate(SHOWN):
        draw.text((left + place * (block * size + gap), 4), f'"{label}"', "black")
    for line, (strength, pictures) in enumerate(zip(STRENGTHS, drawn, strict=True)):
        draw.text((4, top + line * size + size // 2 - 6), f"strength {strength:g}", "black")
        for column, picture in enumerate(pictures):
            place = (left + column * size + column // block * gap, top + line * size)
            image.paste(picture.convert("RGB").resize((size, size), Image.Resampling.NEAREST), place)
    return image


# --- several -----------------------------------------------------------------------------------------------------


def several(bench: Bench) -> None:
    every = list(PAIRS)
    for method in bench.args.methods:
        for concepts in (every[:2], every):
            together(bench, concepts, method)
        row = f"{'-'.join(every)}|{method}|one run"
        if not bench.has("several", row):
            erasure, told = bench.erasure(every, method, "rank 8")
            bench.base(bench.judge(erasure), every)
            judge = bench.judge(erasure, erasure.erased())
            bench.keep("several", row, {**told, **bench.recognised(judge, every)})


def together(bench: Bench, concepts: Sequence[str], method: str) -> None:
    """Adapters of one concept each, at full strength."""
    row = f"{'-'.join(concepts)}|{method}|loaded together"
    if not bench.has("several", row):
        made = {concept: bench.erasure([concept], method, "rank 8")[0] for concept in concepts}
        erasure = made[concepts[0]]
        with loaded(erasure.objective, {name: each.output_dir for name, each in made.items()}):
            bench.keep("several", row, bench.recognised(bench.judge(erasure), list(PAIRS)))


# --- a user's own ------------------------------------------------------------------------------------------------


def own(bench: Bench) -> None:
    concept = SHOWN[0]
    erasure, _ = bench.erasure([concept], "full", "rank 8")
    judge, labels = bench.judge(erasure), bench.judge(erasure).labels
    kept = [label for label in labels if label != concept]
    for name, taught in (("", []), ("of all others", kept), ("of all", labels)):
        folders = {}
        if name:
            folders["own"] = bench.args.work_dir / "adapters" / f"own {name}".replace(" ", "-")
            if not folders["own"].is_dir():
                train_own(erasure, taught, folders["own"], bench.args)
        for erased in (False, True):
            row = f"{name}|{'erased' if erased else 'base'}"
            if not bench.has("own", row):
                with loaded(erasure.objective, {**folders, **({"erasure": erasure.output_dir} if erased else {})}):
                    bench.keep("own", row, both_ways(judge, concept, bench.args))


def train_own(erasure: Erasure, labels: Sequence[str], folder: Path, args: argparse.Namespace) -> None:
    """A plain LoRA, without Fisher information or replay, on real images that stand on their heads."""
    objective, templates = erasure.objective, erasure.config.concept_templates
    names = Judge(erasure, folder).labels
    images = load_labelled_images(args.data_dir)
    left_out = [str(names.index(name)) for name in names if name not in labels]
    images = (images.without(left_out) if left_out else images).fitted(objective.resolution, 3)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:OWN_IMAGES]
    pixels = images.pixels[chosen].flip(2).float() / 127.5 - 1
    latents = torch.cat([objective.encode_images(part, args.seed) for part in pixels.split(500)])
    words = [names[index] for index in images.labels[chosen]]
    module = objective.module
    layers = adapter_layers(module, objective.select("full"))
    adapter = LowRankAdapter(module, layers.sizes, 8, args.seed)
    optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=2e-3)
    generator, chance = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    for step in range(OWN_STEPS):
        rows = torch.randint(len(latents), (OWN_BATCH,), generator=generator)
        prompts = [chance.choice(templates).format(words[row]) if chance.random() > 0.1 else "" for row in rows]
        timesteps = torch.randint(objective.num_train_timesteps, (OWN_BATCH,), generator=generator)
        noise = objective.draw_noise(latents[rows], generator)
        with torch.no_grad():
            conditions = objective.encode_prompts(prompts)
        loss = objective.negative_elbo(module, latents[rows], conditions, timesteps, noise).mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / OWN_STEPS)
        optimizer.step()
        optimizer.zero_grad()
    state = adapter.state()
    adapter.remove()
    with new_folder(folder) as staging:
        save_adapter(objective, state, 8, staging, {})


def both_ways(judge: Judge, concept: str, args: argparse.Namespace) -> dict[str, Any]:
    """As what images are recognised as they are, and turned upside down."""
    found: dict[str, Histograms] = {"recognised": {}, "turned": {}}
    for label in judge.labels:
        pictures = judge.pictures(label, args.images if label == concept else args.rest)
        turned = [ImageOps.flip(picture) for picture in pictures]
        for way, seen in (("recognised", pictures), ("turned", turned)):
            found[way][label] = histogram(judge, judge.classifier(seen).probabilities)
    return found


# --- tables ------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)) + "\n"


class Reader:
    """Figures as text; labels are in the classifier's order, which is that of the histograms.

    Args:
        results: As of `Bench`.
    """

    def __init__(self, results: dict[str, dict[str, Any]]) -> None:
        self.results = results
        self.labels = list(next(iter(results["base"].values()))["recognised"])

    def share(self, histograms: Histograms, asked: str, taken: str) -> str:
        counts = histograms[asked]
        count, whole = counts[self.labels.index(taken)], sum(counts)
        low, high = wilson_interval(count, whole)
        return f"{100 * count / whole:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def kept(self, histograms: Histograms, without: Sequence[str]) -> float:
        """Mean share of the others that are recognised, in per cent."""
        shares = [100 * histograms[label][self.labels.index(label)] / sum(histograms[label])
                  for label in self.labels if label not in without]  # fmt: skip
        return sum(shares) / len(shares)

    def ranks(self) -> str:
        lines = []
        whole = sum(file.stat().st_size for file in (embedded_pipeline() / "unet").glob("*.safetensors"))
        order = list(KINDS)
        keys = sorted((key.split("|") for key in self.results["ranks"]),
                      key=lambda key: (list(PAIRS).index(key[0]), key[1], order.index(key[2])))  # fmt: skip
        for concept, method, kind in keys:
            row, before = self.results["ranks"]["|".join((concept, method, kind))], self.results["base"][concept]
            lines.append([
                f"{concept} → {PAIRS[concept]}", method, kind, self.share(row["recognised"], concept, concept),
                self.share(row["recognised"], concept, PAIRS[concept]),
                f"{self.kept(row['recognised'], [concept]):.1f}",
                f"{self.kept(before['recognised'], [concept]):.1f}",
                f"{row['frechet']:.2f}", f"{before['frechet']:.2f}", str(row["steps"]),
                "" if row["seconds"] is None else f"{row['seconds']:.0f}",
                f"{row['bytes'] / 1e6:.2f} MB ({100 * row['bytes'] / whole:.1f} %)",
            ])  # fmt: skip
        header = ("erased", "selection", "trained", "recognised, %", "as surrogate, %", "other nine, %", "before",
                  "Fréchet", "before", "steps", "training, core seconds", "file, of the UNet's")  # fmt: skip
        return table(header, lines)

    def strengths(self) -> str:
        lines = []
        for key, row in self.results["strengths"].items():
            concept, strength = key.split("|")
            own = row["recognised"]
            lines.append([f"{concept} → {PAIRS[concept]}", strength, self.share(own, concept, concept),
                          self.share(own, concept, PAIRS[concept]), f"{self.kept(own, [concept]):.1f}",
                          f"{row['frechet']:.2f}", "yes" if row["is_base"] else "no"])  # fmt: skip
        return table(["erased", "strength", "recognised, %", "as surrogate, %", "other nine, %", "Fréchet",
                      "the base model's samples, bit by bit"], lines)  # fmt: skip

    def several(self) -> str:
        every, lines = list(PAIRS), []
        rows = {"none||base model": self.results["base"]["-".join(every)], **self.results["several"]}
        for key, row in rows.items():
            concepts, method, how = key.split("|")
            lines.append([concepts.replace("-", ", "), method, how,
                          *(self.share(row["recognised"], concept, concept) for concept in every),
                          f"{self.kept(row['recognised'], every):.1f}", f"{row['frechet']:.2f}"])  # fmt: skip
        return table(["erased", "selection", "how", *(f"{concept}, %" for concept in every), "other seven, %",
                      "Fréchet"], lines)  # fmt: skip

    def own(self) -> str:
        concept, lines = SHOWN[0], []
        for key, row in self.results["own"].items():
            name, model = key.split("|")
            told = f"trained on upturned images {name}" if name else "none"
            cells = [told, "with it" if model == "erased" else "without"]
            for way in ("recognised", "turned"):
                cells += [self.share(row[way], concept, concept), f"{self.kept(row[way], [concept]):.1f}"]
            lines.append(cells)
        header = ("own LoRA", "erasure", f"{concept}, upright, %", "other nine, upright, %",
                  f"{concept}, upside down, %", "other nine, upside down, %")  # fmt: skip
        return table(header, lines)


def main() -> None:
    args = parse_args()
    bench = Bench(args)
    for part in args.parts:
        {"ranks": ranks, "strengths": strengths, "several": several, "own": own}[part](bench)
    reader = Reader(bench.results)
    for part in PARTS:
        if part in bench.results:
            print(f"\n{part}\n\n{getattr(reader, part)()}")


if __name__ == "__main__":
    main()
