"""The coloured pipeline that the repository ships, its judges, its captions, and the variations it was trained on."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from sa_diffusers import coloured_pipeline
from sa_diffusers.configuration import SelectiveAmnesiaConfig, base_defaults
from sa_diffusers.data.captions import generate_captions, load_vocabulary
from sa_diffusers.data.phrasings import fill_template
from sa_diffusers.erasure import Erasure
from sa_diffusers.evaluation import ImageClassifier
from sa_diffusers.families import SamplingSettings, load_pipeline, objective_for

from .conftest import REPOSITORY

COLOURED = coloured_pipeline().parent
ICONS = load_vocabulary("icons")


@pytest.fixture(scope="module")
def script():
    """The script that trained it all."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        yield importlib.import_module("train_coloured")
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))


@pytest.fixture(scope="module")
def table(script):
    """Its concepts, styles and variations."""
    return importlib.import_module("training_parts.icons")


@pytest.fixture(scope="module")
def judge() -> ImageClassifier:
    return ImageClassifier(COLOURED / "concept_judge", reference_features=COLOURED / "reference_features.safetensors")


def test_what_is_shipped_is_small_plain_safetensors_in_float32():
    assert sum(path.stat().st_size for path in COLOURED.rglob("*") if path.is_file()) <= 20e6
    assert not [path for kind in ("*.bin", "*.pt", "*.pkl", "*.ckpt") for path in COLOURED.rglob(kind)]
    for path in COLOURED.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert all(file.get_slice(name).get_dtype() in ("F32", "I64") for name in file.keys())  # noqa: SIM118


def test_cards_name_every_set_with_its_authors_and_licence(table):
    for folder in ("pipeline", "concept_judge", "style_judge"):
        card = (COLOURED / folder / "README.md").read_text()
        assert "license: apache-2.0" in card
        assert "benchmarks/train_coloured.py" in card
        for style in table.STYLES:
            assert f"| {style.title} | {style.name} | {style.authors} | {style.licence} | {style.source} |" in card


def test_vocabulary_script_and_judges_know_the_same_concepts_and_styles(table, judge):
    names, styles = [concept.name for concept in table.CONCEPTS], [style.name for style in table.STYLES]
    assert names == ICONS.subjects
    assert judge.labels == [*names, "neither"]
    assert ICONS.settings == {"style": styles}
    assert ImageClassifier(COLOURED / "style_judge").labels == [*styles, "neither"]
    assert not set(ICONS.templates) & set(ICONS.held_out_templates)


def test_what_no_prompt_can_ask_for_has_no_row_and_is_not_remembered(tmp_path):
    # Without the settings that the folder recommends, what a classifier knows is remembered.
    base = tmp_path / "base"
    shutil.copytree(COLOURED / "pipeline", base, ignore=shutil.ignore_patterns("*defaults.json"))
    erasure = Erasure(SelectiveAmnesiaConfig(
        pretrained_model_name_or_path=str(base), concept=["noto"], surrogate=["fluent"], num_eval_images=2,
        classifier=str(COLOURED / "style_judge"), output_dir=str(tmp_path / "out"),
        artifacts_dir=str(tmp_path / "artifacts"), report_to="none",
    ))  # fmt: skip
    assert erasure.subject.classifier.labels == ["noto", "blob", "fluent", "neither"]
    assert erasure.subject.names == ["noto", "blob", "fluent"]
    rows = ["noto", "blob", "fluent", "noto (trained phrasings)"]
    assert [group.name for group in erasure.image_stage.groups] == rows


def test_captions_fill_styles_and_leave_out_the_concept():
    captions = generate_captions(ICONS, 400, 0, avoid=["tiger", "noto style"])
    assert not any("{" in caption or "tiger" in caption or "noto" in caption for caption in captions)
    assert any("fluent style" in caption for caption in captions)
    assert sum("lion" in caption for caption in captions) >= 10


def test_settings_advise_on_sampling_prompts_and_evaluation_only():
    settings = json.loads((COLOURED / "pipeline" / "selective_amnesia_defaults.json").read_text())
    assert set(settings) == {
        "sampler", "num_inference_steps", "guidance_scale", "sample_batch_size", "concept_templates",
        "replay_prompts", "classifier", "reference_features", "eval_templates",
    }  # fmt: skip
    assert set(settings["eval_templates"]) <= set(ICONS.held_out_templates)
    assert set(settings["concept_templates"]) <= set(ICONS.templates)
    assert base_defaults({"pretrained_model_name_or_path": str(COLOURED / "pipeline")})["replay_prompts"] == "icons"


def test_variations_are_seeded_pastel_and_differ(table):
    icons = torch.zeros(6, 4, 80, 80)
    icons[:, 0, 20:60, 30:50] = icons[:, 3, 20:60, 30:50] = 1.0
    first, again, other = (table.variations(icons, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape == (6, 3, 64, 64)
    assert first.abs().max() <= 1
    assert not torch.equal(first, other)
    assert all(not torch.equal(first[0], picture) for picture in first[1:])
    corners = (first[:, :, 0, 0] + 1) / 2
    assert corners.min() > 0.5
    assert (corners.amax(1) - corners.amin(1)).max() < 0.35
    # The red bar is drawn in every picture, whole.
    red = (first[:, 0] > 0.9) & (first[:, 1] < -0.9)
    assert red.flatten(1).sum(1).min() > 0.55 * 40 * 20 * (64 / 80) ** 2


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(script, tmp_path):
    def train(folder, stop=60):
        torch.manual_seed(0)
        parameters = list(torch.nn.Linear(4, 4).parameters())
        optimizer, schedule = script.one_cycle(parameters, 1e-2, 60)
        average = script.EMAModel(parameters, decay=0.99)
        state = script.TrainingState(folder, parameters, optimizer, average, seconds=1e9)
        done = state.load()
        script.resume(schedule, done)
        for step in range(done, stop):
            weight, bias = parameters
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (batch @ weight + bias).square().mean().backward()
            optimizer.step()
            schedule.step()
            average.step(parameters)
        state.save(stop)
        return [*parameters, *average.shadow_params]

    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop=11)
    train(tmp_path / "parts", stop=37)
    assert all(torch.equal(one, other) for one, other in zip(whole, train(tmp_path / "parts"), strict=True))
    assert not list(tmp_path.rglob("*.pt"))


def test_plain_diffusers_draws_what_is_asked_for(judge):
    pipeline = DiffusionPipeline.from_pretrained(COLOURED / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    asked = ["tiger", "banana", "taxi", "blue heart", "panda", "pizza"]
    torch.manual_seed(0)
    pictures = pipeline([f"a {name} in noto style" for name in asked], num_inference_steps=20, guidance_scale=3).images
    assert {picture.size for picture in pictures} == {(64, 64)}
    found = [judge.labels[index] for index in judge(pictures).probabilities.argmax(-1).tolist()]
    assert sum(name == label for name, label in zip(asked, found, strict=True)) >= 5


def test_concepts_and_styles_are_recognised_in_phrasings_held_out_from_training(judge):
    settings = SamplingSettings("dpmsolver++", 10, 3.0, batch_size=60)
    objective = objective_for(load_pipeline(str(COLOURED / "pipeline")))
    templates = [text for text in ICONS.held_out_templates if "{style}" in text]
    styles = ICONS.settings["style"]
    prompts = [
        fill_template(templates[number % len(templates)].replace("{style}", style), name)
        for number, (name, style) in enumerate((name, style) for name in ICONS.subjects for style in styles)
    ]
    pictures = objective.decode(objective.sample(prompts, list(range(len(prompts))), settings))
    found = judge(pictures).probabilities.argmax(-1)
    assert (found == torch.arange(len(ICONS.subjects)).repeat_interleave(len(styles))).float().mean() >= 0.85
    drawn = ImageClassifier(COLOURED / "style_judge")(pictures).probabilities.argmax(-1)
    assert (drawn == torch.arange(len(styles)).repeat(len(ICONS.subjects))).float().mean() >= 0.7
    assert np.stack([np.asarray(picture, np.float32) for picture in pictures]).std(0).mean() > 20
