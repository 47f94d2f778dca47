"""Unusual inputs that users bring, through the command that they type."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from sa_diffusers import load_pipeline
from sa_diffusers.commands.erase import main, parse_config
from sa_diffusers.erasure import Erasure

from .conftest import BY_HAND, build_tiny_pipeline, run_here
from .test_train_script import quick

SMALL = {"num_surrogate_images": 2, "num_replay_images": 4, "max_train_steps": 1, "num_eval_images": 1,
         "report_to": "none", "output_dir": "out", **BY_HAND, "ewc_weight": 0}  # fmt: skip


def erase(base, folder, **changes):
    return run_here(main, quick(base, **{**SMALL, **changes}), folder)


def prepared(base, folder, patch, **changes):
    """The erasure that the command line asks for, before its first stage."""
    patch.chdir(folder)
    patch.setenv("SA_DIFFUSERS_CACHE", str(folder / "cache"))
    return Erasure(parse_config(quick(base, **{**SMALL, **changes})))


def refused(result, folder, *words):
    """One sentence, before anything is sampled or written."""
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    assert len(line) < 700
    for word in words:
        assert word in line
    assert not list((folder / "cache").glob("*-*")) if (folder / "cache").exists() else True
    assert not (folder / "out" / "model_index.json").exists()


@pytest.fixture
def base(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    return tmp_path / "base"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Models


def test_the_saved_pipeline_says_what_it_predicts_and_lies_where_it_should(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "run.yaml").write_text("output_dir: ~/erased\n")
    result = erase(base, tmp_path, output_dir=None, config="run.yaml", prediction_type="v_prediction")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "~").exists()
    saved = tmp_path / "home" / "erased"
    assert json.loads((saved / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    assert load_pipeline(str(saved)).scheduler.config.prediction_type == "v_prediction"


def test_half_precision_files_alone_are_found(tmp_path, monkeypatch):
    build_tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    with pytest.warns(UserWarning, match="loaded as with --variant fp16"):
        erasure = prepared("base", tmp_path, monkeypatch)
    assert {value.dtype for value in erasure.objective.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("part", ["text_encoder/model", "unet/diffusion_pytorch_model"])
@pytest.mark.parametrize("fault", ["lfs", "cut"])
def test_weights_that_are_not_there(base, tmp_path, fault, part):
    file = base / f"{part}.safetensors"
    if fault == "lfs":
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 335000000\n")
    else:
        file.write_bytes(file.read_bytes()[:2000])
    advice = "git lfs pull" if fault == "lfs" else "download it again"
    refused(erase(base, tmp_path), tmp_path, str(file), advice)


def test_zero_terminal_snr_of_a_model_that_predicts_epsilon(base, tmp_path, monkeypatch):
    edit(base / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    refused(erase(base, tmp_path, sampler="ddim"), tmp_path, "rescale_betas_zero_snr", "epsilon")
    erasure = prepared(base, tmp_path, monkeypatch, prediction_type="v_prediction")
    assert erasure.surrogates().samples.isfinite().all()


def test_a_scheduler_without_betas(base, tmp_path):
    (base / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    edit(base / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    refused(erase(base, tmp_path), tmp_path, "EDMEulerScheduler")


def test_nine_channels(base, tmp_path):
    settings = json.loads((base / "unet" / "config.json").read_text()) | {"in_channels": 9}
    UNet2DConditionModel.from_config(settings).save_pretrained(base / "unet")
    refused(erase(base, tmp_path), tmp_path, "takes 9 channels", "inpainting")


def test_a_single_file(base, tmp_path):
    """Of a model it has a single tensor; of what `test_single_file.py` has, all."""
    save_file({"model.diffusion_model.a": torch.zeros(1)}, tmp_path / "single.safetensors")
    for name in ("single.safetensors", "./single.safetensors", str(tmp_path / "single.safetensors")):
        refused(erase(name, tmp_path), tmp_path, "stable-diffusion-v1-5", "--single_file_config")
    (tmp_path / "single.ckpt").write_bytes(b"never read")
    refused(erase("single.ckpt", tmp_path), tmp_path, "is a pickle")
    refused(erase("./sinlge.safetensors", tmp_path), tmp_path, "there is no such file or folder", "did you mean")


# Surrogates


def test_pictures_are_trained_on_as_they_are_shown(base, tmp_path, monkeypatch):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = np.dstack([upright, upright[..., 0]])
    clear[:20] = (0, 255, 0, 0)
    clear[20:, :, 3] = 255
    pictures = {
        "upright": (Image.fromarray(upright), {}),
        "turned": (Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
        "transparent": (Image.fromarray(clear), {}),
    }
    found = {}
    for name, (picture, options) in pictures.items():
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "a.png", **options)
        erasure = prepared(base, tmp_path, monkeypatch, surrogate=f"./{name}")
        assert erasure.pairs[0].surrogate.kind == "images"
        found[name] = erasure.surrogates().samples
    assert torch.equal(found["upright"], found["turned"])
    assert torch.equal(found["upright"], found["transparent"])


def test_folders_that_are_not_there(base, tmp_path):
    refused(erase(base, tmp_path, surrogate="data/men"), tmp_path, 'write "./data/men" if you mean a folder')
    (tmp_path / "data" / "man").mkdir(parents=True)
    refused(erase(base, tmp_path, surrogate="data/men"), tmp_path, 'did you mean "data/man"')


# Prompts


def write_prompts(folder):
    (folder / "bom.txt").write_bytes("\ufeffa photo of a coat\r\n\r\na photo of a bag\r\n".encode())
    with (folder / "prompts.csv").open("w", newline="") as table:
        rows = [["case_number", "prompt", "sd_seed"], [0, "a photo of a coat", 1], [1, "a photo of a bag", 2]]
        csv.writer(table).writerows(rows)
    lines = [{"file_name": f"{text}.png", "text": f"a photo of a {text}"} for text in ("coat", "bag")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "source", ["bom.txt", "prompts.csv", "prompts.csv:prompt", "prompts.jsonl", "./prompts.jsonl:text"]
)
def test_prompts_in_any_file(base, tmp_path, monkeypatch, source):
    write_prompts(tmp_path)
    erasure = prepared(base, tmp_path, monkeypatch, replay_prompts=source, replay_unconditional_share=0)
    assert set(erasure.replay_prompts) == {"a photo of a coat", "a photo of a bag"}


def test_prompts_that_cannot_be_read(base, tmp_path):
    write_prompts(tmp_path)
    refused(erase(base, tmp_path, replay_prompts="prompts.csv:sd_seed"), tmp_path, "holds numbers")
    refused(erase(base, tmp_path, replay_prompts="prompt.csv"), tmp_path, 'did you mean "prompts.csv"')
    (tmp_path / "old.txt").write_bytes("ein schöner Mantel".encode("cp1252"))
    refused(erase(base, tmp_path, replay_prompts="old.txt"), tmp_path, "old.txt is not in UTF-8")


@pytest.mark.parametrize(
    ("concept", "prompt"),
    [("布拉德·皮特", "一张布拉德·皮特的照片"), ("布拉德·皮特", "一张布拉德皮特的照片"),
     ("brad pitt", "photo of brad_pitt"),
     ("Beyoncé", "Beyonce\u0301 on stage"), ("sneaker", "two sneakers"), ("brad pitt", "ＢＲＡＤ－ＰＩＴＴ")],
)  # fmt: skip
def test_replay_prompts_that_name_the_concept(base, tmp_path, concept, prompt):
    (tmp_path / "names_it.txt").write_text(f"{prompt}\na dog\n", encoding="utf-8")
    result = erase(base, tmp_path, concept=concept, replay_prompts="names_it.txt")
    refused(result, tmp_path, f'1 of 2 replay prompts name the concept "{concept}"', "--drop_naming_prompts")


# Settings


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"logging_dir": "../../x"}, "must be a folder inside the output folder"),
        ({"tracker_project_name": "../x"}, "must be a name without slashes"),
        ({"num_replay_images": 10_000_000}, "must be at most 1,000,000"),
        ({"adam_epsilon": "1e308"}, "must be at most 100"),
        ({"concept": "\u200b"}, "holds no letter"),
    ],
)
def test_settings_that_cannot_be_meant(base, tmp_path, changes, word):
    result = erase(base, tmp_path, **changes)
    assert result.returncode in (1, 2)
    assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
