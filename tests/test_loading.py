"""From a name or a folder to an objective: what is refused, in which words, and before weights are read."""

import inspect
import json
import re
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from sa_diffusers import SamplingSettings, load_pipeline, objective_for
from sa_diffusers.commands.erase import main
from sa_diffusers.configuration import SAMPLERS
from sa_diffusers.families import SUPPORTED_PIPELINES
from sa_diffusers.families.samplers import check_flow_scheduler
from sa_diffusers.families.weight_files import lacking
from sa_diffusers.weights import explain_weights_error, find_broken_weights, weights_fault

from .conftest import build_tiny_pipeline, run_here
from .test_train_script import quick
from .tiny_families import FAMILIES

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 335000000\n"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_weights(folder):
    """A pipeline whose weights cannot be read: what is refused now is refused before they are."""
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"no weights")
    return folder


def refused(folder, **options):
    with pytest.raises(ValueError) as error:
        load_pipeline(str(folder), **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


# Weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER.encode(), "is a pointer of git-lfs, not the weights themselves: run `git lfs pull`"),
        (b"", "is empty: download it again"),
        (b"abc", "is cut short"),
        (b"\xff" * 100, "is not safetensors"),
        (b"\x08" + b"\0" * 7 + b"nonsense", "is damaged"),
    ],
)
@pytest.mark.parametrize("part", ["text_encoder/model", "unet/diffusion_pytorch_model"])
def test_weights_that_are_none_are_named(folder, part, content, message):
    file = folder / f"{part}.safetensors"
    file.write_bytes(content)
    assert f"{file} {message}" in refused(folder)
    assert str(file) in find_broken_weights(folder)
    assert explain_weights_error(folder, RuntimeError("obscure")) == find_broken_weights(folder)


def test_weights_cut_anywhere_are_named(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    assert weights_fault(file) is None
    for length in (5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert f"{file} is cut short" in refused(folder)
    file.write_bytes(whole + b"\0")
    assert f"{file} is damaged" in refused(folder)
    file.unlink()
    assert "could not be loaded" in refused(folder)
    assert explain_weights_error(folder, RuntimeError("first line\nsecond")) == "first line"


def test_shards_that_are_missing_are_named(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "model", max_shard_size="50KB")
    shards = sorted((tmp_path / "model" / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    load_pipeline(str(tmp_path / "model"))
    shards[-1].unlink()
    assert f"{shards[-1]} is missing" in find_broken_weights(tmp_path / "model")
    assert f"{shards[-1]} is missing" in refused(tmp_path / "model")


def test_shards_that_no_index_names_are_not_read_and_not_drawn_at_random(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path, max_shard_size="50KB")
    shutil.rmtree(tmp_path / "text_encoder")
    build_tiny_pipeline().text_encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="10KB")
    load_pipeline(str(tmp_path))
    for part in ("unet", "text_encoder"):
        (index,) = (tmp_path / part).glob("*.index.json")
        whole = index.read_text()
        named = json.loads(whole)["weight_map"]
        first = min(named.values())
        for damaged in (dict.fromkeys(named, first), {name: file for name, file in named.items() if file == first}):
            edit(index, weight_map=damaged)
            assert f"{part} lacks " in refused(tmp_path)
        index.write_text(whole)
    load_pipeline(str(tmp_path))


def test_a_part_whose_files_lack_a_tensor_is_not_drawn_at_random(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.bias"], tensors["conv_out.bias"]
    save_file(tensors, file, {"format": "pt"})
    assert "unet lacks conv_in.bias and 1 more: download it again" in refused(folder)
    pipeline = build_tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=1, target_modules=["conv_in"]))
    pipeline.save_pretrained(folder)
    assert "unet lacks conv_in.weight and 1 more: it was saved while adapters were loaded, and" in refused(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_encoder_whose_files_lack_a_tensor_is_not_drawn_at_random(name, tmp_path):
    """Files hold tied weights once, and other versions of transformers have other names: nothing lacks for that."""
    FAMILIES[name].build().save_pretrained(tmp_path)
    pipeline = load_pipeline(str(tmp_path))
    for part in [part for part in pipeline.components if part.startswith("text_encoder")]:
        (file,) = (tmp_path / part).glob("*.safetensors")
        tensors = load_file(file)
        lost = next(key for key in tensors if key.endswith(("k_proj.weight", ".k.weight")))
        save_file({key: value for key, value in tensors.items() if key != lost}, file, {"format": "pt"})
        told = refused(tmp_path)
        assert f"{part} lacks " in told and lost.split(".", 1)[-1] in told
        if type(getattr(pipeline, part)).__name__ == "CLIPTextModel":
            earlier = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}
            tensors = {**earlier, "text_model.embeddings.position_ids": torch.arange(77)[None]}
        save_file(tensors, file, {"format": "pt"})
    again = load_pipeline(str(tmp_path))
    assert objective_for(again).fingerprint() == objective_for(pipeline).fingerprint()


def test_what_quantising_adds_to_a_state_is_not_lacking(folder):
    """As bitsandbytes does with weights of 4 bits: scales and tables beside the weight, under its name."""
    module = build_tiny_pipeline().unet
    module.conv_in.register_state_dict_post_hook(
        lambda layer, state, prefix, _: state.update({f"{prefix}weight.absmax": torch.ones(1)})
    )
    files = ["unet/diffusion_pytorch_model.safetensors"]
    assert "conv_in.weight.absmax" in module.state_dict()
    assert lacking({"unet": module}, folder, files, None) is None
    file = folder / files[0]
    save_file({name: value for name, value in load_file(file).items() if name != "conv_in.bias"}, file)
    assert "unet lacks conv_in.bias: download it again" in lacking({"unet": module}, folder, files, None)


def test_attention_of_old_autoencoders_has_other_names_and_lacks_nothing(tmp_path):
    pipeline, names = build_tiny_pipeline(), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pipeline.vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), scaling_factor=1.0)
    pipeline.save_pretrained(tmp_path)
    file, renamed = tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {}
    for name, value in load_file(file).items():
        for new, old in names.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    assert any(".query." in name for name in renamed)
    save_file(renamed, file, {"format": "pt"})
    loaded = load_pipeline(str(tmp_path)).vae.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in pipeline.vae.state_dict().items())


def test_weights_of_one_variant_only_are_found_and_told_of(tmp_path):
    build_tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "model", variant="fp16")
    with pytest.warns(UserWarning, match="has weights of the variant fp16 only: loaded as with --variant fp16"):
        pipeline = load_pipeline(str(tmp_path / "model"))
    assert {value.dtype for value in pipeline.unet.parameters()} == {torch.float32}
    asked = load_pipeline(str(tmp_path / "model"), variant="fp16")
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, asked.unet.state_dict()[name]), name
    assert refused(tmp_path / "model", variant="bf16")


@pytest.mark.parametrize("earlier", [False, True], ids=["as now", "as earlier versions named them"])
def test_shards_of_a_variant_are_found(tmp_path, earlier):
    """model.fp16-00001-of-00002.safetensors, or model-00001-of-00002.fp16.safetensors, each with an index."""
    folder = tmp_path / "model"
    pipeline = build_tiny_pipeline().to(torch.float16)
    pipeline.save_pretrained(folder, variant="fp16", max_shard_size="50KB")
    shards = sorted((folder / "unet").glob("*fp16-*-of-*.safetensors"))
    assert len(shards) > 1
    if earlier:
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
        index.write_text(re.sub(r"\.fp16(-\d+-of-\d+)", r"\1.fp16", index.read_text()))
        for shard in shards:
            shard.rename(shard.with_name(re.sub(r"\.fp16(-\d+-of-\d+)", r"\1.fp16", shard.name)))
    with pytest.warns(UserWarning, match="has weights of the variant fp16 only"):
        loaded = load_pipeline(str(folder))
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value.float(), loaded.unet.state_dict()[name]), name
    (shard, *_) = (folder / "unet").glob("*-00002-of-*.safetensors")
    shard.unlink()
    assert f"{shard} is missing" in find_broken_weights(folder)


def test_of_several_variants_one_must_be_named(tmp_path):
    for variant in ("fp16", "ema"):
        build_tiny_pipeline().save_pretrained(tmp_path / "model", variant=variant)
    assert "give --variant ema or --variant fp16" in refused(tmp_path / "model")


def test_plain_weights_come_before_variants_even_damaged_ones(folder, recwarn):
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.fp16.safetensors").write_text(POINTER)
    load_pipeline(str(folder))
    assert not [warning for warning in recwarn if "variant" in str(warning.message)]


def test_a_pickle_is_not_executed(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (weights,) = (folder / part).glob("*.safetensors")
        kept = weights.read_bytes()
        weights.unlink()
        torch.save({"trap": Trap()}, folder / part / f"{name}.bin")
        assert "could not be loaded" in refused(folder)
        assert not (tmp_path / "executed").exists()
        (folder / part / f"{name}.bin").unlink()
        weights.write_bytes(kept)


# Names


@pytest.mark.parametrize(
    "name", ["./modle", "modle/", "{}/modle", "C:\\models\\sd", ".\\sd", "a/b/c", "sd.safetensors"]
)
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(folder, monkeypatch, name):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("sa_diffusers.families.loading.why_unreachable", lambda *_: pytest.fail("the Hub was asked"))
    message = refused(name.format(folder.parent))
    assert "there is no such file or folder" in message
    if "modle" in name:
        assert "did you mean" in message and 'model"' in message


def test_a_name_that_is_nearly_a_folder_here_is_asked_about(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ConnectionError, match='did you mean "model"'):
        load_pipeline("modle")


def test_a_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert isinstance(load_pipeline("~/model"), StableDiffusionPipeline)
    assert "no such user" in refused("~nobody-of-that-name/model")


def test_pickles_and_files_of_a_pipeline_are_refused(folder, monkeypatch):
    monkeypatch.setattr("sa_diffusers.families.loading.why_unreachable", lambda *_: pytest.fail("the Hub was asked"))
    for name in ("single.ckpt", "single.pt", "single.bin"):
        (folder.parent / name).write_bytes(b"never read")
        assert "is a pickle, which may run code" in refused(folder.parent / name)
    assert f"give its folder, {folder}" in refused(folder / "model_index.json")
    assert f"did you mean {folder}?" in refused(folder / "unet")
    assert f"did you mean {folder}?" in refused(folder.parent)


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "x" * 5000, "a b", "\ud800", "-a", "a//b"])
def test_names_that_are_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, ConnectionError)) as error:
        load_pipeline(name)
    assert len(str(error.value)) < 900 and str(error.value).isprintable()


# Index and configurations, before weights


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"_class_name": 3}', '{"_class_name": "A", "unet": "x"}', "\xff"]
)
def test_a_damaged_index(folder, text):
    (folder / "model_index.json").write_bytes(text.encode("latin-1"))
    assert "model_index.json" in refused(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_damaged_or_missing_configuration(folder, part):
    file = folder / part / "config.json"
    file.write_text("{")
    assert f"{file} is not valid JSON" in refused(folder)
    file.unlink()
    assert f"{file} is missing" in refused(folder)


def test_other_kinds_are_refused_before_weights(folder):
    edit(without_weights(folder) / "model_index.json", _class_name="KandinskyPipeline")
    message = refused(folder, kinds=SUPPORTED_PIPELINES)
    assert message.startswith("KandinskyPipeline is not supported yet; supported: FluxPipeline (FLUX.1 dev), ")
    assert "StableDiffusionPipeline (Stable Diffusion 1 and 2), StableDiffusion3Pipeline" in message


@pytest.mark.parametrize(
    ("left", "lost"),
    [
        ([], "vocab.json and merges.txt"),
        (["tokenizer_config.json"], "vocab.json and merges.txt"),
        (["tokenizer_config.json", "vocab.json", "merges.txt"], None),
    ],
)
def test_a_tokenizer_without_its_vocabulary_is_refused(left, lost, tmp_path):
    """Of two, one alone: transformers makes one of the special tokens, and an encoder reads no prompt."""
    FAMILIES["SDXL"].build().save_pretrained(tmp_path)
    folder = tmp_path / "tokenizer_2"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    for file in [*folder.iterdir()]:
        if file.name not in left:
            file.unlink()
    if lost is None:
        assert len(load_pipeline(str(tmp_path)).tokenizer_2) == len(tokenizer["model"]["vocab"])
        return
    with pytest.raises(ValueError, match=f"tokenizer_2 lacks {lost}, so that no word of a prompt"):
        load_pipeline(str(tmp_path))


def test_nine_channels_are_refused_before_weights(folder):
    edit(without_weights(folder) / "unet" / "config.json", in_channels=9)
    message = refused(folder)
    assert (
        "its UNet takes 9 channels, its autoencoder makes 4: what it takes beside them (as for inpainting, " in message
    )
    edit(folder / "unet" / "config.json", in_channels=8)
    assert "(a depth, say, or a picture to edit) no prompt draws" in refused(folder)
    edit(folder / "unet" / "config.json", in_channels=4, out_channels=8)
    assert "its UNet gives 8 channels" in refused(folder)
    edit(folder / "unet" / "config.json", out_channels=4, cross_attention_dim=24)
    assert "takes text embeddings of 24 numbers, its text encoder gives 16" in refused(folder)
    edit(folder / "model_index.json", text_encoder=[None, None])
    assert "has no text_encoder" in refused(folder)


@pytest.mark.parametrize(
    "scheduler",
    [EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler(), TCDScheduler(),
     UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")],
    ids=lambda scheduler: type(scheduler).__name__,
)  # fmt: skip
def test_schedulers_without_known_noise_are_refused_before_weights(folder, scheduler):
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
    assert type(scheduler).__name__ in refused(without_weights(folder))
    pipeline = build_tiny_pipeline()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=type(scheduler).__name__):
        objective_for(pipeline)


@pytest.mark.parametrize("count", [10**9, 0, -3, None, "x", 1e3])
def test_timesteps_beyond_all_measure_are_refused_before_tables_are_made_of_them(folder, count):
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=count)
    assert f"says num_train_timesteps={count}, which is no whole number from 1 to 100,000" in refused(folder)
    flow = {"num_train_timesteps": count}
    with pytest.raises(ValueError, match="num_train_timesteps=.* which is no whole number"):
        check_flow_scheduler("FlowMatchEulerDiscreteScheduler", flow)
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=1000)
    load_pipeline(str(folder))


# Schedulers


def tiny_with(**settings):
    pipeline = build_tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    return pipeline


def test_zero_terminal_snr_contradicts_epsilon():
    pipeline = tiny_with(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="sets rescale_betas_zero_snr.*but the model predicts epsilon"):
        objective_for(pipeline)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        objective_for(tiny_with(rescale_betas_zero_snr=True, prediction_type="v_prediction"), "epsilon")
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="PNDMScheduler ignores rescale_betas_zero_snr"):
        objective_for(pipeline)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize(
    # A consistency model leaps to the data at each step, which the model here does not.
    "sampler",
    [name for name in SAMPLERS if name not in ("pndm", "lcm") and not name.startswith("flow_")],
)
def test_samplers_of_zero_terminal_snr_start_at_noise_and_find_the_data(sampler, spacing):
    """Data that is normally distributed, and a model that knows it."""
    mean, std = 0.3, 0.5
    objective = objective_for(
        tiny_with(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing=spacing)
    )
    scheduler = objective.make_sampler(sampler, objective.pipeline.scheduler)
    scheduler.set_timesteps(40)
    assert scheduler.timesteps[0] == 999
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4000, 1, 1, 1, generator=generator) * scheduler.init_noise_sigma
    options = {"generator": generator} if sampler in ("ddpm", "euler_ancestral_trailing") else {}
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(images, timestep).double()
        keep = objective.noise_schedule.alphas_cumprod[int(timestep)].double()
        signal, spread = keep.sqrt(), (1 - keep).sqrt()
        clean = mean + signal * std**2 / (keep * std**2 + 1 - keep) * (noisy - signal * mean)
        velocity = (signal * (noisy - signal * clean) / spread - spread * clean).float()
        images = scheduler.step(velocity, timestep, images, **options).prev_sample
    assert images.mean().item() == pytest.approx(mean, abs=0.03)
    assert images.std().item() == pytest.approx(std, abs=0.07)


def test_zero_terminal_snr_refuses_the_sampler_that_ignores_it():
    objective = objective_for(tiny_with(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    with pytest.raises(ValueError, match='sampler="pndm" ignores rescale_betas_zero_snr.*use one of ddim, ddpm, euler'):
        objective.make_sampler("pndm", objective.pipeline.scheduler)


def test_zero_terminal_snr_trains_to_finite_losses():
    objective = objective_for(tiny_with(rescale_betas_zero_snr=True, prediction_type="v_prediction"), snr_gamma=5.0)
    samples = torch.randn(2, 4, 8, 8)
    noise = torch.randn_like(samples)
    last = torch.tensor([999, 0])
    torch.testing.assert_close(objective.noise_schedule.add_noise(samples, noise, last)[0], noise[0])
    conditions = objective.encode_prompts(["cat", "dog"])
    assert objective.negative_elbo(objective.module, samples, conditions, last, noise).isfinite().all()
    drawn = objective.sample(["cat"], [0], SamplingSettings(num_inference_steps=3))
    assert drawn.isfinite().all()


def test_sizes_of_no_picture_and_scales_of_no_number_are_refused_before_weights(folder):
    without_weights(folder)
    for part, name, values in (
        ("unet", "sample_size", [None, 0, [2, 8]]),
        ("unet", "in_channels", [None, "x"]),
        ("vae", "scaling_factor", [None, 0, "x"]),
        ("vae", "latent_channels", [None, "x"]),
        ("unet", "norm_eps", [None, "x", [1]]),
        ("unet", "freq_shift", [None, "x"]),
        ("unet", "downsample_padding", [None, "x", True]),
        ("unet", "norm_num_groups", ["x"]),
        ("vae", "shift_factor", ["x", [1]]),
    ):
        file = folder / part / "config.json"
        whole = json.loads(file.read_text())[name]
        for value in values:
            edit(file, **{name: value})
            with pytest.raises(ValueError, match=re.escape(f"{name}={value}, which is no")):
                load_pipeline(str(folder))
        edit(file, **{name: whole})


def test_a_scale_may_be_a_whole_number(folder):
    digests = []
    for scale in (1, 1.0):
        edit(folder / "vae" / "config.json", scaling_factor=scale)
        digests.append(objective_for(load_pipeline(str(folder))).fingerprint())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("unet/config.json", {"attention_head_dim": 4}),
        ("unet/config.json", {"flip_sin_to_cos": False}),
        ("vae/config.json", {"norm_num_groups": 8}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 16}),
    ],
)
def test_what_no_weight_shows_makes_another_model(folder, file, values):
    """Else samples of the model as it was are reused, and a finished run takes its weights for those of this model."""
    whole = objective_for(load_pipeline(str(folder))).fingerprint()
    edit(folder / file, _diffusers_version="0.30.0")
    assert objective_for(load_pipeline(str(folder))).fingerprint() == whole
    edit(folder / file, **values)
    assert objective_for(load_pipeline(str(folder))).fingerprint() != whole


def test_a_tokenizer_that_sets_no_limit_is_refused(folder):
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(
        ValueError, match="tokenizer sets no limit: set model_max_length to 32 in tokenizer/tokenizer_c"
    ):
        objective_for(load_pipeline(str(folder)))


@pytest.mark.parametrize(
    ("file", "name"),
    [("text_encoder/config.json", "eos_token_id"), ("text_encoder/config.json", "layer_norm_eps"),
     ("tokenizer/tokenizer_config.json", "pad_token")],
)  # fmt: skip
def test_a_null_that_no_text_encoder_or_tokenizer_takes_is_one_sentence(folder, tmp_path, file, name):
    edit(folder / file, **{name: None})
    objective = objective_for(load_pipeline(str(folder)))
    said = "the model's tokenizer or text encoder cannot read a prompt"
    with pytest.raises(ValueError, match=f"{said} .+: look for a wrong value in .*{file}"):
        objective.encode_prompts(["a cat"])
    result = run_here(main, quick(folder, output_dir="out"), tmp_path)
    assert result.returncode == 1
    assert re.search(f"^error: {said}", result.stderr, flags=re.MULTILINE)
    assert "Traceback" not in result.stderr


def test_text_encoders_that_have_no_memory_are_told_so(tiny_objective, monkeypatch):
    def starved(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(tiny_objective.pipeline.text_encoder, "forward", starved)
    with pytest.raises(torch.OutOfMemoryError):
        tiny_objective.encode_prompts(["a cat"])


def test_pictures_that_are_not_finite_are_not_taken_for_black_ones(tiny_objective):
    tiny_objective.pipeline.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="autoencoder gives pictures that are not finite"):
        tiny_objective.decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    "settings",
    [{"beta_start": 2.0, "beta_end": 3.0}, {"beta_schedule": "none of them"}, {"prediction_type": "sample"}],
)
def test_schedulers_that_cannot_be_meant(settings):
    pipeline = build_tiny_pipeline()
    pipeline.scheduler.register_to_config(**settings)
    with pytest.raises(ValueError, match="scheduler|prediction_type"):
        objective_for(pipeline)


def test_a_sampler_that_does_not_know_the_schedule_says_so():
    pipeline = build_tiny_pipeline()
    pipeline.scheduler = DDPMScheduler(beta_schedule="sigmoid")
    objective = objective_for(pipeline)
    objective.make_sampler("ddpm", pipeline.scheduler)
    with pytest.raises(ValueError, match='sampler="ddim" cannot follow the model\'s scheduler'):
        objective.make_sampler("ddim", pipeline.scheduler)
    with pytest.raises(ValueError, match='sampler="dimm" is not one of'):
        objective.make_sampler("dimm", pipeline.scheduler)


def test_the_prediction_type_given_is_saved_and_the_callers_pipeline_left_alone(tmp_path):
    pipeline = build_tiny_pipeline(safety_checker=True)
    objective_for(pipeline, "v_prediction").save(tmp_path / "v")
    objective_for(pipeline).save(tmp_path / "plain")
    saved = [
        json.loads((tmp_path / name / "scheduler" / "scheduler_config.json").read_text()) for name in ("v", "plain")
    ]
    assert [values["prediction_type"] for values in saved] == ["v_prediction", "epsilon"]
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert (tmp_path / "v" / "model_index.json").read_text() == (tmp_path / "plain" / "model_index.json").read_text()
    again = objective_for(load_pipeline(str(tmp_path / "v")))
    assert again.prediction_type == "v_prediction"
    settings = SamplingSettings(num_inference_steps=2)
    expected = objective_for(pipeline, "v_prediction").sample(["cat"], [0], settings)
    assert torch.equal(again.sample(["cat"], [0], settings), expected)


# What is loaded already


def test_adapters_are_refused_until_they_are_fused_and_unloaded():
    pipeline = build_tiny_pipeline()
    adapter = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipeline.unet.add_adapter(adapter)
    with pytest.raises(
        ValueError, match=r"unet has LoRA adapters.*with fuse_adapters.*pipeline.fuse_lora\(\) and pipeline.unload_lora"
    ):
        objective_for(pipeline)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    objective_for(pipeline)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), pipeline.text_encoder)
    with pytest.raises(ValueError, match="text_encoder has LoRA adapters"):
        objective_for(pipeline)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_half_precision_in_python_is_refused(part):
    pipeline = build_tiny_pipeline()
    getattr(pipeline, part).to(torch.bfloat16)
    with pytest.raises(ValueError, match=f"{part} has weights in bfloat16: load it with dtype=torch.float32"):
        objective_for(pipeline)


def sibling(kind, pipeline):
    """A pipeline of the same parts; a ControlNet of the UNet's own layers where the class takes one."""
    others = {}
    if "controlnet" in inspect.signature(kind.__init__).parameters:
        others["controlnet"] = ControlNetModel.from_unet(pipeline.unet, conditioning_channels=3)
    return kind(**pipeline.components, **others, requires_safety_checker=False)


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline,
                                  StableDiffusionControlNetPipeline, StableDiffusionControlNetImg2ImgPipeline,
                                  StableDiffusionControlNetInpaintPipeline])  # fmt: skip
def test_siblings_are_trained_as_the_pipeline_of_their_parts(kind, tmp_path):
    pipeline = build_tiny_pipeline()
    sibling(kind, pipeline).save_pretrained(tmp_path / "sibling")
    objective = objective_for(load_pipeline(str(tmp_path / "sibling"), kinds=SUPPORTED_PIPELINES))
    own = objective_for(pipeline)
    assert objective.fingerprint() == own.fingerprint()
    settings = SamplingSettings(num_inference_steps=2)
    assert torch.equal(objective.sample(["cat"], [0], settings), own.sample(["cat"], [0], settings))
    objective.save(tmp_path / "saved")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "saved")) is StableDiffusionPipeline


def test_other_pipelines_are_refused():
    other = sibling(StableDiffusionPAGPipeline, build_tiny_pipeline())
    message = "StableDiffusionPAGPipeline is not supported yet.*SDXL.*write a family, as docs/new-family.md shows"
    with pytest.raises(ValueError, match=message):
        objective_for(other)


def test_weights_of_another_shape_are_one_sentence(folder):
    other = UNet2DConditionModel.from_config(
        {**UNet2DConditionModel.load_config(folder / "unet"), "layers_per_block": 2}
    )
    other.save_pretrained(folder.parent / "other")
    file = "diffusion_pytorch_model.safetensors"
    weights = load_file(folder.parent / "other" / file)
    save_file({name: torch.zeros(3) for name in weights}, folder / "unet" / file)
    assert "could not be loaded" in refused(folder)


def test_steps_that_a_sampler_cannot_make_are_refused_before_sampling(tiny_objective):
    def check(sampler, steps):
        settings = SamplingSettings(sampler, num_inference_steps=steps)
        tiny_objective.check_sampling(settings, tiny_objective.pipeline.scheduler)

    for sampler in SAMPLERS:
        if not sampler.startswith("flow_"):
            check(sampler, 4)
    with pytest.raises(ValueError, match="num_inference_steps=1001 is more than the 1000 timesteps"):
        check("ddim", 1001)
    with pytest.raises(ValueError, match='sampler="dimm" is not one of'):
        check("dimm", 4)
