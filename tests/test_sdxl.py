"""SDXL beside what every family does: its siblings, what is refused of it, and attacks on both text encoders."""

import json

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    EDMEulerScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

import sa_diffusers
from sa_diffusers import SamplingSettings, load_pipeline, objective_for
from sa_diffusers.evaluation.attacks import Inversion
from sa_diffusers.evaluation.attacks.inversion import INVERTED_TOKEN, invert
from sa_diffusers.families import SUPPORTED_PIPELINES, family_in

from .conftest import BY_HAND
from .test_loading import edit, refused, without_weights
from .tiny_families import build_xl


@pytest.fixture
def folder(tmp_path):
    build_xl().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def siblings():
    parts = build_xl().components
    pictures = {"image_encoder": None, "feature_extractor": None}
    controlnet = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    return [
        StableDiffusionXLImg2ImgPipeline(**parts),
        StableDiffusionXLInpaintPipeline(**parts),
        StableDiffusionXLControlNetPipeline(**{**parts, **pictures}, controlnet=controlnet),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_sibling_is_erased_as_the_pipeline_of_its_parts(number, tmp_path):
    sibling = siblings()[number]
    plain = objective_for(build_xl())
    objective = objective_for(sibling)
    assert objective.module is sibling.unet
    settings = SamplingSettings(num_inference_steps=2, guidance_scale=3)
    assert torch.equal(objective.sample(["a dog"], [1], settings), plain.sample(["a dog"], [1], settings))
    sibling.save_pretrained(tmp_path / "sibling")
    loaded = load_pipeline(str(tmp_path / "sibling"), kinds=SUPPORTED_PIPELINES)
    assert objective_for(loaded).fingerprint() == plain.fingerprint()
    objective.save(tmp_path / "saved")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "saved")) is StableDiffusionXLPipeline


def test_a_pipeline_in_memory_forgets_in_one_call():
    pipeline = siblings()[0]
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    settings = {**BY_HAND, "num_surrogate_images": 2, "num_replay_images": 2, "num_inference_steps": 2, "ewc_weight": 0,
                "max_train_steps": 1, "train_batch_size": 1, "num_eval_images": 2}  # fmt: skip
    erased, _ = sa_diffusers.erase(pipeline, "brad pitt", "a man", train_method="xattn", **settings)
    assert type(erased) is StableDiffusionXLPipeline
    after = erased.unet.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".attn2." in name for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())


def test_guidance_is_that_of_sdxl_unless_it_is_said(folder):
    assert family_in(str(folder)).defaults["guidance_scale"] == 5.0
    config = sa_diffusers.SelectiveAmnesiaConfig(
        concept=["brad pitt"], surrogate=["a man"], pretrained_model_name_or_path=str(folder), report_to="none"
    )
    assert sa_diffusers.Erasure(config).config.guidance_scale == 5.0
    assert sa_diffusers.Erasure(config.replace(guidance_scale=7.5)).config.guidance_scale == 7.5


def test_a_refiner_is_refused_before_weights(folder):
    edit(without_weights(folder) / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline",
         text_encoder=[None, None], tokenizer=[None, None], requires_aesthetics_score=True)  # fmt: skip
    assert "as a refiner has" in refused(folder, kinds=SUPPORTED_PIPELINES)
    parts = build_xl().components
    refiner = StableDiffusionXLImg2ImgPipeline(**{**parts, "text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match="as a refiner has"):
        objective_for(refiner)


def test_an_inpainting_unet_is_refused(folder):
    edit(without_weights(folder) / "unet" / "config.json", in_channels=9)
    edit(folder / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    assert (
        "its UNet takes 9 channels, its autoencoder makes 4: what it takes beside them (as for inpainting"
        in refused(folder)
    )
    parts = build_xl().components
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)
    with pytest.raises(ValueError, match="its UNet takes 9 channels, its autoencoder makes 4: .*as for inpainting"):
        objective_for(StableDiffusionXLInpaintPipeline(**parts))


def test_another_noise_or_other_latents_are_refused(folder):
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    assert "EDMEulerScheduler, the model's scheduler, does not say by betas" in refused(without_weights(folder))
    build_xl().scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    assert "channel by channel (latents_mean)" in refused(folder)
    edit(folder / "vae" / "config.json", latents_mean=None, latents_std=None)
    edit(folder / "text_encoder_2" / "config.json", hidden_size=20)
    assert "takes text embeddings of 24 numbers, its text encoders give 28" in refused(folder)


def test_the_empty_prompt_is_what_guides():
    for zeros in (True, False):
        objective = objective_for(build_xl(zeros=zeros))
        conditions = objective.encode_prompts(["", "a dog"])
        assert [bool(value.any()) for value in conditions["encoder_hidden_states"]] == [not zeros, True]
        assert [bool(value.any()) for value in conditions["text_embeds"]] == [not zeros, True]
    prints = {objective_for(build_xl(zeros=zeros)).fingerprint() for zeros in (True, False)}
    assert len(prints) == 2


def test_min_snr_weighs_the_loss():
    generator = torch.Generator().manual_seed(0)
    samples, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([50, 900])
    plain, weighted = (objective_for(build_xl(), snr_gamma=gamma) for gamma in (None, 5.0))
    conditions = plain.encode_prompts(["a dog", "a cat"])
    with torch.no_grad():
        losses = [one.negative_elbo(one.module, samples, conditions, timesteps, noise) for one in (plain, weighted)]
    keep = plain.noise_schedule.alphas_cumprod[timesteps]
    snr = keep / (1 - keep)
    torch.testing.assert_close(losses[1], losses[0] * snr.clamp(max=5.0) / snr)


def test_a_token_is_learned_in_both_text_encoders():
    objective = objective_for(build_xl())
    samples = objective.sample(["brad pitt"] * 2, [1, 2], SamplingSettings(num_inference_steps=2, guidance_scale=1))
    starts = [handle.encoder.get_input_embeddings().weight.clone() for handle in objective.text_encoders()]
    losses = invert(objective, samples, Inversion(4, 2, 2, 0.05, "man"))
    assert len(losses) == 4
    for handle, start in zip(objective.text_encoders(), starts, strict=True):
        token = handle.tokenizer.convert_tokens_to_ids(INVERTED_TOKEN)
        table = handle.encoder.get_input_embeddings().weight
        assert torch.equal(table[: len(start)], start)
        begun = handle.tokenizer("man", add_special_tokens=False)["input_ids"][-1]
        assert not torch.allclose(table[token], start[begun])


def test_a_prompt_is_seen_if_one_encoder_reads_it():
    objective = objective_for(build_xl())
    long = "x" * 40 + " brad pitt"
    assert "reads 32 tokens" in objective.why_unseen(long, "brad pitt")
    assert objective.count_cut([long, "brad pitt"]) == 1
    objective.pipeline.tokenizer_2.model_max_length = (
        objective.pipeline.text_encoder_2.config.max_position_embeddings
    ) = 64
    assert objective.why_unseen(long, "brad pitt") is None
    assert objective.count_cut([long, "brad pitt"]) == 0
    assert objective.means_the_same("a dog", "A  dog")
    assert not objective.means_the_same("a dog", "a cat")


def test_its_index_names_the_family(folder):
    assert family_in(str(folder)).kind == "stable-diffusion-xl"
    assert family_in("StableDiffusionXLControlNetPipeline").kind == "stable-diffusion-xl"
    assert family_in("nobody/nothing") is None
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "NoPipeline"}))
    assert family_in(str(folder)) is None
