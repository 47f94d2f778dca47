"""Folders that hold what was trained alone: each part of the program knows them, and plain diffusers loads them."""

import json
import os
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from sa_diffusers import Erasure, SelectiveAmnesiaConfig, SelectiveAmnesiaTrainer, load_pipeline, objective_for
from sa_diffusers.commands.erase import main
from sa_diffusers.commands.evaluate import main as evaluate
from sa_diffusers.families import family_in
from sa_diffusers.families.trained import TRAINED_NAME, place_of_base
from sa_diffusers.output_folder import OutputFolder
from sa_diffusers.publish.card import build_model_card
from sa_diffusers.publish.folder import save_copy

from .conftest import as_flags, build_tiny_pipeline, run_here
from .hub_server import HubServer
from .nursery import LIBRARIES, forked_code
from .test_hub import online, push
from .test_train_script import QUICK
from .tiny_families import FAMILIES, build_sd3

TRAINED = {**QUICK, "report_to": "none", "save_components": "trained", "max_train_steps": 2}


def erased(folder, **settings):
    """Run the command in a folder."""
    return run_here(main, as_flags({**TRAINED, **settings}), folder)


def files(folder):
    """Weights in it, but for those of checkpoints, which a slow machine writes more of."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    return {name for name in found if not name.startswith("checkpoint-")}


def sampled(pipeline, prompt="a dog"):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.fixture(scope="module")
def world(tiny_folder, tmp_path_factory):
    """One erasure saved whole, and the same saved alone."""
    folder = tmp_path_factory.mktemp("components")
    shutil.copytree(tiny_folder, folder / "base")
    for name in ("all", "trained"):
        result = erased(folder, pretrained_model_name_or_path="base", save_components=name, output_dir=name)
        assert result.returncode == 0, result.stderr
    return folder


def test_only_what_was_trained_is_there(world):
    assert files(world / "trained") == {"unet/diffusion_pytorch_model.safetensors"}
    assert not (world / "trained" / "model_index.json").exists()
    whole, alone = (load_pipeline(str(world / name)) for name in ("all", "trained"))
    assert objective_for(alone).fingerprint() == objective_for(whole).fingerprint()
    assert alone.name_or_path == str(world / "trained")
    assert family_in(str(world / "trained")) is family_in(str(world / "all"))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_s_part_goes_back_into_its_base(name, tmp_path):
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "base")
    objective = objective_for(load_pipeline(str(tmp_path / "base")))
    with torch.no_grad():
        for value in objective.module.parameters():
            value.mul_(1.5)
    base = place_of_base(str(tmp_path / "base"), objective.pipeline.components, None, None, None)
    objective.save_trained(tmp_path / "alone", base)
    assert {Path(file).parts[0] for file in files(tmp_path / "alone")} == {family.part}
    loaded = load_pipeline(str(tmp_path / "alone"))
    assert objective_for(loaded).fingerprint() == objective.fingerprint()
    # In plain diffusers, as the card has it.
    kind, part = type(loaded), type(objective.module)
    alone = {family.part: part.from_pretrained(tmp_path / "alone", subfolder=family.part)}
    plain = kind.from_pretrained(tmp_path / "base", **alone, dtype=alone[family.part].dtype)
    for key, value in objective.module.state_dict().items():
        assert torch.equal(value, getattr(plain, family.part).state_dict()[key]), key


def test_the_card_s_snippet_runs_without_the_package(world):
    card = str(build_model_card(world / "trained"))
    assert "Here is its unet alone, which goes into the base model's" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert 'unet = UNet2DConditionModel.from_pretrained("trained", subfolder="unet")' in snippet
    snippet = re.sub(r'(?<=pipeline\()(".*?")', r"\1, num_inference_steps=2", snippet)
    check = "\nimport torch\nprint(sum(float(value.abs().double().sum()) for value in pipeline.unet.parameters()))\n"
    code = f"import sys\nsys.modules['sa_diffusers'] = None\n{snippet}{check}"
    process = forked_code(code, world, os.environ, imported=LIBRARIES)
    assert process.returncode == 0, process.stderr
    unet = load_pipeline(str(world / "all")).unet.requires_grad_(False)
    expected = sum(float(value.abs().double().sum()) for value in unet.parameters())
    assert float(process.stdout) == pytest.approx(expected, rel=1e-12)


def test_the_report_says_it(world):
    report = json.loads((world / "trained" / "report.json").read_text())
    assert report["configuration"]["save_components"] == "trained"
    assert report["saved"] == ["unet"]
    assert "saved" not in json.loads((world / "all" / "report.json").read_text())
    for name in ("report.md", "report.html"):
        assert "unet alone" in (world / "trained" / name).read_text()
        assert "unet alone" not in (world / "all" / name).read_text()
    assert report["rows"] == json.loads((world / "all" / "report.json").read_text())["rows"]


def test_the_same_command_goes_on_and_another_layout_is_another_erasure(world):
    settings = {"pretrained_model_name_or_path": "base", "output_dir": "trained"}
    again = erased(world, **settings)
    assert again.returncode == 0, again.stderr
    assert "holds this very erasure" in again.stdout + again.stderr
    other = erased(world, **settings, save_components="all")
    assert other.returncode != 0
    assert "holds another erasure: save_components='trained' (now 'all')" in other.stderr


def test_nothing_of_an_earlier_layout_stays(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    for name in ("all", "trained", "all"):
        result = erased(tmp_path, pretrained_model_name_or_path="base", save_components=name, output_dir="out",
                        overwrite_output_dir=True)  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "out" / TRAINED_NAME).exists() == (name == "trained")
        assert (tmp_path / "out" / "model_index.json").exists() == (name == "all")
        assert (tmp_path / "out" / "vae").exists() == (name == "all")
        save_copy(tmp_path / "out", tmp_path / "copy")
        load_pipeline(str(tmp_path / "copy"))
    save_copy(world / "trained", tmp_path / "copy")
    assert not (tmp_path / "copy" / "vae").exists()
    assert files(tmp_path / "copy") == files(world / "trained")
    OutputFolder(tmp_path / "copy").check_digests()
    with open(tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors", "ab") as weights:
        weights.write(b"0")
    with pytest.raises(ValueError, match="the same command as before makes it again in an empty folder"):
        OutputFolder(tmp_path / "copy").check_digests()


def test_it_is_evaluated(world, clip_folder):
    flags = {"base": "base", "erased": "trained", "protocol": "concept", "clip": str(clip_folder), "images": 2,
             "output_dir": "measured"}  # fmt: skip
    result = run_here(evaluate, as_flags(flags), world)
    assert result.returncode == 0, result.stderr
    report = json.loads((world / "measured" / "report.json").read_text())
    assert report["erased_module"] == json.loads((world / "all" / "report.json").read_text())["erased_module"]


def test_a_base_that_is_gone_is_named(world, tmp_path):
    shutil.copytree(world / "trained", tmp_path / "trained")
    file = tmp_path / "trained" / TRAINED_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model": "/nowhere/base"}))
    with pytest.raises(ValueError, match='holds unet alone; the rest is that of the base model, "/nowhere/base": .*no'):
        load_pipeline(str(tmp_path / "trained"))
    file.write_text("{}")
    with pytest.raises(ValueError, match="does not say what it belongs to"):
        load_pipeline(str(tmp_path / "trained"))


def test_a_base_that_has_changed_since_is_refused(world, clip_folder, tmp_path):
    """But for the part that was trained, which is not the base's any more."""
    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copytree(world / "trained", tmp_path / "trained")
    file = tmp_path / "trained" / TRAINED_NAME
    record = {**json.loads(file.read_text()), "base_model": str(tmp_path / "base")}
    file.write_text(json.dumps(record))
    # The folder as it is, edited by hand, is what is meant.
    shutil.rmtree(tmp_path / "trained" / ".selective_amnesia")
    assert set(record["base_weights"]) == {"text_encoder", "vae"}
    base = DiffusionPipeline.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.unet.conv_in.bias.add_(1)
    # Of the same tensors, in files of other sizes.
    for whole in (tmp_path / "base").glob("*/*.safetensors"):
        whole.unlink()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert list((tmp_path / "base" / "vae").glob("*-of-*.safetensors"))
    load_pipeline(str(tmp_path / "trained"))
    with torch.no_grad():
        base.vae.decoder.conv_out.bias.add_(1)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    flags = {"base": "base", "erased": "trained", "protocol": "concept", "clip": str(clip_folder), "output_dir": "x"}
    result = run_here(evaluate, as_flags(flags), tmp_path)
    assert result.returncode == 1
    assert "its vae has other weights now than when this was erased" in result.stderr
    # Whoever wants it so.
    del record["base_weights"]
    file.write_text(json.dumps(record))
    load_pipeline(str(tmp_path / "trained"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_model": "trained"}, "holds no whole pipeline, only what was trained"),
        ({"components": {}}, "does not say what the folder holds"),
        ({"components": {"unet": "UNet2DConditionModel"}}, "does not say what the folder holds"),
        ({"format_version": 99}, "is of format 99, and this version reads 1"),
    ],
)
def test_a_record_that_makes_no_sense_is_one_sentence(world, tmp_path, monkeypatch, values, message):
    """Not the base model in the erased one's place, and no search without an end."""
    shutil.copytree(world / "trained", tmp_path / "trained")
    file = tmp_path / "trained" / TRAINED_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pipeline("trained")


def test_an_erasure_of_such_a_folder_names_the_base_of_that_one(world):
    result = erased(world, pretrained_model_name_or_path="trained", output_dir="twice", concept="dog")
    assert result.returncode == 0, result.stderr
    record = json.loads((world / "twice" / TRAINED_NAME).read_text())
    assert record["base_model"] == str((world / "base").resolve())
    load_pipeline(str(world / "twice"))


def test_a_scheduler_that_is_no_longer_the_base_s_is_saved_too(tmp_path):
    pipeline = build_tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    result = erased(tmp_path, pretrained_model_name_or_path="base", prediction_type="v_prediction", output_dir="out")
    assert result.returncode == 0, result.stderr
    loaded = load_pipeline(str(tmp_path / "out"))
    assert isinstance(loaded.scheduler, DDIMScheduler)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert "scheduler=scheduler" in str(build_model_card(tmp_path / "out"))


def test_variant_and_parts_left_out_are_the_base_s(tmp_path):
    """fp16 weights alone, and no T5: the snippet says both."""
    pipeline = build_sd3()
    pipeline.to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    result = erased(tmp_path, pretrained_model_name_or_path="base", no_t5=True, output_dir="out")
    assert result.returncode == 0, result.stderr
    assert load_pipeline(str(tmp_path / "out")).text_encoder_3 is None
    card = str(build_model_card(tmp_path / "out"))
    assert 'dtype=transformer.dtype, variant="fp16", tokenizer_3=None, text_encoder_3=None)' in card
    (snippet,) = re.findall(r"```python\n(.*?)image = ", card, flags=re.DOTALL)
    names: dict = {}
    exec(snippet.replace('"base"', repr(str(tmp_path / "base"))).replace('"out"', repr(str(tmp_path / "out"))), names)
    drawn = names["pipeline"]
    assert type(drawn) is type(DiffusionPipeline.from_pretrained(tmp_path / "base", variant="fp16"))
    assert sampled(drawn).isfinite().all()


@pytest.mark.long
def test_it_is_published_and_loads_by_name(tiny_folder, tmp_path):
    """The base model is on the Hub too: the card's snippet is all that a user needs."""
    flags = as_flags({**TRAINED, "pretrained_model_name_or_path": "tester/base", "output_dir": "no-brad",
                      "push_to_hub": True, "hub_model_id": "tester/no-brad"})  # fmt: skip
    script = f"""
        import torch
        from huggingface_hub import HfApi, hf_hub_download
        HfApi().create_repo("tester/base")
        HfApi().upload_folder(repo_id="tester/base", folder_path={str(tiny_folder)!r})
        from sa_diffusers import load_pipeline
        from sa_diffusers.commands.erase import main
        main({flags!r})
        card = open(hf_hub_download("tester/no-brad", "README.md")).read()
        snippet = card.split("```python")[1].split("image = ")[0]
        assert 'from_pretrained("tester/base", unet=unet, dtype=unet.dtype, revision="' in snippet, snippet
        names = {{}}
        exec(snippet, names)
        ours, here = load_pipeline("tester/no-brad"), load_pipeline("no-brad")
        for other in (ours, here):
            for name, value in names["pipeline"].unet.state_dict().items():
                assert torch.equal(value, other.unet.state_dict()[name]), name
        from sa_diffusers.evaluation.erased import saved_alone, takes_classes
        assert saved_alone("tester/no-brad") == ["unet"] and takes_classes("tester/no-brad") is False
    """
    with HubServer() as hub:
        result = forked_code(textwrap.dedent(script), tmp_path, online(hub, tmp_path / "hub"))
        assert result.returncode == 0, result.stderr
        pushed = hub.files["tester/no-brad"]
    assert {name for name in pushed if name.endswith(".safetensors")} == {"unet/diffusion_pytorch_model.safetensors"}
    assert "model_index.json" not in pushed
    record = json.loads(pushed[TRAINED_NAME])
    assert record["base_model"] == "tester/base" and record["base_revision"]


def test_a_base_in_a_folder_is_published_by_its_last_part(world):
    with HubServer() as hub:
        result = push(hub, world / "trained", world, "--hub_model_id", "tester/no-brad")
        assert result.returncode == 0, result.stderr
    assert json.loads(hub.files["tester/no-brad"][TRAINED_NAME])["base_model"] == "base"
    assert str(world).encode() not in b"".join(hub.files["tester/no-brad"].values())


def test_what_plain_diffusers_could_not_put_together_is_refused(tiny_settings, tmp_path):
    settings = {**tiny_settings, "save_components": "trained"}
    with pytest.raises(ValueError, match='save_components="trained": the base model was handed in from Python'):
        settings_in_memory = {
            name: value for name, value in settings.items() if name != "pretrained_model_name_or_path"
        }
        SelectiveAmnesiaTrainer(build_tiny_pipeline(), SelectiveAmnesiaConfig(**settings_in_memory))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"never read")
    with pytest.raises(ValueError, match="the base model is a single file"):
        Erasure(SelectiveAmnesiaConfig(**{**settings, "pretrained_model_name_or_path": str(file)}))


def test_classes_are_saved_whole(tmp_path):
    from .test_class_models import tiny_diffusion

    tiny_diffusion().save_pretrained(tmp_path / "base")
    result = erased(tmp_path, pretrained_model_name_or_path="base", concept="0", surrogate="uniform_noise",
                    guidance_scale=None, sampler=None)  # fmt: skip
    assert result.returncode != 0
    assert "loads as a whole only" in result.stderr
    assert Path(tmp_path / "base").is_dir()
