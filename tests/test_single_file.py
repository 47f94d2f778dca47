"""Checkpoints that are one file, as the authors' own programs name their tensors."""

import json
import re
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from sa_diffusers import load_pipeline, objective_for
from sa_diffusers.commands import main as sa_diffusers
from sa_diffusers.commands.erase import main
from sa_diffusers.commands.evaluate import main as evaluate
from sa_diffusers.families import SUPPORTED_PIPELINES, family_in

from .conftest import as_flags, build_tiny_pipeline, run_here
from .test_class_models import tiny_vae
from .test_loading import edit
from .test_train_script import QUICK
from .test_user_command import bytes_of
from .tiny_families import build_flux, build_klein, build_qwen, build_sana, build_sd3, build_xl, build_z_image

# Name in diffusers -> name in a checkpoint of Stable Diffusion, of the tiny UNet: one layer a level, two levels.
_UNET = {
    r"conv_in\.": "input_blocks.0.0.", r"add_embedding\.linear_1\.": "label_emb.0.0.",
    r"add_embedding\.linear_2\.": "label_emb.0.2.", r"time_embedding\.linear_1\.": "time_embed.0.",
    r"time_embedding\.linear_2\.": "time_embed.2.", r"conv_norm_out\.": "out.0.", r"conv_out\.": "out.2.",
    r"down_blocks\.0\.resnets\.0\.": "input_blocks.1.0.",
    r"down_blocks\.0\.downsamplers\.0\.conv\.": "input_blocks.2.0.op.",
    r"down_blocks\.1\.resnets\.0\.": "input_blocks.3.0.", r"down_blocks\.1\.attentions\.0\.": "input_blocks.3.1.",
    r"mid_block\.resnets\.0\.": "middle_block.0.", r"mid_block\.attentions\.0\.": "middle_block.1.",
    r"mid_block\.resnets\.1\.": "middle_block.2.", r"up_blocks\.0\.resnets\.0\.": "output_blocks.0.0.",
    r"up_blocks\.0\.attentions\.0\.": "output_blocks.0.1.", r"up_blocks\.0\.resnets\.1\.": "output_blocks.1.0.",
    r"up_blocks\.0\.attentions\.1\.": "output_blocks.1.1.",
    r"up_blocks\.0\.upsamplers\.0\.conv\.": "output_blocks.1.2.conv.",
    r"up_blocks\.1\.resnets\.0\.": "output_blocks.2.0.", r"up_blocks\.1\.resnets\.1\.": "output_blocks.3.0.",
}  # fmt: skip
_RESNET = {"norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.",
           "norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection."}  # fmt: skip
_VAE = {
    r"encoder\.down_blocks\.(\d)\.resnets\.(\d)\.": r"encoder.down.\1.block.\2.",
    r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.conv\.": r"encoder.down.\1.downsample.conv.",
    r"(encoder|decoder)\.mid_block\.resnets\.0\.": r"\1.mid.block_1.",
    r"(encoder|decoder)\.mid_block\.resnets\.1\.": r"\1.mid.block_2.",
    # The decoder's levels are counted from the picture.
    r"decoder\.up_blocks\.0\.resnets\.(\d)\.": r"decoder.up.1.block.\1.",
    r"decoder\.up_blocks\.1\.resnets\.(\d)\.": r"decoder.up.0.block.\1.",
    r"decoder\.up_blocks\.0\.upsamplers\.0\.conv\.": "decoder.up.1.upsample.conv.",
    r"(encoder|decoder)\.conv_norm_out\.": r"\1.norm_out.", r"conv_shortcut\.": "nin_shortcut.",
}  # fmt: skip


def renamed(weights, prefix, names):
    found = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = re.sub(f"(?:^|(?<=\\.)){old}", new, name)
        found[prefix + name] = value.contiguous().clone()
    return found


def as_checkpoint(pipeline, vae=True):
    """A Stable Diffusion as its authors' program writes it."""
    unet = {}
    for name, value in pipeline.unet.state_dict().items():
        if ".resnets." in name:
            for old, new in _RESNET.items():
                name = name.replace(f".{old}", f".{new}")
        unet[name] = value
    prefix = "cond_stage_model.transformer.text_model."
    text = {prefix + name.removeprefix("text_model."): value for name, value in
            pipeline.text_encoder.state_dict().items()}  # fmt: skip
    found = {**renamed(unet, "model.diffusion_model.", _UNET), **{name: value.clone() for name, value in text.items()}}
    return {**found, **renamed(pipeline.vae.state_dict(), "first_stage_model.", _VAE)} if vae else found


@pytest.fixture(scope="module")
def pipeline():
    return build_tiny_pipeline()


@pytest.fixture
def lenders(pipeline, tmp_path):
    """A pipeline of the same kind, whose weights are others: what it lends are configurations."""
    with torch.no_grad():
        other = build_tiny_pipeline()
        for part in (other.unet, other.vae, other.text_encoder):
            next(part.parameters()).add_(1)
    other.save_pretrained(tmp_path / "kind")
    return tmp_path / "kind"


def as_sdxl_checkpoint(pipeline):
    """An SDXL as its authors' program writes it, whose second text encoder is OpenCLIP's."""
    found = {f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": value.clone()
             for name, value in pipeline.text_encoder.state_dict().items()}  # fmt: skip
    unet = as_checkpoint(pipeline, vae=True)
    found |= {name: value for name, value in unet.items() if not name.startswith("cond_stage_model.")}
    names = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.": "token_embedding.", "text_model.final_layer_norm.": "ln_final.",
        "text_model.encoder.layers.": "transformer.resblocks.", ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.",
        ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj.", ".self_attn.": ".attn.",
        "text_projection.weight": "text_projection",
    }  # fmt: skip
    text = {}
    for name, value in pipeline.text_encoder_2.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        text[name] = value.T if name == "text_projection" else value
    for name in [name for name in text if ".q_proj." in name]:
        parts = [text.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        text[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return found | {f"conditioner.embedders.1.model.{name}": value.contiguous() for name, value in text.items()}


_SD3 = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.", "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "joint_blocks.",
    ".attn.to_out.0.": ".x_block.attn.proj.", ".attn.to_add_out.": ".context_block.attn.proj.",
    ".norm1.linear.": ".x_block.adaLN_modulation.1.", ".norm1_context.linear.": ".context_block.adaLN_modulation.1.",
    ".ff.net.0.proj.": ".x_block.mlp.fc1.", ".ff.net.2.": ".x_block.mlp.fc2.",
    ".ff_context.net.0.proj.": ".context_block.mlp.fc1.", ".ff_context.net.2.": ".context_block.mlp.fc2.",
}  # fmt: skip


def as_sd3_checkpoint(pipeline):
    """A Stable Diffusion 3 as its authors' program writes it: transformer and autoencoder, no text encoder."""
    weights, found = pipeline.transformer.state_dict(), {}
    last = len(pipeline.transformer.transformer_blocks) - 1
    for name, value in weights.items():
        if ".attn.to_q." in name:
            new = name.replace("transformer_blocks.", "joint_blocks.").replace("attn.to_q.", "{}_block.attn.qkv.")
            for stream, of in (("x", "to_{}"), ("context", "add_{}_proj")):
                names = (name.replace("to_q", of.format(part)) for part in "qkv")
                found[new.format(stream)] = torch.cat([weights[part] for part in names])
        elif not re.search(r"\.attn\.(to_[kv]|add_[qkv]_proj)\.", name):
            if name.startswith((f"transformer_blocks.{last}.norm1_context.", "norm_out.")):
                # Scale and shift the other way round.
                value = torch.cat(value.chunk(2)[::-1])
            for old, new in _SD3.items():
                name = name.replace(old, new)
            found[name] = value.clone()
    found = {f"model.diffusion_model.{name}": value for name, value in found.items()}
    return {**found, **renamed(pipeline.vae.state_dict(), "first_stage_model.", _VAE)}


def as_z_image_checkpoint(pipeline, vae):
    """A Z-Image as its authors' program writes it, or with an autoencoder as others put the two together."""
    names = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", ".to_out.0.": ".out.",
             ".norm_q.": ".q_norm.", ".norm_k.": ".k_norm."}  # fmt: skip
    weights, found = pipeline.transformer.state_dict(), {}
    for name, value in weights.items():
        if ".to_q." in name:
            parts = [weights[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            found[name.replace(".to_q.", ".qkv.")] = torch.cat(parts)
        elif not re.search(r"\.to_[kv]\.", name):
            for old, new in names.items():
                name = name.replace(old, new)
            found[name] = value.clone()
    found = {f"model.diffusion_model.{name}": value for name, value in found.items()}
    return {**found, **renamed(pipeline.vae.state_dict(), "vae.", _VAE)} if vae else found


def same(one, other):
    weights = other.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


def test_a_whole_checkpoint_takes_configurations_alone(pipeline, lenders, tmp_path):
    path = tmp_path / "whole.safetensors"
    save_file(as_checkpoint(pipeline), path)
    for file in lenders.rglob("*.safetensors"):
        file.unlink()
    loaded = load_pipeline(str(path), kinds=SUPPORTED_PIPELINES, undistilled=True, single_file_config=str(lenders))
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr(pipeline, part), getattr(loaded, part)), part
    assert objective_for(loaded).fingerprint() == objective_for(pipeline).fingerprint()
    assert loaded.name_or_path == str(path)


def test_a_denoiser_alone_takes_the_rest_from_the_pipeline(pipeline, lenders, tmp_path):
    path = tmp_path / "pruned.safetensors"
    checkpoint = {name: value for name, value in as_checkpoint(pipeline).items() if name.startswith("model.")}
    save_file({name: value.half() for name, value in checkpoint.items()}, path)
    loaded = load_pipeline(str(path), single_file_config=str(lenders))
    assert same(pipeline.unet.half().float(), loaded.unet)
    assert not same(pipeline.text_encoder, loaded.text_encoder)
    assert {value.dtype for value in loaded.unet.parameters()} == {torch.float32}


def test_a_whole_sdxl(tmp_path):
    pipeline = build_xl()
    save_file(as_sdxl_checkpoint(pipeline), tmp_path / "whole.safetensors")
    pipeline.save_pretrained(tmp_path / "of-xl")
    for file in (tmp_path / "of-xl").rglob("*.safetensors"):
        file.unlink()
    loaded = load_pipeline(str(tmp_path / "whole.safetensors"), single_file_config=str(tmp_path / "of-xl"))
    (tmp_path / "of-xl" / "tokenizer_2" / "tokenizer.json").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="of-xl/tokenizer_2 lacks vocab.json and merges.txt, so that no word of a pro"):
        load_pipeline(str(tmp_path / "whole.safetensors"), single_file_config=str(tmp_path / "of-xl"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert same(getattr(pipeline, part), getattr(loaded, part)), part
    assert objective_for(loaded).fingerprint() == objective_for(pipeline).fingerprint()


@pytest.mark.parametrize("held", [(), ("clip_l",), ("clip_l", "clip_g"), ("clip_l", "clip_g", "t5xxl")])
def test_text_encoders_that_a_whole_checkpoint_lacks_are_those_of_the_pipeline(held, tmp_path):
    """As in sd3.5_medium.safetensors, sd3_medium_incl_clips.safetensors and its like with T5; the pipeline's T5 is in
    two shards."""
    first, second = build_sd3(), build_sd3()
    with torch.no_grad():
        for part in (second.transformer, second.vae, second.text_encoder, second.text_encoder_2, second.text_encoder_3):
            next(part.parameters()).add_(1)
    checkpoint = as_sd3_checkpoint(first)
    # All as transformers names them; the first one's projection is the identity.
    first.text_encoder.text_projection.weight.data = torch.eye(8)
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    theirs = dict(zip(encoders, held, strict=False))
    for part, prefix in theirs.items():
        weights = getattr(first, part).state_dict()
        checkpoint |= {f"text_encoders.{prefix}.transformer.{name}": value.clone() for name, value in weights.items()}
    save_file(checkpoint, tmp_path / "sd3.safetensors")
    second.save_pretrained(tmp_path / "kind")
    (tmp_path / "kind" / "text_encoder_3" / "model.safetensors").unlink()
    second.text_encoder_3.save_pretrained(
        tmp_path / "kind" / "text_encoder_3", max_shard_size=bytes_of(second.text_encoder_3) * 2 // 3
    )
    loaded = load_pipeline(str(tmp_path / "sd3.safetensors"), single_file_config=str(tmp_path / "kind"))
    for part in ("transformer", "vae", *encoders):
        assert same(getattr(second if part in encoders and part not in theirs else first, part), getattr(loaded, part))
    without = load_pipeline(str(tmp_path / "sd3.safetensors"), single_file_config=str(tmp_path / "kind"), no_t5=True)
    assert without.text_encoder_3 is None
    assert same(first.vae, without.vae)


@pytest.mark.parametrize("vae", [False, True])
def test_a_z_image(vae, tmp_path):
    first, second = build_z_image(), build_z_image()
    with torch.no_grad():
        for part in (second.transformer, second.vae, second.text_encoder):
            next(part.parameters()).add_(1)
    second.save_pretrained(tmp_path / "kind")
    save_file(as_z_image_checkpoint(first, vae), tmp_path / "tuned.safetensors")
    loaded = load_pipeline(str(tmp_path / "tuned.safetensors"), single_file_config=str(tmp_path / "kind"))
    assert same(first.transformer, loaded.transformer)
    assert same((first if vae else second).vae, loaded.vae)
    assert same(second.text_encoder, loaded.text_encoder)


@pytest.mark.parametrize("build", [build_sd3, build_flux, build_z_image, build_sana, build_qwen, build_klein])
def test_a_transformer_alone(build, tmp_path):
    """As those of FLUX are passed on, without text encoders."""
    first, second = build(), build()
    with torch.no_grad():
        next(second.transformer.parameters()).add_(1)
    second.save_pretrained(tmp_path / "kind")
    save_file(first.transformer.state_dict(), tmp_path / "tuned.safetensors")
    loaded = load_pipeline(str(tmp_path / "tuned.safetensors"), single_file_config=str(tmp_path / "kind"))
    assert same(first.transformer, loaded.transformer)
    assert same(second.text_encoder, loaded.text_encoder)


def test_which_model_it_is_is_told_by_its_tensors(pipeline, tmp_path, monkeypatch):
    """Configurations come from the Hub's cache, where nothing but they need be."""
    path, repository = tmp_path / "whole.safetensors", "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    save_file(as_checkpoint(pipeline), path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ConnectionError) as error:
        load_pipeline(str(path))
    for words in ("stable-diffusion-v1-5", "not in the local cache", "--single_file_config"):
        assert words in str(error.value)
    snapshot = tmp_path / "hub" / repository / "snapshots" / "abc"
    (tmp_path / "hub" / repository / "refs").mkdir(parents=True)
    (tmp_path / "hub" / repository / "refs" / "main").write_text("abc")
    pipeline.save_pretrained(snapshot)
    for file in snapshot.rglob("*.safetensors"):
        file.unlink()
    assert same(pipeline.unet, load_pipeline(str(path), cache_dir=str(tmp_path / "hub")).unet)
    assert family_in(str(path), cache_dir=str(tmp_path / "hub")).title == "Stable Diffusion 1 and 2"
    # Of Z-Image diffusers knows the Turbo alone, of FLUX.2 what is no klein: what is said of these may be wrong.
    edit(snapshot / "unet" / "config.json", in_channels=9)
    taken = "by its tensors the file is taken for one of stable-diffusion-v1-5/stable-diffusion-v1-5: if it is another"
    with pytest.raises(ValueError, match=f"its UNet takes 9 channels.*{taken}"):
        load_pipeline(str(path), cache_dir=str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="its UNet takes 9 channels") as error:
        load_pipeline(str(path), single_file_config=str(snapshot))
    assert "taken for" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(1)}, r"which model it is cannot be told from its tensors \(a\): give with"),
        ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "is an adapter .*pipeline.fuse_lora"),
    ],
)
def test_files_that_are_no_model(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path / "file.safetensors"))
    (tmp_path / "file.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="is cut short"):
        load_pipeline(str(tmp_path / "file.safetensors"))


def test_a_kind_of_which_diffusers_reads_no_single_file_is_told(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "kind")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match="diffusers reads no single file of this kind of model: give the folder of a"):
        load_pipeline(str(tmp_path / "file.safetensors"), single_file_config=str(tmp_path / "kind"))


def test_configurations_of_another_kind_are_one_sentence(pipeline, tmp_path):
    save_file(as_checkpoint(pipeline), tmp_path / "whole.safetensors")
    build_flux().save_pretrained(tmp_path / "kind")
    with pytest.raises(ValueError, match="could not be loaded as a FluxPipeline with the configurations of") as error:
        load_pipeline(str(tmp_path / "whole.safetensors"), single_file_config=str(tmp_path / "kind"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="single_file_config=.*there is no such file"):
        load_pipeline(str(tmp_path / "whole.safetensors"), single_file_config="./nowhere")


def test_an_erasure_from_a_single_file_ends_in_a_folder(pipeline, lenders, clip_folder, tmp_path):
    save_file(as_checkpoint(pipeline), tmp_path / "whole.safetensors")
    flags = {**QUICK, "pretrained_model_name_or_path": "whole.safetensors", "single_file_config": str(lenders),
             "output_dir": "out", "report_to": "none", "max_train_steps": 2}  # fmt: skip
    result = run_here(main, as_flags(flags), tmp_path)
    assert result.returncode == 0, result.stderr
    erased = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert not same(pipeline.unet, erased.unet)
    assert same(pipeline.vae, erased.vae)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["base_model"] == "whole.safetensors"
    assert "Made from the local file `whole.safetensors`" in (tmp_path / "out" / "README.md").read_text()
    flags_of_evaluation = {"base": "whole.safetensors", "erased": "out", "protocol": "concept", "images": 2,
                           "clip": str(clip_folder), "output_dir": "measured"}  # fmt: skip
    measured = run_here(evaluate, as_flags(flags_of_evaluation), tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert json.loads((tmp_path / "measured" / "report.json").read_text())["base_module"] == report["base_module"]
    # A file may move as a folder may.
    shutil.copy(tmp_path / "whole.safetensors", tmp_path / "kind")
    moved = {**flags, "pretrained_model_name_or_path": str(lenders / "whole.safetensors")}
    again = run_here(main, as_flags(moved), tmp_path)
    assert "holds this very erasure" in again.stdout + again.stderr, again.stderr
    # What lent the configurations may be elsewhere by the time that an adapter is made of it, or fused into the file.
    for command, source, target in (("extract", "out", "adapter"), ("merge", "adapter", "merged")):
        lenders = lenders.rename(tmp_path / f"for-{command}")
        arguments = [command, source, "--output_dir", target, "--base", "whole.safetensors"]
        assert "single_file_config" in run_here(sa_diffusers, arguments, tmp_path).stderr
        result = run_here(sa_diffusers, [*arguments, "--single_file_config", lenders.name], tmp_path)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / target / "README.md").is_file()
    assert same(pipeline.vae, DiffusionPipeline.from_pretrained(tmp_path / "merged").vae)
