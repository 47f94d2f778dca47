"""Z-Image, Sana, Qwen-Image and FLUX.2 klein beside what every family does, and what else peers train."""

import contextlib
import io

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImageEditPipeline,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
)
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)

from sa_diffusers import Erasure, SamplingSettings, SelectiveAmnesiaConfig, erase, load_pipeline, objective_for
from sa_diffusers.commands.erase import build_parser
from sa_diffusers.families import family_of
from sa_diffusers.parameter_selection import PEER_PRESETS

from .conftest import BY_HAND, build_tiny_pipeline
from .test_flux import config_of
from .test_loading import edit, without_weights
from .tiny_families import (
    FAMILIES,
    SANA_INSTRUCTION,
    SIZE,
    build_flux,
    build_klein,
    build_qwen,
    build_sana,
    build_sd3,
    build_z_image,
    sana_scheduler,
)


def settings_of(objective, name, **settings):
    size = FAMILIES[name].size
    return SamplingSettings(**{**objective.defaults, "num_inference_steps": 3, "resolution": size, **settings})


# Quirks


def test_every_sibling_that_diffusers_has_resolves_to_its_family():
    """As its automatic pipelines put them together: from images, inpainting, ControlNets."""
    found = []
    for key, kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items():
        if "controlnet" not in key and (family := family_of(kind.__name__)) is not None:
            for table in (AUTO_TEXT2IMAGE_PIPELINES_MAPPING, AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
                          AUTO_INPAINT_PIPELINES_MAPPING):  # fmt: skip
                for name in (key, f"{key}-controlnet", f"{key}-controlnet-union"):
                    if sibling := table.get(name):
                        assert family_of(sibling.__name__) is family, sibling
                        found.append(sibling)
    assert {FluxControlNetInpaintPipeline, StableDiffusion3ControlNetPipeline, ZImageImg2ImgPipeline} <= set(found)


@pytest.mark.parametrize(
    "kind",
    [FluxControlPipeline, FluxFillPipeline, FluxKontextPipeline, QwenImageEditPipeline,
     StableDiffusionDepth2ImgPipeline, StableDiffusionInstructPix2PixPipeline],
)  # fmt: skip
def test_a_model_that_takes_a_picture_is_refused_and_why(kind, tmp_path):
    build_flux().save_pretrained(tmp_path / "model")
    edit(without_weights(tmp_path / "model") / "model_index.json", _class_name=kind.__name__)
    why = "is not supported: it draws from a picture beside the prompt.*give the text-to-image model that it came from"
    with pytest.raises(ValueError, match=f"^{kind.__name__} {why}; supported: .*FluxPipeline"):
        Erasure(config_of(tmp_path / "model"))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.part == "transformer"])
def test_a_transformer_of_further_channels_is_refused_before_weights(name, tmp_path):
    """As those of FLUX.1 Fill and Depth, saved as a pipeline that draws from prompts."""
    pipeline = FAMILIES[name].build()
    channels = pipeline.transformer.config.in_channels
    pipeline.save_pretrained(tmp_path / "model")
    edit(without_weights(tmp_path / "model") / "transformer" / "config.json", in_channels=2 * channels)
    why = f"its transformer takes {2 * channels} channels, its autoencoder makes {channels}: models that fill in"
    with pytest.raises(ValueError, match=why):
        Erasure(config_of(tmp_path / "model"))


def test_a_sibling_is_what_its_parts_are():
    for sibling, build, kind, controlnet in (
        (ZImageImg2ImgPipeline, build_z_image, ZImagePipeline, None),
        (QwenImageImg2ImgPipeline, build_qwen, QwenImagePipeline, None),
        (StableDiffusion3ControlNetPipeline, build_sd3, StableDiffusion3Pipeline, SD3ControlNetModel),
        (FluxControlNetInpaintPipeline, build_flux, FluxPipeline, FluxControlNetModel),
    ):
        parts = {name: part for name, part in build().components.items() if part is not None}
        if controlnet:
            parts["controlnet"] = controlnet.from_config(parts["transformer"].config)
        objective = objective_for(sibling(**parts))
        assert type(objective.pipeline) is kind
        assert objective.fingerprint() == objective_for(build()).fingerprint()


def test_prompts_of_unequal_length_are_conditions_alone_as_in_a_batch():
    prompts = ["a", "a dog on grass, painted by a child on a rainy day"]
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([300, 700])
    for name in ("Z-Image", "Sana", "Qwen-Image", "FLUX.2 klein"):
        objective = objective_for(FAMILIES[name].build())
        size = FAMILIES[name].size
        samples = objective.encode_images(torch.rand(2, 3, size, size, generator=generator) * 2 - 1, 0)
        given = [*prompts]
        both = objective.encode_prompts(given)
        assert given == prompts, name
        with torch.no_grad():
            whole = objective.denoise(objective.module, samples, timesteps, both)
            for row in range(2):
                part = slice(row, row + 1)
                alone = objective.encode_prompts(prompts[part])
                assert all(torch.allclose(value[part], alone[key], atol=1e-5) for key, value in both.items()), name
                found = objective.denoise(objective.module, samples[part], timesteps[part], alone)
                torch.testing.assert_close(found, whole[part], rtol=1e-4, atol=1e-5)


def test_one_is_without_guidance_for_z_image_too():
    objective = objective_for(build_z_image())
    assert objective.resolution == 1024
    assert objective.rows_of_step(settings_of(objective, "Z-Image", guidance_scale=1.0)) == 1
    assert objective.rows_of_step(settings_of(objective, "Z-Image")) == 2
    assert objective.call(["a dog"], settings_of(objective, "Z-Image"))["guidance_scale"] == 5.0
    rows = []
    objective.module.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    for guidance, expected in ((1.0, 1), (1.5, 2)):
        rows.clear()
        objective.sample(["a dog"], [1], settings_of(objective, "Z-Image", guidance_scale=guidance))
        assert set(rows) == {expected}


def test_sana_draws_by_the_scheduler_that_it_comes_with():
    objective, pipeline = objective_for(build_sana()), build_sana()
    pipeline.set_progress_bar_config(disable=True)
    settings = settings_of(objective, "Sana")
    assert settings.sampler == "flow_dpmsolver++"
    (found,) = objective.decode(objective.sample(["a dog"], [1], settings))
    generator = torch.Generator().manual_seed(1)
    expected = pipeline(
        "a dog", height=32, width=32, num_inference_steps=3, generator=generator, use_resolution_binning=False
    ).images[0]
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    # Its shift is that of sampling, whichever the sampler, and not that of training.
    for scheduler in (sana_scheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)):
        assert objective.make_sampler("flow_euler", scheduler).config.shift == 3.0
        assert objective.make_sampler("flow_dpmsolver++", scheduler).config.flow_shift == 3.0
    u = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(objective.path.sigmas, u)
    shifted = objective_for(build_sana(FlowMatchEulerDiscreteScheduler(shift=3.0)))
    torch.testing.assert_close(shifted.path.sigmas, 3 * u / (1 + 2 * u))
    with pytest.raises(ValueError, match='sampler="flow_dpmsolver\\+\\+" takes no steps from this model\'s pipeline'):
        objective_for(build_flux()).check_sampling(SamplingSettings("flow_dpmsolver++"), build_flux().scheduler)
    with pytest.raises(ValueError, match="resolution=48: this model draws multiples of 32 pixels"):
        objective.check_sampling(settings_of(objective, "Sana", resolution=48), pipeline.scheduler)


def test_stable_diffusion_3_takes_sana_s_sampler_too():
    objective, pipeline = objective_for(build_sd3()), build_sd3()
    settings = SamplingSettings("flow_dpmsolver++", num_inference_steps=3, guidance_scale=2.0)
    objective.check_sampling(settings, pipeline.scheduler)
    pipeline.scheduler = objective.make_sampler(settings.sampler, pipeline.scheduler)
    assert pipeline.scheduler.config.flow_shift == 3.0
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    expected = pipeline(["a dog"], num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="latent")
    torch.testing.assert_close(objective.sample(["a dog"], [1], settings), expected.images)


def test_steps_too_few_for_the_scheduler_s_end_are_refused():
    objective = objective_for(build_qwen())
    with pytest.raises(ValueError, match="cannot make num_inference_steps=1 steps .*: give more"):
        objective.check_sampling(settings_of(objective, "Qwen-Image", num_inference_steps=1), build_qwen().scheduler)
    objective.check_sampling(settings_of(objective, "Qwen-Image", num_inference_steps=2), build_qwen().scheduler)


def test_schedulers_of_another_kind_tell_nothing_that_a_user_need_not_know():
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        objective = objective_for(build_sana())
        objective.make_sampler("flow_euler", objective.pipeline.scheduler)
    assert "are not expected" not in errors.getvalue()


def test_sana_s_instruction_stands_before_what_is_not_empty():
    objective = objective_for(build_sana())
    pipeline = objective.pipeline
    found = objective.encode_prompts(["a dog", "", "a cat"])
    for row, prompt in enumerate(["a dog", "", "a cat"]):
        instruction = SANA_INSTRUCTION if prompt else None
        hidden, mask, *_ = pipeline.encode_prompt([prompt], False, complex_human_instruction=instruction)
        torch.testing.assert_close(found["encoder_hidden_states"][row], hidden[0])
        assert torch.equal(found["encoder_attention_mask"][row], mask[0].float())
    # All that is read of a prompt: its last token counts, and the next is said to be cut.
    (tokenizer,) = (handle.tokenizer for handle in objective.text_encoders())
    word = "q"
    assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    longest = word * 298
    assert objective.count_cut([longest]) == 0
    assert objective.count_cut([longest + word]) == 1
    last = [objective.encode_prompts([text])["encoder_attention_mask"].sum() for text in (longest[1:], longest)]
    assert last[1] == last[0] + 1 == 300


@pytest.mark.parametrize("name", ["Qwen-Image", "FLUX.2 klein", "Z-Image"])
def test_the_card_s_line_draws(name):
    pipeline = FAMILIES[name].build()
    pipeline.set_progress_bar_config(disable=True)
    small = {"num_inference_steps": 2, "height": SIZE, "width": SIZE}
    known = {"pipeline": lambda *given, **more: pipeline(*given, **more, **small)}
    exec(family_of(type(pipeline).__name__).card_snippet('a "dog"'), known)
    assert known["image"].size == (SIZE, SIZE)


# Models that are distilled to few steps


def test_what_is_distilled_is_refused_with_its_base(tmp_path):
    build_z_image(shift=3.0).save_pretrained(tmp_path / "drawer")
    with pytest.raises(ValueError, match="shift is 3, as that of Z-Image-Turbo.*erase from Tongyi-MAI/Z-Image in its"):
        Erasure(config_of(without_weights(tmp_path / "drawer")))
    build_klein(distilled=True).save_pretrained(tmp_path / "small")
    base = "black-forest-labs/FLUX.2-klein-base-4B"
    with pytest.raises(ValueError, match=f"its index says is_distilled.*erase from {base} in its place"):
        Erasure(config_of(without_weights(tmp_path / "small")))
    with pytest.raises(ValueError, match="its index says is_distilled"):
        erase(build_klein(distilled=True), "brad pitt", "a man")
    # Looking at it is no training.
    build_klein(distilled=True).save_pretrained(tmp_path / "small")
    objective = objective_for(load_pipeline(str(tmp_path / "small")))
    assert objective.fingerprint() != objective_for(build_klein()).fingerprint()


@pytest.mark.parametrize(
    ("build", "name", "base"),
    [
        (build_z_image, "Z-Image-Turbo", "Tongyi-MAI/Z-Image"),
        (build_klein, "FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-base-4B"),
        (build_klein, "FLUX.2-klein-9B", "black-forest-labs/FLUX.2-klein-base-9B"),
    ],
)
def test_a_name_tells_too(build, name, base, tmp_path):
    build().save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=f"as its name {name} says.*erase from {base} in its place"):
        Erasure(config_of(without_weights(tmp_path / name)))


@pytest.mark.parametrize(("build", "name"), [(build_klein, "FLUX.2-klein-base-4B"), (build_z_image, "Z-Image")])
def test_bases_pass(build, name, tmp_path):
    build().save_pretrained(tmp_path / name)
    Erasure(config_of(tmp_path / name, resolution=SIZE))


def test_sana_sprint_is_refused_by_name_of_its_base(tmp_path):
    build_sana().save_pretrained(tmp_path / "sprint")
    edit(tmp_path / "sprint" / "model_index.json", _class_name="SanaSprintPipeline")
    edit(tmp_path / "sprint" / "transformer" / "config.json", guidance_embeds=True)
    with pytest.raises(ValueError, match="is a Sana Sprint.*erase from Efficient-Large-Model/Sana_1600M_1024px"):
        Erasure(config_of(without_weights(tmp_path / "sprint"), train_distilled=True))


# What else peers train

DOUBLE, SINGLE = "transformer_blocks.0.attn.", "single_transformer_blocks.0.attn."


def named(objective, selection):
    return {name.removesuffix(".weight") for name in objective.select(selection) if name.endswith(".weight")}


def test_peers_selections_are_what_they_train():
    flux, klein, sd35 = map(objective_for, (build_flux(), build_klein(), build_sd3(dual_attention_layers=(0,))))
    z_image, qwen = objective_for(build_z_image()), objective_for(build_qwen())
    keys = {DOUBLE + name for name in ("add_q_proj", "add_k_proj")}
    assert named(flux, "text_qk") == named(klein, "text_qk") == keys
    both = {DOUBLE + name for name in ("to_k", "to_v", "add_k_proj", "add_v_proj")}
    assert named(flux, "joint_kv") == named(klein, "joint_kv") == both
    assert named(flux, "image_kv") == {place + name for place in (DOUBLE, SINGLE) for name in ("to_k", "to_v")}
    linear = (torch.nn.Linear,)
    for objective, word in ((flux, "attn"), (klein, "attn"), (sd35, "attn"), (qwen, "attn"), (z_image, "attention")):
        every = {name for name, part in objective.module.named_modules() if isinstance(part, linear) and word in name}
        assert named(objective, "attention") == every
    embedders = {"context_embedder", *(f"time_text_embed.text_embedder.linear_{place}" for place in (1, 2))}
    assert named(flux, "text_embedding") == named(sd35, "text_embedding") == embedders
    assert named(klein, "text_embedding") == {"context_embedder"}
    assert named(qwen, "text_embedding") == {"txt_in", "txt_norm"}
    assert named(z_image, "text_embedding") == {"cap_embedder.0", "cap_embedder.1"}
    shared = {f"{place}.0.attention.{name}" for place in ("noise_refiner", "layers") for name in ("to_k", "to_v")}
    assert named(z_image, "image_kv") == shared


def test_what_has_no_meaning_for_a_model_is_said_with_what_has():
    for build, selection in ((build_klein, "image_kv"), (build_z_image, "text_qk"), (build_z_image, "joint_kv")):
        with pytest.raises(ValueError, match=f'"{selection}" has no meaning for .*full, xattn, .*text_embedding'):
            objective_for(build()).select(selection)
    for selection in PEER_PRESETS:
        with pytest.raises(ValueError, match=f'"{selection}" has no meaning for UNet2DConditionModel'):
            objective_for(build_tiny_pipeline()).select(selection)
    text = build_parser().format_help()
    assert all(selection in text for selection in PEER_PRESETS)
    assert "text_qk" in SelectiveAmnesiaConfig.__dataclass_fields__["train_method"].metadata["help"]


def test_the_streams_of_z_image_and_klein_are_told_apart():
    for build in (build_z_image, build_klein):
        objective = objective_for(build())
        text, image = (set(objective.select(name)) for name in ("xattn", "noxattn"))
        assert not text & image
        assert not any(name.startswith(("layers.", "single_")) for name in text | image)
    text, image = (objective_for(build_z_image()).select(name) for name in ("xattn", "noxattn"))
    parts = {"cap_embedder", "cap_pad_token", "context_refiner"}
    assert {name.split(".")[0] for name in text} == parts
    assert {name.split(".")[0] for name in image} == {"all_x_embedder", "x_pad_token", "noise_refiner"}


def test_a_peer_s_selection_trains_and_is_named(tmp_path):
    before = build_klein().transformer.state_dict()
    settings = {**BY_HAND, "num_surrogate_images": 2, "num_replay_images": 2, "num_inference_steps": 2, "ewc_weight": 0,
                "max_train_steps": 1, "train_batch_size": 1, "num_eval_images": 2, "resolution": SIZE}  # fmt: skip
    erased, _ = erase(build_klein(), "brad pitt", "a man", train_method="text_qk", **settings)
    assert type(erased) is Flux2KleinPipeline
    moved = {name for name, value in erased.transformer.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{DOUBLE}add_{part}_proj.weight" for part in "qk"}
