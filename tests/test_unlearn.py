"""Forgetting from Python, in one call, on a pipeline in memory."""

import pytest
import torch
from diffusers import DiffusionPipeline

import sa_diffusers
from sa_diffusers import Erasure, SelectiveAmnesiaConfig, embedded_pipeline, erase

from .conftest import BY_HAND

SMALL = {"num_surrogate_images": 4, "num_replay_images": 4, "num_fisher_samples": 2, "fisher_timesteps": 2,
         "max_train_steps": 3, "train_batch_size": 2, **BY_HAND, "num_inference_steps": 2,
         "num_eval_images": 2, "clip": "none"}  # fmt: skip


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SA_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_call_gives_what_the_command_gives_and_leaves_the_given_pipeline_alone(tiny_folder, place):
    config = SelectiveAmnesiaConfig(pretrained_model_name_or_path=str(tiny_folder), concept="cat", surrogate="dog",
                                    output_dir=str(place / "out"), report_to="none", **SMALL)  # fmt: skip
    expected = Erasure(config).run().report
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.unet.train()
    before = weights(pipeline.unet)
    erased, report = erase(pipeline, "cat", "dog", **SMALL)
    assert same(weights(erased.unet), weights(DiffusionPipeline.from_pretrained(place / "out").unet))
    assert [row.change for row in report.rows] == [row.change for row in expected.rows]
    assert report.verdict == expected.verdict
    # As it was given: weights, mode, gradients; and nothing lies about.
    assert same(before, weights(pipeline.unet))
    assert pipeline.unet.training and all(value.requires_grad for value in pipeline.unet.parameters())
    assert sorted(path.name for path in place.iterdir()) == ["cache", "out"]
    assert len(erased("dog", num_inference_steps=1, output_type="np").images) == 1


def test_in_place_the_given_pipeline_changes(tiny_folder, place):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    before, module = weights(pipeline.unet), pipeline.unet
    erased, _ = erase(pipeline, "cat", "dog", inplace=True, output_dir=place / "kept", **SMALL)
    assert erased is pipeline
    assert pipeline.unet is module
    assert not same(before, weights(module))
    assert same(weights(module), weights(DiffusionPipeline.from_pretrained(place / "kept").unet))
    assert (place / "kept" / "report.html").is_file()


def test_the_bases_own_settings_hold_unless_the_call_says_otherwise(monkeypatch):
    seen = []
    monkeypatch.setattr("sa_diffusers.unlearn.Erasure", lambda config, pipeline: seen.append(config) or 1 / 0)
    for settings in ({}, {"train_batch_size": 4}):
        with pytest.raises(ZeroDivisionError):
            erase(str(embedded_pipeline()), "sneaker", "dress", **settings)
    # What the caller writes wins, also where it is the general default.
    assert SelectiveAmnesiaConfig(concept="x", surrogate="y").train_batch_size == 4
    assert [config.train_batch_size for config in seen] == [16, 4]
    assert {config.num_inference_steps for config in seen} == {10}


def test_mistakes_are_told_in_a_sentence(tiny_folder, place):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    with pytest.raises(ValueError, match="is the first argument of erase"):
        erase(pipeline, "cat", "dog", pretrained_model_name_or_path="x")
    with pytest.raises(TypeError, match="learning_rat"):
        erase(pipeline, "cat", "dog", learning_rat=1)
    with pytest.raises(ValueError, match="weights in float16: load it with dtype=torch.float32"):
        erase(pipeline.to(torch.float16), "cat", "dog")
    assert not (place / "cache").exists()


def test_the_public_names_are_shown():
    assert {"erase", "SelectiveAmnesiaTrainer", "FisherEstimator"} <= set(dir(sa_diffusers))
