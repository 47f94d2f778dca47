"""A pipeline that brings adapters of its own: refused, or fused into its weights on request."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open

from sa_diffusers import Erasure, SelectiveAmnesiaConfig, SelectiveAmnesiaTrainer, erase, load_pipeline
from sa_diffusers.commands import main
from sa_diffusers.families.adapters import ADAPTER_FILE
from sa_diffusers.publish import build_model_card

from .conftest import as_flags, run_here
from .test_adapters import images
from .test_unlearn import SMALL, same, weights

STYLE = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


def styled(folder, strength=0.5):
    """The tiny pipeline with somebody's adapter in it."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(3)
    pipeline.unet.add_adapter(STYLE, adapter_name="style")
    pipeline.set_adapters("style", strength)
    return pipeline


@pytest.fixture
def settings(tiny_settings):
    return {**tiny_settings, "fuse_adapters": True, "learning_rate": 1e-2, "ewc_weight": 0.0}


@pytest.fixture
def as_adapter(settings):
    return {**settings, "adapter": "lora", "lora_rank": 2}


@pytest.fixture
def fused_folder(tiny_folder, tmp_path):
    """The base model as a user would save it, with the style fused into it."""
    pipeline = styled(tiny_folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def test_they_are_refused_by_a_sentence_that_names_the_setting(settings, tiny_folder):
    with pytest.raises(ValueError, match=r"unet has LoRA adapters loaded.*with fuse_adapters, or fuse and unload"):
        Erasure(SelectiveAmnesiaConfig(**{**settings, "fuse_adapters": False}), pipeline=styled(tiny_folder))


def test_the_erasure_is_that_of_the_fused_weights(settings, tiny_folder, fused_folder):
    config = SelectiveAmnesiaConfig(**settings)
    pipeline = styled(tiny_folder)
    before = images(pipeline)
    erasure = Erasure(config, pipeline=pipeline)
    assert erasure.subject.fused == ["style at strength 0.5"]
    np.testing.assert_allclose(images(pipeline), before, atol=1e-4)
    assert erasure.base != Erasure(config, pipeline=styled(tiny_folder, 0.25)).base
    own = config.replace(fuse_adapters=False)
    assert erasure.base == Erasure(own, pipeline=DiffusionPipeline.from_pretrained(fused_folder)).base
    assert erasure.base != Erasure(own).base
    # What is fused already is told too, and asked for again it is no mistake.
    assert Erasure(config, pipeline=pipeline).subject.fused == ["style"]
    assert Erasure(own, pipeline=pipeline).base == erasure.base


def test_an_adapter_on_top_says_so_wherever_it_goes(as_adapter, tiny_folder, fused_folder, tmp_path):
    trainer = SelectiveAmnesiaTrainer(styled(tiny_folder), SelectiveAmnesiaConfig(**as_adapter))
    trainer.train()
    whole = images(trainer.pipeline)
    output = Path(as_adapter["output_dir"])
    with safe_open(output / ADAPTER_FILE, "pt") as file:
        assert json.loads(file.metadata()["fused_adapters"]) == ["style at strength 0.5"]
    assert json.loads((output / "selective_amnesia.json").read_text())["fuse_adapters"] is True
    report = trainer.evaluate()
    assert report.handed_in == {"adapters fused into the base model": "style at strength 0.5"}
    card = build_model_card(output).content
    assert "with adapters fused into its weights first (style at strength 0.5), so that what it was trained on" in card
    assert "# First load what was fused into it: style at strength 0.5\n" in card
    assert "on the published model alone it was not measured" in card
    assert "| `fuse_adapters` | True |" in card
    result = run_here(main, ["merge", output, "--output_dir", tmp_path / "merged"], tmp_path)
    assert "with adapters fused into it (style at strength 0.5), which is another model" in result.stderr
    arguments = ["merge", output, "--base", fused_folder, "--output_dir", tmp_path / "merged"]
    result = run_here(main, arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(images(DiffusionPipeline.from_pretrained(tmp_path / "merged")), whole, atol=1e-4)
    # Beside the adapter that was fused it is the same model.
    pipeline = styled(tiny_folder)
    pipeline.load_lora_weights(output, adapter_name="erasure")
    pipeline.set_adapters(["style", "erasure"], [0.5, 1.0])
    np.testing.assert_allclose(images(pipeline), whole, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"adapter": "lora", "lora_rank": 2}], ids=["weights", "adapter"])
def test_one_call_leaves_the_given_pipeline_and_its_adapter_alone(more, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SA_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    pipeline = styled(tiny_folder)
    before, held = images(pipeline), weights(pipeline.unet)
    erased, report = erase(pipeline, "cat", "dog", fuse_adapters=True, **{**SMALL, **more, "learning_rate": 1e-2})
    assert report.rows
    assert same(held, weights(pipeline.unet))
    assert pipeline.get_active_adapters() == ["style"]
    assert np.array_equal(images(pipeline), before)
    assert not np.allclose(images(erased), before, atol=1e-4)
    if more:
        erased.unload_lora_weights()
        np.testing.assert_allclose(images(erased), before, atol=1e-4)
    # In place the same comes of it.
    again, _ = erase(pipeline, "cat", "dog", fuse_adapters=True, inplace=True,
                     **{**SMALL, **more, "learning_rate": 1e-2})  # fmt: skip
    assert again is pipeline
    if more:
        again.unload_lora_weights()
    assert same(weights(again.unet), weights(erased.unet))


def test_a_text_encoder_s_adapters_are_fused_too(settings, tiny_folder):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    torch.manual_seed(3)
    style = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(style, pipeline.text_encoder, "words")
    before = images(pipeline)
    erasure = Erasure(SelectiveAmnesiaConfig(**settings), pipeline=pipeline)
    assert erasure.subject.fused == ["words at strength 1"]
    np.testing.assert_allclose(images(pipeline), before, atol=1e-4)
    assert not [name for name, _ in pipeline.text_encoder.named_parameters() if "lora" in name]


def test_what_cannot_be_fused_is_refused_before_the_work(settings, tiny_folder, tmp_path):
    config = SelectiveAmnesiaConfig(**settings)
    result = run_here(main, ["erase", *as_flags(settings)], tmp_path)
    assert "error: fuse_adapters: the pipeline has no adapters" in result.stderr
    pipeline = styled(tiny_folder)
    pipeline.disable_lora()
    with pytest.raises(ValueError, match="fuse_adapters: the pipeline's adapters are switched off"):
        Erasure(config, pipeline=pipeline)
    pipeline = styled(tiny_folder)
    with torch.no_grad():
        next(value for name, value in pipeline.unet.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match="fuse_adapters: the pipeline's adapters could not be fused .*load the"):
        Erasure(config, pipeline=pipeline)
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv_in"]), pipeline.vae)
    with pytest.raises(ValueError, match="neither loads nor fuses adapters of its vae"):
        Erasure(config, pipeline=pipeline)
    assert not (tmp_path / "artifacts").exists()


def test_what_was_saved_with_adapters_or_is_one_is_no_base_model(tiny_folder, tmp_path):
    """Plain diffusers loads random values in place of such layers, and warns."""
    pipeline = styled(tiny_folder)
    pipeline.save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="was saved while adapters were loaded, and is no whole model"):
        load_pipeline(str(tmp_path / "mixed"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / ADAPTER_FILE).touch()
    with pytest.raises(
        ValueError,
        match="holds an adapter: give .*, or fuse the two with `sa-diffusers merge`",
    ):
        load_pipeline(str(tmp_path / "adapter"))
