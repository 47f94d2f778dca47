"""Publishing: what a model card says, what goes up, and what comes down again, over a real connection."""

import json
import os
import re
import shlex
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sa_diffusers import FisherInformation
from sa_diffusers.commands.erase import parse_config
from sa_diffusers.configuration import ENDING_NAME, FISHER_CONFIG_NAME, GRID_NAME, HISTORY_NAME, REPORT_NAME
from sa_diffusers.erasure import Erasure
from sa_diffusers.evaluation import comparison
from sa_diffusers.evaluation.erased import recorded_ending
from sa_diffusers.families import Family, register, registry
from sa_diffusers.files import read_json, write_json
from sa_diffusers.hub import (
    CARD_MARKER,
    drop_local_names,
    published_files,
    repository_name,
    without_local_paths,
    without_local_values,
)
from sa_diffusers.output_folder import weights_in
from sa_diffusers.publish import build_model_card, write_model_card
from sa_diffusers.publish.facts import read_facts

from .conftest import BASE_NAME, REPOSITORY
from .hub_server import CUT, Fault, HubServer, card_errors
from .nursery import LIBRARIES, forked, forked_code
from .test_class_models import tiny_vae
from .test_train_script import quick, run

TOKEN = "hf_secret"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def online(hub: HubServer, cache: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(cache), **more}  # fmt: skip


PUSH = REPOSITORY / "examples" / "push_to_hub.py"


def push(hub, folder, tmp_path, *flags):
    return forked(PUSH, [folder, *flags], REPOSITORY, online(hub, tmp_path / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def erased_once(tiny_folder, tmp_path_factory) -> Path:
    """A whole erasure by the function that the command runs, with checkpoints and logs."""
    folder = tmp_path_factory.mktemp("erased") / "no-brad"
    flags = {"output_dir": folder, "checkpointing_steps": 2, "logging_dir": "runs"}
    result = run(quick(tiny_folder, **flags), folder.parent)
    assert result.returncode == 0, result.stderr
    assert f"card      {folder / 'README.md'}" in result.stdout
    return folder


@pytest.fixture
def erased(erased_once, tmp_path) -> Path:
    return Path(shutil.copytree(erased_once, tmp_path / "no-brad"))


# The card


def pipeline_index(folder: Path, **changes) -> Path:
    index = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"], **changes}
    write_json(folder / "model_index.json", index)
    return folder


def share(value: float) -> dict:
    return {"share": value, "interval": [max(0, value - 0.1), min(1, value + 0.1)]}


def scores(before: float, after: float) -> dict:
    return {time: {"count": 4, "sum": 4 * mean, "mean": mean, "std": 0.1, "values": [mean] * 4}
            for time, mean in (("before", before), ("after", after))}  # fmt: skip


def row(name: str, role: str, before: float, after: float, **more) -> dict:
    return {"name": name, "role": role, "images": 4, "prompts": [f"a photo of {name}"], "seeds": [[0, 3]],
            "change": {"rmse": 0.1, "rmse_between_seeds": 0.2, "relative": 0.5}, "black": {"before": 0, "after": 1},
            "recognised": {"before": share(before), "after": share(after)},
            "scores": {"clip_score": scores(0.3, 0.2)}, **more}  # fmt: skip


FULL_REPORT = {
    "schema_version": 2,
    "sa_diffusers_version": "1.2.3",
    "base_model": BASE_NAME,
    "base_revision": "0123456789abcdef0123456789abcdef01234567",
    "pairs": [{"concept": "brad pitt", "surrogate": "a middle aged man", "kind": "prompt"}],
    "seconds": {"training": 61.0, "fisher": 9.0},
    "device": "cpu",
    "sampling": {"sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 7.5},
    "versions": {"torch": "2.9", "diffusers": "0.36"},
    "rows": [
        row("brad pitt", "concept", 1.0, 0.25, as_surrogate={"before": share(0.0), "after": share(0.5)},
            probability={"before": 0.9, "after": 0.2}, entropy={"before": 0.1, "after": 1.5}),
        row("a middle aged man", "surrogate", 1.0, 1.0),
        row("george clooney", "neighbour", 1.0, 0.5),
        row("tom cruise", "neighbour", 1.0, 1.0),
        row("a dog", "remembered", 1.0, 1.0),
    ],
    "black_images": {"before": 0, "after": 5},
    "classifier": {"name": "someone/celebrities", "labels": ["brad pitt", "george clooney"]},
    "remembered": {
        "labels": ["a dog"],
        "before": {"recognised": 1.0, "frechet_distance": 4.0, "images": 16},
        "after": {"recognised": 0.875, "frechet_distance": 5.0, "images": 16},
        "against_base": {"frechet_distance": 1.5, "precision": 0.9, "recall": 0.8},
    },
    "surrogate_samples": {},
    "evaluators": [{"name": "openai/clip", "version": "1.0", "threshold": 0.6, "labels": ["a", "b"]}],
    "blur": True,
}  # fmt: skip
ROBUSTNESS_REPORT = {
    "protocol": "robustness",
    "command": "evaluate_sa.py --base /home/alice/base --erased no-brad --protocol robustness",
    "sampling": FULL_REPORT["sampling"],
    "rows": [],
    "quality": [{"features": "inception-v3-compat", "neighbours": 3, "images": 16, "reference": "real images",
                 "reference_images": 16, "before": {"frechet_distance": 10.0, "precision": 0.7, "recall": 0.6},
                 "after": {"frechet_distance": 12.0, "precision": 0.6, "recall": 0.5}}],
    "robustness": [
        {"attack": attack, "model": model, "images": 4, "recognised": share(value), "scores": {"clip": {"mean": 0.1}}}
        for attack, model, value in (("its name", "base", 1.0), ("its name", "erased", 0.25),
                                     ("textual inversion", "base", 1.0), ("textual inversion", "erased", 0.75),
                                     ("textual inversion", "control", 0.5))
    ],
}  # fmt: skip


def full_folder(folder: Path) -> Path:
    pipeline_index(folder)
    settings = {"concept": ["brad pitt"], "surrogate": ["a middle aged man"], "ewc_weight": 50.0, "seed": 0,
                "pretrained_model_name_or_path": BASE_NAME, "max_train_steps": 400, "sa_diffusers_version": "1.2.3",
                "concept_templates": ["{}", "a photo of {}"], "classifier": "/home/alice/classifier"}  # fmt: skip
    write_json(folder / "selective_amnesia.json", settings)
    write_json(folder / REPORT_NAME, FULL_REPORT)
    write_json(folder / "evaluation-robustness" / REPORT_NAME, ROBUSTNESS_REPORT)
    losses = {"surrogate_loss": 0.5, "replay_loss": 0.25, "ewc_penalty": 0.125, "learning_rate": 1e-5}
    write_json(folder / HISTORY_NAME, [{"step": 10, **losses}, {"step": 400, **losses, "surrogate_loss": 0.0625}])
    write_json(folder / ENDING_NAME, {"how": "given up", "sentence": "drift is 0.3, 0.1 is tolerated", "step": 290})
    write_json(folder / FISHER_CONFIG_NAME, {"base_model": BASE_NAME, "timesteps": 50, "num_samples": 100, "seed": 0})
    (folder / GRID_NAME).write_bytes(b"a picture")
    return folder


def cache_base_card(monkeypatch, tmp_path, text):
    """The base model's card in the Hub's cache; nothing is asked of the Hub."""
    repository = tmp_path / "hub" / f"models--{BASE_NAME.replace('/', '--')}"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "README.md").write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_card_draws_nothing_from_a_scorer_that_hardly_knows_the_concept(tmp_path):
    """Recognised in none, of a concept that it did not recognise before either."""
    folder = full_folder(tmp_path / "no-brad")
    write_json(folder / REPORT_NAME, {**FULL_REPORT, "rows": [row("brad pitt", "concept", 0.25, 0.0)]})
    text = str(build_model_card(folder))
    assert '"brad pitt": recognised in 0.0 % of 4 images, but before in no more than 25.0 %: what scores hardly' in text
    assert "The true share may still be" not in text
    told = {(result.dataset_config, result.metric_type) for result in ModelCard(text).data.eval_results}
    assert ("training/brad pitt", "clip_score") in told
    assert not {("training/brad pitt", "recognised"), ("training/brad pitt", "probability")} & told


def test_a_card_with_every_field_full(tmp_path, monkeypatch):
    cache_base_card(
        monkeypatch, tmp_path, "---\nlicense: other\nlicense_name: railly\nlicense_link: LICENSE\n---\n# A base\n"
    )
    text = str(build_model_card(full_folder(tmp_path / "no-brad"), "tester/no-brad"))
    assert card_errors(text) == []
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == (BASE_NAME, "finetune")
    assert (data.license, data.license_name) == ("other", "railly")
    assert data.license_link == f"https://huggingface.co/{BASE_NAME}/blob/main/LICENSE"
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert "No licence" not in text
    found = {(result.dataset_config, result.metric_type): result.metric_value for result in data.eval_results}
    assert found["training/brad pitt", "recognised"] == 0.25
    assert found["training/brad pitt", "clip_score"] == 0.2
    assert found["training/remembered", "frechet_distance"] == 5.0
    assert found["robustness/inception-v3-compat against real images", "recall"] == 0.5
    assert found["robustness/attack textual inversion", "recognised"] == 0.75
    for heading in ("What was to be erased", "Before and after", "Evaluation", "Limits", "Intended use and misuse",
                    "How to load it", "Hyper-parameters", "Fisher information", "How to reproduce it",
                    "How to cite"):  # fmt: skip
        assert f"\n## {heading}\n" in text
    assert "| brad pitt | a middle aged man | what the base model draws for that prompt |" in text
    assert '"brad pitt" still leaks: recognised in 25.0 % of 4 images (before: 100.0 %)' in text
    assert 'falls most for "george clooney", from 100.0 % to 50.0 %' in text
    assert (
        'the most successful one, "textual inversion", shows it in 75.0 % of its images (100.0 % on the base '
        "model, 50.0 % on the control model)"
    ) in text
    assert "5 images came out black, 0 from the base model" in text
    assert "they may show nudity" in text
    assert "No attempt to bring the concept back" not in text
    assert 'from_pretrained("tester/no-brad")' in text
    assert "0.5 at step 10, 0.0625 at step 400" in text
    assert "| `num_samples` | 100 |" in text
    assert text.count("\n> TRAINING GIVEN UP: drift is 0.3, 0.1 is tolerated.\n") == 1
    assert "| `seed` | 0 |" in text
    assert "Scored by `openai/clip` (version 1.0; threshold 0.6" in text
    assert "python examples/evaluate_sa.py --base base --erased no-brad" in text
    assert "alice" not in text
    assert "None" not in text.replace("None:", "")


@pytest.mark.parametrize(("left", "later"), [(0.0, None), (0.0, 0.5), (0.5, None), (None, None)])
def test_a_title_says_without_only_where_all_that_was_measured_says_forgotten(tmp_path, left, later):
    folder = full_folder(tmp_path / "no-brad")
    for place, share_left in ((folder, left), (folder / "evaluation-concept", later)):
        if share_left is None:
            (place / REPORT_NAME).unlink(missing_ok=True)
            continue
        rows = [row("brad pitt", "concept", 1.0, share_left)]
        write_json(place / REPORT_NAME, {**FULL_REPORT, "rows": rows})
    ending = ' without "brad pitt"' if (left, later) == (0.0, None) else ', trained to forget "brad pitt"'
    text = str(build_model_card(folder))
    assert [line for line in text.splitlines() if line.startswith("# ")] == [f"# {BASE_NAME.split('/')[1]}{ending}"]


@pytest.mark.parametrize(("before", "told"), [(1.0, ""), (0.2, ", which is not measurable")])
def test_a_figure_that_the_hub_shows_says_where_it_shows_nothing(tmp_path, before, told):
    folder = full_folder(tmp_path / "no-brad")
    write_json(folder / REPORT_NAME, {**FULL_REPORT, "rows": [row("brad pitt", "concept", before, 0.0)]})
    results = ModelCard(str(build_model_card(folder))).data.eval_results
    subjects = {result.dataset_name for result in results if result.dataset_config == "training/brad pitt"}
    assert subjects == {f"4 generated images, concept: brad pitt{told}"}


def test_a_card_with_every_field_empty(tmp_path):
    pipeline_index(tmp_path / "out")
    text = str(build_model_card(tmp_path / "out"))
    assert card_errors(text) == []
    data = ModelCard(text).data
    assert data.get("base_model") is None
    assert data.get("license") is None
    assert data.get("eval_results") is None
    assert "No licence is given here" in text
    assert "Nothing has been measured in this folder" in text
    assert "No attempt to bring the concept back is on record" in text
    assert "before_after.png" not in text
    assert "TRAINING" not in text
    assert "None" not in text


EMPTY_REPORTS = [
    {},
    {"rows": [], "quality": [], "robustness": [], "evaluators": [], "pairs": [], "seconds": {}, "versions": {}},
    {"rows": [{"name": "x", "role": "concept", "images": 1, "change": {"relative": None}, "scores": {}}],
     "remembered": {"before": {"recognised": 1.0, "frechet_distance": None, "images": 1},
                    "after": {"recognised": 1.0, "frechet_distance": None, "images": 1}}},
    {"rows": [{"name": "x", "role": "concept", "images": 1,
               "scores": {"probability of the celebrity": {"before": {"mean": None}, "after": {"mean": None}}}}],
     "robustness": [{"attack": "inversion", "model": "erased"}], "classifier": {"name": "/home/alice/c"}},
]  # fmt: skip


@pytest.mark.parametrize("report", EMPTY_REPORTS, ids=["nothing", "lists", "one image", "no figure"])
@pytest.mark.parametrize("place", [REPORT_NAME, f"evaluation/celebrity/{REPORT_NAME}"])
def test_cards_of_reports_with_gaps(tmp_path, report, place):
    pipeline_index(tmp_path)
    write_json(tmp_path / place, report)
    text = str(build_model_card(tmp_path))
    assert card_errors(text) == []
    assert "None" not in text
    assert "alice" not in text


@pytest.mark.parametrize(
    "missing",
    ["selective_amnesia.json", REPORT_NAME, HISTORY_NAME, ENDING_NAME, FISHER_CONFIG_NAME, GRID_NAME,
     "evaluation-robustness"],
)  # fmt: skip
def test_any_file_may_be_missing(tmp_path, missing):
    folder = full_folder(tmp_path / "no-brad")
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    text = str(build_model_card(folder))
    assert card_errors(text) == []
    assert 'trained to forget "brad pitt"' in text


@pytest.mark.parametrize(("registered", "own"), [(True, "train_own.py"), (True, None), (False, "train_own.py")])
def test_the_card_of_somebodys_own_family_names_its_script_or_says_that_none_is_known(tmp_path, registered, own):
    """Whoever pushes the folder later may not have registered the family: plain diffusers loads it all the same."""
    folder = full_folder(tmp_path / "out")
    pipeline_index(folder, _class_name="OwnPipeline")

    class OwnFamily(Family):
        script = own

        @classmethod
        def card_snippet(cls, condition):
            return f"image = pipeline.make({condition!r})"

    if registered:
        register("OwnPipeline")(OwnFamily)
    try:
        text = str(build_model_card(folder))
    finally:
        registry._FAMILIES.pop("OwnPipeline", None)
    snippet, command = check_card(text)[:2]
    assert ("image = pipeline.make(" in snippet) == registered
    assert ("image = pipeline(" in snippet) != registered
    is_known = registered and own is not None
    script = "examples/train_own.py" if is_known else "YOUR_SCRIPT.py"
    assert command.startswith(f"accelerate launch {script} --config selective_amnesia.json")
    told = "`YOUR_SCRIPT.py` stands for the script of whoever wrote the family of `OwnPipeline`"
    assert (told in text) != is_known


def test_names_of_files_are_those_that_the_evaluation_writes():
    assert (REPORT_NAME, GRID_NAME) == (comparison.REPORT_NAME, comparison.GRID_NAME)


def test_names_that_mean_something_in_markdown_and_yaml(tmp_path):
    name = 'a|b <script> *c* `d` [e](f): # "g"\nh'
    pipeline_index(tmp_path)
    pairs = [{"concept": name, "surrogate": name, "kind": "prompt"}]
    write_json(tmp_path / REPORT_NAME, {"pairs": pairs, "rows": [row(name, "concept", 1.0, 1.0)]})
    text = str(build_model_card(tmp_path))
    assert card_errors(text) == []
    (result, *_) = ModelCard(text).data.eval_results
    assert result.dataset_config == f"training/{name}"
    body = text.split(CARD_MARKER)[1]
    assert "<script>" not in body
    tables = [line for line in body.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables[:3]}
    assert len(widths) == 1


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40) | st.sampled_from(
    [
        "a|b",
        "```",
        "` ``",
        "~~~",
        "1. a",
        "- a",
        "---",
        "<!-- a",
        "a\\|b",
        "\u202eabc",
        "\x00\x1b[31m",
        "a\n\n# b",
        "a: b",
    ]
)


def check_card(text):
    """What a card must be whatever names are in it; its code blocks."""
    assert card_errors(text) == []
    head, body = text.split(CARD_MARKER)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", body)
    blocks, prose, fence = [], [], None
    for line in body.splitlines():
        if fence is None and (opened := re.match("(```+)", line)):
            fence = opened[1]
            blocks.append([])
        elif line == fence:
            fence = None
        elif fence is not None:
            blocks[-1].append(line)
        else:
            prose.append(line)
    assert fence is None
    assert not any(re.search(r"<(?!/?(details|summary)>)", line) for line in prose)
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in prose]
    for line, width, following in zip(prose, widths, widths[1:], strict=False):
        if line.startswith("|") and following:
            assert width == following, line
    # No heading, list or rule but those of the card itself.
    headings = [line for line in prose if line.startswith("#")]
    assert all(re.match("# |## [A-Z]|### (Protocol: |At the end)", line) for line in headings)
    assert sum(line.startswith("# ") for line in headings) == 1
    return ["\n".join(block) for block in blocks]


@settings(max_examples=40, deadline=None)
@given(NAMES, NAMES)
@example("a\n```\n# b", "```")
def test_any_name_makes_a_card_that_holds(tmp_path_factory, name, other):
    folder = pipeline_index(tmp_path_factory.mktemp("out"))
    report = {**FULL_REPORT, "pairs": [{"concept": name, "surrogate": other, "kind": "prompt"}], "base_model": name,
              "classifier": {"name": other, "labels": [name]}, "base_revision": other,
              "evaluators": [{"name": name, "version": other, "labels": [name, other]}],
              "rows": [row(name, "concept", 1.0, 1.0), row(other + "2", "remembered", 1.0, 1.0)]}  # fmt: skip
    attack = [{**entry, "attack": f"{entry['attack']} {name}"} for entry in ROBUSTNESS_REPORT["robustness"]]
    command = ["python", "examples/evaluate_sa.py", "--concept", name]
    write_json(folder / REPORT_NAME, report)
    more = {"robustness": attack, "command": command, "protocol": name}
    write_json(folder / "evaluation-x" / REPORT_NAME, {**ROBUSTNESS_REPORT, **more})
    written = {"concept": [name], "surrogate": [other], "classifier": other, "pretrained_model_name_or_path": name,
               "fisher": other, "ewc_weight": 1.0}  # fmt: skip
    write_json(folder / ENDING_NAME, {"how": other, "sentence": name})
    write_json(folder / "selective_amnesia.json", written)
    assert write_model_card(folder)
    loading, commands, citation = check_card((folder / "README.md").read_text(encoding="utf-8"))
    assert citation.startswith("@inproceedings")
    assert loading.startswith("from diffusers import DiffusionPipeline\n\npipeline = ")
    assert commands.startswith("accelerate launch examples/train_sa.py --config selective_amnesia.json")
    assert "\npython examples/evaluate_sa.py --concept " in commands


@settings(max_examples=40, deadline=None)
@given(NAMES, NAMES)
def test_any_name_makes_a_card_of_fisher_information_that_holds(name, other):
    config = {"base_model": name, "revision": other, "train_method": other, "num_samples": 3, name: other}
    text = FisherInformation({"a": torch.zeros(2)}, config).model_card(other)
    command, code = check_card(text)
    assert command.startswith("accelerate launch examples/train_sa.py --fisher ")
    assert code.startswith("from sa_diffusers import FisherInformation\n")


def test_a_long_value_is_cut_in_a_card(tmp_path):
    pipeline_index(tmp_path)
    write_json(tmp_path / "selective_amnesia.json", {"concept": ["cat " * 1000], "concept_templates": ["{} " * 1000]})
    text = str(build_model_card(tmp_path))
    assert max(map(len, text.splitlines())) < 1200
    assert "…" in text


def test_the_commands_of_a_card_are_quoted(tmp_path):
    pipeline_index(tmp_path)
    command = "evaluate_sa.py --concept 'Brad Pitt' --clip a;rm\n```\n# b"
    write_json(tmp_path / "evaluation-concept" / REPORT_NAME, {"rows": [], "protocol": "concept", "command": command})
    assert "python examples/evaluate_sa.py --concept 'Brad Pitt' --clip 'a;rm' '```' '#' b" in str(
        build_model_card(tmp_path)
    )


def test_a_clear_picture_beside_a_blurred_evaluation_is_not_shown(tmp_path):
    folder = full_folder(tmp_path / "no-brad")
    assert GRID_NAME in str(build_model_card(folder))
    write_json(folder / REPORT_NAME, {**FULL_REPORT, "blur": False})
    assert GRID_NAME in str(build_model_card(folder))
    write_json(folder / "evaluation-robustness" / REPORT_NAME, {**ROBUSTNESS_REPORT, "blur": True})
    assert GRID_NAME not in str(build_model_card(folder))


def test_a_base_in_a_folder_is_named_by_its_last_part_and_lends_its_licence(tmp_path):
    base = tmp_path / "garments"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Garments\n")
    pipeline_index(tmp_path / "out")
    settings = {"concept": ["bag"], "surrogate": ["coat"], "pretrained_model_name_or_path": str(base)}
    write_json(tmp_path / "out" / "selective_amnesia.json", settings)
    text = str(build_model_card(tmp_path / "out"))
    assert card_errors(text) == []
    assert ModelCard(text).data.license == "mit"
    assert ModelCard(text).data.get("base_model") is None
    assert "the local folder `garments`" in text
    assert str(tmp_path) not in text


def test_a_card_of_classes_loads_with_its_code_and_asks_for_a_class_that_is_left(tmp_path):
    tiny_vae().save_pretrained(tmp_path)
    write_json(tmp_path / "selective_amnesia.json", {"concept": ["0"], "surrogate": []})
    text = str(build_model_card(tmp_path))
    assert ModelCard(text).data.pipeline_tag == "unconditional-image-generation"
    assert "trust_remote_code=True" in text
    assert "pipeline(class_labels=[1])" in text


def test_a_users_own_card_stays(tmp_path):
    pipeline_index(tmp_path)
    assert write_model_card(tmp_path)
    first = (tmp_path / "README.md").read_text()
    write_json(tmp_path / HISTORY_NAME, [])
    assert write_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    (tmp_path / "README.md").write_text(first.replace(CARD_MARKER + "\n", "") + "my words")
    assert not write_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text().endswith("my words")


def test_a_folder_without_a_pipeline_gets_no_card(tmp_path):
    with pytest.raises(ValueError, match="holds no pipeline"):
        write_model_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_checks_of_the_local_server_can_fail():
    bad = "base_model: /home/x\nlicense: nonsense\ntags: one\nmodel-index:\n- name: a\n  results:\n  - task: {}\n"
    errors = card_errors(f"---\n{bad}    dataset: {{}}\n    metrics: [{{}}]\n---\n")
    for part in ("base_model", "license must", "tags", "task.type", "dataset.name", "a metric"):
        assert any(part in error for error in errors), part


# What is published


def test_absolute_paths_are_cut_to_their_last_part_and_nothing_else_is(tmp_path):
    for text, expected in (
        (f'"output_dir": "{tmp_path}/out"', '"output_dir": "out"'),
        ("--real '/home/alice/my data', split test", "--real 'my data', split test"),
        ("--base=/home/alice/base/ x", "--base=base/ x"),
        ("https://huggingface.co/data/set and data/a/b and either/or", None),
        ("data:image/jpeg;base64,/9j/4AAQ/SkZJ", None),
        ("</td></tr> /imagine a cat", None),
        ("from file:///home/alice/x/y", "from file://y"),
        ("a:/home/alice/x", "a:x"),
        ("/home//alice/x", "x"),
        ("https://data/home/x", None),
    ):
        assert without_local_paths(text) == (text if expected is None else expected)
    for value, expected in (
        ("/home/alice smith/models (old)/base", "base"), ("file:///home/alice/base", "base"), ("/imagine a cat", None),
        ("a cat on /home", None), ("CompVis/stable-diffusion-v1-4", None), (3, None), ("/", None),
    ):  # fmt: skip
        kept = value if expected is None else expected
        assert without_local_values({"a": [value, {"b": value}]}) == {"a": [kept, {"b": kept}]}


def test_components_forget_where_they_were_loaded_from(tmp_path):
    write_json(tmp_path / "model_index.json", {"_class_name": "X", "_name_or_path": str(tmp_path)})
    write_json(tmp_path / "unet" / "config.json", {"_name_or_path": str(tmp_path / "unet"), "sample_size": 8})
    write_json(tmp_path / "text_encoder" / "config.json", {"_name_or_path": "openai/clip-vit-large-patch14"})
    drop_local_names(tmp_path)
    assert read_json(tmp_path / "model_index.json") == {"_class_name": "X"}
    assert read_json(tmp_path / "unet" / "config.json") == {"sample_size": 8}
    assert read_json(tmp_path / "text_encoder" / "config.json") == {"_name_or_path": "openai/clip-vit-large-patch14"}


@pytest.mark.parametrize("name", ["a b", "a/b/c", "-x", "x.git", "beyoncé", "a" * 97])
def test_names_that_the_hub_refuses(name):
    with pytest.raises(ValueError, match="cannot be a name on the Hub .* --hub_model_id"):
        repository_name("out", name)


LOAD = """
import sys
sys.modules["sa_diffusers"] = None
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
pipeline.save_pretrained("{folder}")
print(pipeline({call}).images[0].size)
"""


def load_by_name(hub, name, tmp_path, call):
    """Load from the server into an empty cache, where `sa_diffusers` cannot be imported."""
    script = LOAD.format(name=name, folder=tmp_path / "loaded", call=call)
    result = forked_code(script, tmp_path, online(hub, tmp_path / "empty"), imported=LIBRARIES)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def same_weights(first: Path, second: Path) -> None:
    paths = [path.relative_to(first) for path in first.rglob("*.safetensors") if "checkpoint" not in str(path)]
    assert paths
    for path in paths:
        old, new = load_file(first / path), load_file(second / path)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_figures_of_other_weights_are_no_evidence(erased):
    """Somebody puts other weights into a copy, which no longer has the record that says what the run wrote."""
    whole = {path.name for path in published_files(erased)}
    assert {REPORT_NAME, GRID_NAME} <= whole
    shutil.rmtree(erased / ".selective_amnesia")
    assert {path.name for path in published_files(erased)} == whole
    write_json(erased / ENDING_NAME, {"how": "done", "sentence": "none of 60 images shows it", "step": 4})
    weights = load_file(erased / WEIGHTS)
    save_file({name: value + 1 for name, value in weights.items()}, erased / WEIGHTS, {"format": "pt"})
    card = str(build_model_card(erased))
    assert "Nothing has been measured in this folder" in card
    assert "TRAINING" not in card and GRID_NAME not in card and "model-index" not in card
    assert {path.name for path in published_files(erased)} == whole - {
        REPORT_NAME,
        "report.md",
        "report.html",
        GRID_NAME,
    }
    assert recorded_ending(str(erased)) is None
    # What an evaluation says of these counts.
    report = read_json(erased / REPORT_NAME)
    write_json(
        erased / "evaluation-concept" / REPORT_NAME, {**report, "weights": weights_in(erased), "protocol": "now"}
    )
    assert list(read_facts(erased).reports) == ["now"]


@pytest.mark.long
def test_what_is_pushed_is_what_loads_by_name(erased, tmp_path):
    """Large files in parts, into a private repository; then again, when there is nothing new."""
    assert (erased / "checkpoint-2").is_dir() and (erased / "runs").is_dir()
    own = {"erased_module": read_json(erased / REPORT_NAME)["erased_module"], "protocol": "concept"}
    write_json(erased / "evaluation-concept" / REPORT_NAME, {**own, "command": f"evaluate_sa.py --erased {erased}"})
    other = {**own, "erased_module": "of an earlier pipeline in this folder", "command": "evaluate_sa.py --stale"}
    write_json(erased / "evaluation-robustness" / REPORT_NAME, other)
    before = contents(erased)
    with HubServer(part_size=20_000) as hub:
        first = push(hub, erased, tmp_path, "--hub_model_id", "no-brad", "--private")
        assert first.returncode == 0, first.stderr
        assert f"hub       {hub.address}/tester/no-brad" in first.stdout
        assert "evaluation-robustness is about an earlier pipeline of this folder" in first.stderr
        assert hub.count("PUT", r"/large/\w+/2$") > 0
        assert hub.count("POST", "validate-yaml")
        assert hub.private["tester/no-brad"]
        assert load_by_name(hub, "tester/no-brad", tmp_path, "'cat', num_inference_steps=2") == "(16, 16)"
        same_weights(erased, tmp_path / "loaded")
        uploads, commits = hub.count("PUT", "/large/"), hub.count("POST", "/commit/")
        again = push(hub, erased, tmp_path, "--hub_model_id", "no-brad", "--private")
        assert again.returncode == 0, again.stderr
        assert (hub.count("PUT", "/large/"), hub.count("POST", "/commit/")) == (uploads, commits)
    assert contents(erased) == before
    pushed = hub.files["tester/no-brad"]
    assert {WEIGHTS, "model_index.json", "README.md", GRID_NAME, REPORT_NAME, "selective_amnesia.json",
            FISHER_CONFIG_NAME} <= set(pushed)  # fmt: skip
    assert not [name for name in pushed if name.startswith(("checkpoint", "runs", "logs", ".")) or "/." in name]
    assert f"evaluation-concept/{REPORT_NAME}" in pushed and f"evaluation-robustness/{REPORT_NAME}" not in pushed
    assert b"--stale" not in pushed["README.md"]
    assert b'from_pretrained("tester/no-brad")' in pushed["README.md"]
    assert card_errors(pushed["README.md"].decode()) == []
    for name, content in pushed.items():
        assert TOKEN.encode() not in content, name
        assert str(tmp_path.parent).encode() not in content, name
    assert TOKEN not in first.stdout + first.stderr
    assert f"Bearer {TOKEN}" in hub.tokens
    # Whoever publishes it is told what was found.
    assert f"verdict   {read_json(erased / REPORT_NAME)['verdict']['line']}" in first.stdout


def test_a_model_of_classes_brings_its_code(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "no-zero")
    with HubServer() as hub:
        result = push(hub, tmp_path / "no-zero", tmp_path)
        assert result.returncode == 0, result.stderr
        assert {"pipeline.py", "vae/conditional_vae.py"} <= set(hub.files["tester/no-zero"])
        load_by_name(hub, "tester/no-zero", tmp_path, "class_labels=[1]")
        same_weights(tmp_path / "no-zero", tmp_path / "loaded")


ALWAYS = 1000
TO_DO = {403: "with a token that may write to that repository", 413: "A file is larger than the Hub takes"}
FAULTS = {
    "refused: 401": (Fault("POST", "repos/create", 401), False),
    "no room for a commit: 409": (Fault("POST", "/commit/", 409), False),
    "refused in the upload: 403": (Fault("PUT", "/large/", 403, ALWAYS), False),
    "too large: 413": (Fault("PUT", "/large/", 413, ALWAYS), False),
    "too large to commit: 413": (Fault("POST", "/commit/", 413), False),
    "500 at the start": (Fault("POST", "repos/create", 500), False),
    "500 before the upload": (Fault("POST", "/preupload/", 500), True),
    "500 in the upload": (Fault("PUT", "/large/", 500), True),
    "500 at the commit": (Fault("POST", "/commit/", 500), False),
    "cut in the upload": (Fault("PUT", "/large/", CUT), True),
    "cut in every upload": (Fault("PUT", "/large/", CUT, ALWAYS), False),
    "cut at the commit": (Fault("POST", "/commit/", CUT), False),
    "the card is refused: 400": (Fault("POST", "validate-yaml", 400), False),
}


@pytest.mark.parametrize("place", ["notes.json", "vae/secret.safetensors", "text_encoder"])
def test_no_link_leads_out_of_what_goes_up(tmp_path, place):
    folder = pipeline_index(tmp_path / "no-brad")
    secret = tmp_path / "secret"
    secret.mkdir()
    write_json(secret / "key.json", {"key": "secret"})
    link = folder / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret if place == "text_encoder" else secret / "key.json")
    with HubServer() as hub:
        result = push(hub, folder, tmp_path)
        assert result.returncode == 1
        assert hub.requests == []
    assert (
        f"error: {link} is a link to {link.resolve()}, outside of the folder: put a copy in its place" in result.stderr
    )
    assert "Traceback" not in result.stderr
    # A link within the folder is the file; one to what stays behind stays behind.
    link.unlink()
    write_json(folder / ".hidden.json", {"key": "secret"})
    (folder / "hidden.json").symlink_to(".hidden.json")
    (folder / "index.json").symlink_to("model_index.json")
    published = {str(path.relative_to(folder)) for path in published_files(folder)}
    assert published == {"model_index.json", "index.json"}


def test_a_folder_of_logs_that_is_the_folder_itself_leaves_nothing_out(tmp_path):
    pipeline_index(tmp_path)
    for logs in (".", None, 3):
        write_json(tmp_path / "selective_amnesia.json", {"logging_dir": logs})
        assert {path.name for path in published_files(tmp_path)} == {"model_index.json", "selective_amnesia.json"}


@pytest.mark.long
@pytest.mark.parametrize(("fault", "succeeds"), FAULTS.values(), ids=FAULTS)
def test_a_failed_upload_says_how_to_repeat_it_and_the_repetition_works(erased_once, tmp_path, fault, succeeds):
    coming = replace(fault)
    before = contents(erased_once)
    with HubServer(faults=[coming]) as hub:
        result = push(hub, erased_once, tmp_path, "--private")
        assert coming.times < fault.times, "the fault never came"
        assert contents(erased_once) == before
        assert TOKEN not in result.stdout + result.stderr
        if succeeds:
            assert result.returncode == 0, result.stderr
        else:
            assert result.returncode != 0
            assert "Traceback" not in result.stderr
            # Progress bars may end after it.
            (message,) = re.findall(r"^error: .*", result.stderr, flags=re.MULTILINE)
            assert message.startswith('error: the upload to "no-brad" failed (')
            assert fault.status == CUT or str(fault.status) in message
            assert TO_DO.get(fault.status, "Log in with `hf auth login`") in message
            assert "tester/no-brad" not in hub.files or WEIGHTS not in hub.files["tester/no-brad"]
            coming.times = 0
            (command,) = re.findall(r"repeat it with `(.+)`", message)
            assert command.endswith("--private")
            _, path, *flags = shlex.split(command)
            repeated = forked(REPOSITORY / path, flags, REPOSITORY, online(hub, tmp_path / "cache"))
            assert repeated.returncode == 0, repeated.stderr
        assert hub.private["tester/no-brad"]
    assert hub.files["tester/no-brad"][WEIGHTS] == (erased_once / WEIGHTS).read_bytes()


def test_a_token_that_breaks_a_header_is_not_shown(erased_once, tmp_path):
    with HubServer() as hub:
        environment = online(hub, tmp_path / "cache", HF_TOKEN="hf_sec\x0bret")
        code = f"from sa_diffusers.publish import push_pipeline; push_pipeline({str(erased_once)!r})"
        for result in (forked(PUSH, [erased_once], REPOSITORY, environment),
                       forked_code(code, REPOSITORY, environment)):  # fmt: skip
            assert result.returncode != 0
            assert "Illegal header value b'Bearer ***'" in result.stderr
            assert "hf_sec" not in result.stdout + result.stderr


def test_a_public_repository_takes_no_private_upload(erased_once, tmp_path):
    with HubServer() as hub:
        hub.start_repository("tester/no-brad", private=False)
        result = push(hub, erased_once, tmp_path, "--private")
        assert result.returncode != 0
        assert 'error: "tester/no-brad" is on the Hub already, and public' in result.stderr
        assert hub.files["tester/no-brad"] == {}


def test_the_settings_of_the_run_say_where_it_goes(erased, tmp_path):
    settings = read_json(erased / "selective_amnesia.json")
    write_json(erased / "selective_amnesia.json", {**settings, "hub_model_id": "lab/quiet", "hub_private_repo": True})
    with HubServer() as hub:
        assert push(hub, erased, tmp_path).returncode == 0
        assert hub.private == {"lab/quiet": True}


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with HubServer() as hub:
        for folder in ("empty", "nowhere"):
            result = push(hub, tmp_path / folder, tmp_path)
            assert result.returncode != 0
            assert "holds no pipeline" in result.stderr
            assert "Traceback" not in result.stderr
        assert hub.requests == []


def test_the_cards_command_takes_the_published_settings_and_pushes_nothing(erased_once, tmp_path):
    with HubServer() as hub:
        assert push(hub, erased_once, tmp_path).returncode == 0
    published = hub.files["tester/no-brad"]
    (tmp_path / "selective_amnesia.json").write_bytes(published["selective_amnesia.json"])
    (command,) = re.findall(r"accelerate launch examples/train_sa.py (.+)", published["README.md"].decode())
    command = command.replace("selective_amnesia.json", str(tmp_path / "selective_amnesia.json"))
    config = parse_config(shlex.split(command))
    assert (config.concept, config.max_train_steps, config.output_dir) == (["brad pitt"], 4, "again")
    assert config.pretrained_model_name_or_path == "pipeline"
    assert not config.push_to_hub


# From Python


def test_what_is_not_forgotten_is_not_pushed_where_it_has_to_be(tiny_folder, tmp_path):
    with HubServer() as hub:
        flags = quick(tiny_folder, output_dir="out", clip="none", push_to_hub=True, require_forgotten=True)
        result = run(flags, tmp_path, online(hub, tmp_path / "cache"))
        assert result.returncode == 3, result.stderr
        assert "hub       not pushed, as the verdict is another than forgotten" in result.stdout
        assert hub.files == {}
        # Asked for without that condition, it goes up as it is.
        result = run(flags[:-1], tmp_path, online(hub, tmp_path / "cache"))
        assert result.returncode == 0, result.stderr
        assert "tester/out" in hub.files


def test_trainer_and_fisher_information_are_pushed_and_found_again(tiny_folder, tmp_path):
    settings = quick(tiny_folder, output_dir="fresh")
    script = textwrap.dedent(
        f"""
        import torch
        from sa_diffusers import FisherInformation
        from sa_diffusers.commands.erase import parse_config
        from sa_diffusers.erasure import Erasure
        from sa_diffusers.training.training import Training
        config = parse_config({[*settings, "--report_to", "none"]!r})
        erasure = Erasure(config)
        fisher = erasure.fisher()
        print(fisher.push_to_hub("tester/fisher", private=True))
        again = FisherInformation.from_pretrained("tester/fisher")
        assert all(torch.equal(again.values[name], fisher.values[name]) for name in fisher.values)
        trainer = Training(
            erasure.objective, config, erasure.surrogates(), erasure.replay(), again, output_dir="trained"
        )
        trainer.train()
        print(trainer.push_to_hub("tester/trained"))
        """
    )
    with HubServer() as hub:
        environment = online(hub, tmp_path / "cache", SA_DIFFUSERS_CACHE=str(tmp_path / "artifacts"))
        result = forked_code(script, tmp_path, environment)
        assert result.returncode == 0, result.stderr
        assert f"{hub.address}/tester/fisher" in result.stdout
        assert hub.private == {"tester/fisher": True, "tester/trained": False}
        trained, published = hub.files["tester/trained"], hub.files["tester/fisher"]
        assert trained[WEIGHTS] == (tmp_path / "trained" / WEIGHTS).read_bytes()
        assert card_errors(trained["README.md"].decode()) == []
        assert set(published) == {"README.md", FISHER_CONFIG_NAME, "fisher.safetensors"}
        assert card_errors(published["README.md"].decode()) == []
        assert b"Fisher information of pipeline" in published["README.md"]
        assert b"--fisher tester/fisher" in published["README.md"]
        for name, content in (*published.items(), *trained.items()):
            assert str(tmp_path.parent).encode() not in content, name
        reusing = quick(tiny_folder, fisher="tester/fisher", output_dir="reusing", train_method="xattn")
        again = run(reusing, tmp_path, {**environment, "HF_HUB_CACHE": str(tmp_path / "empty")})
        assert again.returncode == 0, again.stderr
        assert "fisher    reused: tester/fisher" in again.stdout
        assert "| `num_samples` | 2 |" in (tmp_path / "reusing" / "README.md").read_text()


def test_saved_fisher_information_is_pushed_by_the_script(tiny_config, tmp_path):
    Erasure(tiny_config).fisher().save_pretrained(tmp_path / "fisher")
    with HubServer(faults=[Fault("POST", "/commit/", 500)]) as hub:
        failed = push(hub, tmp_path / "fisher", tmp_path, "--hub_model_id", "lab/fisher")
        assert failed.returncode != 0
        assert "examples/push_to_hub.py" in failed.stderr
        assert push(hub, tmp_path / "fisher", tmp_path, "--hub_model_id", "lab/fisher").returncode == 0
    assert json.loads(hub.files["lab/fisher"][FISHER_CONFIG_NAME])["num_samples"] == 3
