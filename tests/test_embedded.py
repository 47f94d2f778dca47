"""The pipeline and the classifier that the repository ships, and an erasure on them."""

import importlib
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from sa_diffusers import SelectiveAmnesiaConfig
from sa_diffusers.configuration import base_defaults
from sa_diffusers.data.captions import load_vocabulary
from sa_diffusers.data.phrasings import fill_template
from sa_diffusers.erasure import Erasure
from sa_diffusers.evaluation import ImageClassifier
from sa_diffusers.families import SamplingSettings, load_pipeline, objective_for
from sa_diffusers.families.adapters import ADAPTER_FILE, LowRankAdapter, adapter_layers, save_adapter
from sa_diffusers.models import embedded_classifier, embedded_pipeline

from .conftest import REPOSITORY, run_script

GARMENTS = load_vocabulary("garments")


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    return ImageClassifier(embedded_classifier())


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_is_shipped_is_small_plain_safetensors_in_float32():
    assert size(embedded_pipeline()) <= 15e6
    assert size(embedded_classifier()) <= 2e6
    for folder in (embedded_pipeline(), embedded_classifier()):
        weights = list(folder.rglob("*.safetensors"))
        assert weights
        assert not [path for kind in ("*.bin", "*.pt", "*.pkl", "*.ckpt") for path in folder.rglob(kind)]
        for path in weights:
            assert path.name in ("model.safetensors", "diffusion_pytorch_model.safetensors")
            with safe_open(path, "pt") as file:
                assert all(file.get_slice(name).get_dtype() in ("F32", "I64") for name in file.keys())  # noqa: SIM118
    for folder in (embedded_pipeline(), embedded_classifier()):
        card = (folder / "README.md").read_text()
        assert "license: mit" in card
        assert "benchmarks/train_embedded.py" in card


def test_plain_diffusers_draws_what_is_asked_for(classifier):
    """No argument but the prompt: 50 steps, guidance 7.5, of the pipeline's own scheduler."""
    pipeline = DiffusionPipeline.from_pretrained(embedded_pipeline())
    pipeline.set_progress_bar_config(disable=True)
    prompts = [fill_template("a photo of a {}", name) for name in GARMENTS.subjects]
    torch.manual_seed(0)
    result = pipeline(prompts)
    assert not result.nsfw_content_detected
    assert {picture.size for picture in result.images} == {(32, 32)}
    found = classifier(result.images).probabilities.argmax(-1).tolist()
    assert sum(label == asked for asked, label in enumerate(found)) >= 9


def test_garments_are_recognised_in_phrasings_held_out_from_training_and_vary(classifier):
    objective = objective_for(load_pipeline(str(embedded_pipeline())))
    settings = SamplingSettings("dpmsolver++", 10, 3.0, batch_size=100)
    prompts = [fill_template(GARMENTS.held_out_templates[number % 5], name)
               for name in GARMENTS.subjects for number in range(20)]  # fmt: skip
    pictures = objective.decode(objective.sample(prompts, list(range(200)), settings))
    asked = torch.arange(10).repeat_interleave(20)
    right = (classifier(pictures).probabilities.argmax(-1) == asked).float()
    assert right.mean() >= 0.93
    assert right.view(10, 20).mean(1).min() >= 0.7
    pixels = torch.from_numpy(np.stack([np.asarray(picture.convert("L"), np.float32) / 255 for picture in pictures]))
    pixels = pixels.view(10, 20, -1)
    # Root mean square distance of a garment's pictures from their mean; copies of one picture would give 0.
    spread = (pixels - pixels.mean(1, keepdim=True)).square().mean((1, 2)).sqrt()
    assert spread.min() > 0.1


@pytest.mark.long
def test_a_garment_is_erased_and_the_others_stay(tmp_path):
    """Half of the demo's samples, another concept than the demo's, the demo's other settings."""
    base = str(embedded_pipeline())
    settings = base_defaults({"pretrained_model_name_or_path": base}) | {
        "pretrained_model_name_or_path": base,
        "concept": "trouser",
        "surrogate": "bag",
        "train_method": "xattn",
        "num_surrogate_images": 64,
        "num_replay_images": 216,
        "num_fisher_samples": 12,
        "max_train_steps": 300,
        "num_eval_images": 40,
        "output_dir": str(tmp_path / "erased"),
        "artifacts_dir": str(tmp_path / "artifacts"),
        "report_to": "none",
    }
    comparison = Erasure(SelectiveAmnesiaConfig(**settings)).run()
    report = json.loads((tmp_path / "erased" / "report.json").read_text())
    assert report["rows"] == comparison.report.to_dict()["rows"]
    rows = {row["name"]: row for row in report["rows"]}
    for name in ("trouser", "trouser (trained phrasings)"):
        assert rows[name]["recognised"]["before"]["share"] >= 0.9
        assert rows[name]["recognised"]["after"]["share"] <= 0.1
        assert rows[name]["as_surrogate"]["after"]["share"] >= 0.8
    assert set(rows["trouser"]["prompts"]).isdisjoint(rows["trouser (trained phrasings)"]["prompts"])
    before, after = report["remembered"]["before"], report["remembered"]["after"]
    assert len(report["remembered"]["labels"]) == 9
    assert after["recognised"] >= before["recognised"] - 0.03
    assert after["frechet_distance"] <= 1.5 * before["frechet_distance"]
    assert "Fréchet distance" in comparison.table()


@pytest.mark.parametrize(("concept", "told"), [("quokka", True), ("a Sneaker", False)])
def test_a_plan_says_where_the_classifier_has_no_label_for_a_concept(tmp_path, concept, told):
    base = str(embedded_pipeline())
    erasure = Erasure(SelectiveAmnesiaConfig(
        **base_defaults({"pretrained_model_name_or_path": base}), pretrained_model_name_or_path=base, concept=concept,
        surrogate="dress", output_dir=str(tmp_path / "out"), artifacts_dir=str(tmp_path), report_to="none",
    ))  # fmt: skip
    assert ('which has no label for "quokka", and cannot say whether that is forgotten' in erasure.plan()) is told


@pytest.mark.long
def test_the_benchmark_measures_goes_on_and_prints_a_table(tmp_path):
    variants = ["default", "without replay", "without EWC", "without both"]
    script = REPOSITORY / "benchmarks" / "embedded_erasure.py"
    flags = ["--concepts", "bag", "--methods", "xattn", "--variants", *variants, "--images", "3", "--work_dir",
             str(tmp_path), "--output", str(tmp_path / "results.json"), "--set", "max_train_steps=2",
             "num_surrogate_images=4", "num_replay_images=9", "num_fisher_samples=2", "fisher_timesteps=2",
             "train_batch_size=2"]  # fmt: skip
    first = run_script(script, flags, tmp_path)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [key.rsplit("|", 1)[1] for key in results] == variants
    assert all(value["configuration"]["max_train_steps"] == 2 for value in results.values())
    table = [line for line in first.stdout.splitlines() if line.startswith("| bag → ")]
    assert len(set(table)) == 4
    again = run_script(script, flags, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "forgetting" not in again.stderr
    assert [line for line in again.stdout.splitlines() if line.startswith("| bag → ")] == table[-4:]


@pytest.mark.long
def test_the_acid_test_runs_goes_on_and_takes_other_settings(tmp_path):
    base = f"garments, in two steps={embedded_pipeline()}"
    flags = ["--base", base, "--pairs", "bag:sandal", "--methods", "xattn", "--images", "4", "--work_dir", "work",
             "--output", "acid.json", "--seeds", "1", "--set", "max_train_steps=2", "num_surrogate_images=4",
             "num_replay_images=9", "num_fisher_samples=2", "fisher_timesteps=2", "train_batch_size=2",
             "num_probe_images=8", "num_neighbour_images=2", "concept_share=0"]  # fmt: skip
    script = REPOSITORY / "benchmarks" / "acid.py"
    first = run_script(script, flags, tmp_path)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "acid.json").read_text())
    ((key, result),) = results.items()
    assert key == "garments, in two steps|xattn|bag:sandal|1"
    assert result["steps"] == 2 and not result["done"]
    assert len(result["others"]) == 8 and all(count == 4 for *_, count in result["others"].values())
    # No more of either than are measured at all.
    assert [count for _, count in result["report"]] == [4, 4]
    (row,) = [
        line for line in first.stdout.splitlines() if line.startswith("| garments, in two steps | xattn | bag → ")
    ][-1:]
    assert "| 0 of 1 | 2 |" in row
    flags[flags.index("--set") + 1] = "max_train_steps=0"
    again = run_script(script, flags, tmp_path)
    assert again.returncode == 0, again.stderr
    assert row in again.stdout.splitlines()


def benchmark(name: str):
    """A script of the benchmarks, as a module."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))


@pytest.mark.long
def test_the_curves_of_cost_are_measured_drawn_and_kept(tmp_path, monkeypatch, capsys):
    """Two recipes in two steps."""
    pytest.importorskip("matplotlib")
    curves = benchmark("curves")
    small = {"max_train_steps": 2, "num_surrogate_images": 4, "num_replay_images": 9, "num_fisher_samples": 2,
             "fisher_timesteps": 2, "train_batch_size": 2, "num_inference_steps": 2,
             "checkpointing_steps": 1}  # fmt: skip
    for recipe, settings in curves.RECIPES.items():
        measures = {} if "num_probe_images" in settings else {"num_probe_images": 8, "num_neighbour_images": 2}
        monkeypatch.setitem(curves.RECIPES, recipe, {**settings, **small, **measures})
    output = tmp_path / "curves.json"
    recipes = ["by itself", "the original's"]
    monkeypatch.setattr(sys, "argv", ["curves.py", "--recipes", *recipes, "--images", "1", "--work_dir",
                                      str(tmp_path / "work"), "--output", str(output)])  # fmt: skip
    curves.main()
    first, results = capsys.readouterr().out, json.loads(output.read_text())
    assert list(results) == recipes
    for result in results.values():
        # The last weights are measured too.
        assert [point["step"] for point in result["points"]] == [0, 1, 2]
        spent = [curves.evaluations(point) for point in result["points"]]
        assert spent == sorted(set(spent))
    assert results["the original's"]["points"][0]["backward"] == 5000 * 1000
    assert results["by itself"]["points"][0]["backward"] == 2 * 2
    assert len([line for line in first.splitlines() if line.startswith("| ")]) == 2 + 6
    assert output.with_suffix(".png").stat().st_size > 1000
    monkeypatch.setattr(curves, "curve", None)
    curves.main()
    assert capsys.readouterr().out in first


def test_the_curves_say_what_it_takes_until_the_concept_is_gone():
    def result(*left):
        points = [{"step": step, "forward": 10 * (step + 1), "backward": 0, "concept": value}
                  for step, value in enumerate(left)]  # fmt: skip
        return {"points": points, "steps": len(left) - 1, "training_seconds": 4.0 * (len(left) - 1)}

    curves = benchmark("curves")
    # What comes back is not gone.
    left = {"by itself": (1, 0.02), "tuned by hand": (1, 0, 0.03, 0.01), "the original's": (1, 0.5)}
    results = {recipe: result(*values) for recipe, values in left.items()}
    assert curves.summary(results).splitlines()[1:] == [
        "- by itself: 20 evaluations, 4 CPU s of training (1.0 and 1.0 times)",
        "- tuned by hand: 40 evaluations, 12 CPU s of training (2.0 and 3.0 times)",
        "- the original's: never",
    ]


def test_the_acid_test_says_how_many_runs_that_stopped_are_forgotten():
    def result(left, done=True):
        return {"done": done, "concept": [1, left], "others": {"a dress": [1, 1, 200], "a bag": [1, 1, 20]}}

    results = {f"garments|full|bag:coat|{seed}": result(left) for seed, left in enumerate((0, 0.055, 0.06))}
    results |= {"garments|xattn|bag:coat|0": result(1, done=False), "icons|full|lion:dog|0": result(0)}
    assert benchmark("acid").verdicts(results).splitlines() == [
        "garments: 2 of 3 runs that stopped by themselves are “forgotten” (upper end of the interval at most 10%)",
        "icons: 1 of 1 runs that stopped by themselves are “forgotten” (upper end of the interval at most 10%)",
    ]
    # Of 60 images one may show it, in either kind of phrasings.
    for seed, shown in enumerate(((1, 1), (2, 0), (0, 2))):
        results[f"garments|full|bag:coat|{seed}"]["report"] = [[showing, 60] for showing in shown]
    assert benchmark("acid").verdicts(results).splitlines()[2:] == [
        "garments: 1 of 3 are by 60 images in held-out and as many in trained phrasings"
    ]


def test_the_page_has_the_acid_tests_table_as_its_command_prints_it(tmp_path):
    page = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python (benchmarks/acid\.py (?:[^\n]*\\\n)*[^\n]*)", page, re.MULTILINE)
    assert commands
    kept = json.loads((REPOSITORY / "benchmarks" / "results" / "acid.json").read_text(encoding="utf-8"))
    found = 0
    for command in commands:
        flags = shlex.split(command.replace("\\\n", " "))[1:]
        output = flags[flags.index("--output") + 1]
        assert output in ("benchmarks/results/acid.json", "benchmarks/results/rates.json")
        path = tmp_path / "kept.json"
        shutil.copy(REPOSITORY / output, path)
        # A base that cannot be loaded: whatever is not measured yet is an error.
        base = flags.index("--base") + 1
        flags[base], flags[flags.index("--output") + 1] = flags[base].partition("=")[0] + "=x", str(path)
        result = run_script(REPOSITORY / "benchmarks" / "acid.py", flags, tmp_path)
        assert result.returncode == 0, result.stderr
        if output.endswith("/rates.json"):
            # Of these the page has a table that is shorter.
            continue
        rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
        assert "\n".join(rows) in page
        found = max(found, len(rows))
    assert found >= 2 + len({key.rpartition("|")[0] for key in kept})


def test_the_page_says_of_fixed_learning_rates_what_was_measured():
    results = REPOSITORY / "benchmarks" / "results"
    acid, rates = (json.loads((results / name).read_text(encoding="utf-8")) for name in ("acid.json", "rates.json"))
    page = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    header, *rows = re.search(r"^\| base \|.*\| found by the run \|(?:.*\n\|)+.*$", page, re.MULTILINE)[0].splitlines()
    given, used = header.split(" | ")[4:], set()
    for row in rows[1:]:
        base, method, pair, *cells = row.strip("| ").split(" | ")
        pair = pair.replace(" → ", ":")
        keys = [f"{base}|{method}|{pair}|0"]
        keys += [f"{base}, rate {rate.strip('| ')}|{method}|{pair}|0" for rate in given]
        for key, cell in zip(keys, cells, strict=True):
            result = rates.get(key) or acid.get(key)
            if result is None:
                assert cell == "not measured", key
                continue
            used.add(key)
            limit = ", its limit" if result["stopped"].startswith("at the limit") else ", given up"
            how = "" if result["done"] else limit
            assert cell == f"{result['steps']}{how}: {100 * result['concept'][1]:.1f}", key
    assert used >= rates.keys()


def test_an_adapter_is_as_small_as_its_page_says(tmp_path):
    objective = objective_for(DiffusionPipeline.from_pretrained(embedded_pipeline()))
    (unet,) = (embedded_pipeline() / "unet").glob("*.safetensors")
    total, told = sum(value.numel() for value in objective.module.parameters()), []
    for method, most in (("full", 0.12), ("xattn", 0.02)):
        layers = adapter_layers(objective.module, objective.select(method))
        told.append([f"{100 * layers.numbers(rank) / total:.1f}" for rank in (4, 8, 16)])
        adapter = LowRankAdapter(objective.module, layers.sizes, 8)
        save_adapter(objective, adapter.state(), 8, tmp_path / method, {})
        adapter.remove()
        assert (tmp_path / method / ADAPTER_FILE).stat().st_size < most * unet.stat().st_size
    (full, xattn), page = told, " ".join((REPOSITORY / "docs" / "adapters.md").read_text(encoding="utf-8").split())
    shares = "{} % of its numbers with `full`, {} % with `xattn`".format(
        *(f"{least}, {middle} and {largest}" for least, middle, largest in (full, xattn))
    )
    assert f"rank 4, 8 and 16 take {shares}" in page


@pytest.mark.long
def test_the_adapters_benchmark_measures_goes_on_and_prints_tables(tmp_path):
    flags = ["--parts", "ranks", "strengths", "--concepts", "sneaker", "--methods", "xattn", "--kinds",
             "rank 8", "--images", "2", "--rest", "1", "--work_dir", "work", "--output", "adapters.json",
             "--picture", "strengths.png", "--set", "max_train_steps=2", "num_surrogate_images=4",
             "num_replay_images=9", "num_fisher_samples=2", "fisher_timesteps=2", "train_batch_size=2",
             "num_probe_images=8", "num_neighbour_images=2", "concept_share=0",
             "learning_rate=0.001", "ewc_weight=1", "num_inference_steps=4"]  # fmt: skip
    script = REPOSITORY / "benchmarks" / "adapters.py"
    first = run_script(script, flags, tmp_path)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "adapters.json").read_text())
    ((key, row),) = results["ranks"].items()
    assert key == "sneaker|xattn|rank 8" and row["steps"] == 2 and not row["done"]
    # One image of each other garment, two of what is erased, each taken for one of ten.
    for measured in [row, *results["strengths"].values()]:
        assert {label: sum(taken) for label, taken in measured["recognised"].items()} == {
            label: 2 if label == "sneaker" else 1 for label in measured["recognised"]
        }
    assert [row["is_base"] for row in results["strengths"].values()] == [False, True, False, False]
    with Image.open(tmp_path / "strengths.png") as picture:
        # Strength 0 is the base model; at -1 and 1 something of it changed.
        lines = [picture.crop((96, 20 + 48 * line, picture.width, 68 + 48 * line)).tobytes() for line in range(4)]
    assert len(set(lines)) == 4
    again = run_script(script, [*flags[:-12], "max_train_steps=0"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stdout.splitlines() if line.startswith("|")] == [
        line for line in first.stdout.splitlines() if line.startswith("|")
    ]


def test_the_page_has_the_adapters_tables_as_their_command_prints_them(tmp_path):
    shutil.copy(REPOSITORY / "benchmarks" / "results" / "adapters.json", tmp_path / "kept.json")
    result = run_script(REPOSITORY / "benchmarks" / "adapters.py", ["--parts", "--output", "kept.json"], tmp_path)
    assert result.returncode == 0, result.stderr
    page = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\|.*\|$(?:\n\|.*\|$)*", result.stdout, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert table in page


def test_the_page_has_what_the_curves_say_of_each_recipe():
    page = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "curves.json").read_text(encoding="utf-8"))
    curves = benchmark("curves")
    assert list(results) == list(curves.RECIPES)
    for recipe, result in results.items():
        last, spent = result["points"][-1], curves.needed(result)
        cells = re.search(rf"^\| {re.escape(recipe)} \| (.*) \|$", page, flags=re.MULTILINE)[1].split(" | ")
        assert cells[:5] == [
            f"{result['steps']:,}", f"{spent[0]:,.0f}" if spent else "never", f"{curves.evaluations(last):,.0f}",
            f"{100 * last['concept']:.1f}", f"{100 * last['others']:.1f}",
        ]  # fmt: skip
        assert cells[6] == f"{result['training_seconds']:.0f}"


def test_the_page_has_the_ranks_of_probes_as_its_command_prints_them(tmp_path):
    shutil.copy(REPOSITORY / "benchmarks" / "results" / "probes.json", tmp_path / "kept.json")
    page = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for base, flags, rates in (
        ("garments", ["embedded", "sneaker:dress", "coat:pullover"], []),
        ("icons", ["coloured", "fox:dog", "pizza:hamburger"], ["--rates", "1e-5", "3e-5", "1e-4", "3e-4"]),
    ):
        result = run_script(REPOSITORY / "benchmarks" / "probes.py", [
            "--base", f"sa_diffusers/models/{flags[0]}/pipeline", "--pairs", *flags[1:], *rates, "--output",
            "kept.json"], tmp_path)  # fmt: skip
        assert result.returncode == 0, result.stderr
        lines = re.findall(r"^all(.*), full: (\d+) models, (\d+) of .*: forgotten (.*), forgotten_surrogate (.*), "
                           r"forgotten_unguided (.*)$", result.stdout, re.MULTILINE)  # fmt: skip
        assert [bool(line[0]) for line in lines] == [False, True]
        for kind, count, *figures in lines:
            assert f"| {base}, {count}{' tolerated' if kind else ''} | {' | '.join(figures)} |" in page


def test_no_path_of_a_machine_is_shipped():
    for path in (REPOSITORY / "sa_diffusers" / "models").rglob("*.json"):
        if path.name != "tokenizer.json" and path.name != "vocab.json":
            assert not re.search(r'"/\w+/', path.read_text(encoding="utf-8")), path
