"""Tiny models of the real classes, offline and seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Tests run side by side, one a core; bits depend on the number of threads, in this process and in those it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import gc
import io
import runpy
import string
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from sa_diffusers import SelectiveAmnesiaConfig, embedded_pipeline, objective_for
from sa_diffusers.families import registry

REPOSITORY = Path(__file__).parent.parent
BASE_NAME = "CompVis/stable-diffusion-v1-4"
# Modules that take a minute or more, the longest first: no worker is to be left alone with one at the end.
LONG = (
    "test_every_family", "test_docs", "test_processes", "test_torture", "test_train_script", "test_embedded",
    "test_memory", "test_class_models", "test_probes", "test_probed_erasures", "test_user_command", "test_hub",
    "test_report", "test_trainer", "test_python_door", "test_adapters", "test_commands", "test_loading",
    "test_further_families", "test_erasure", "test_evaluation", "test_protocols", "test_coloured", "test_cost",
    "test_save_components",
)  # fmt: skip
# A training that goes by these alone, and is not probed.
BY_HAND = {
    "learning_rate": 1e-3,
    "ewc_weight": 50.0,
    "replay_weight": 1.0,
    "condition_dropout": 0.0,
    "max_grad_norm": 1.0,
    "use_ema": False,
    "num_probe_images": 0,
    "gradient_accumulation_steps": 1,
}


def pytest_configure(config):
    # Workers would take the modules with the most tests first, whatever those take.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def build_tiny_pipeline(prediction_type: str = "epsilon", safety_checker: bool = False) -> StableDiffusionPipeline:
    """A randomly initialised Stable Diffusion of about 40,000 parameters, 16x16 pixels."""
    torch.manual_seed(0)
    symbols = [*string.ascii_lowercase, *string.digits, "-", ",", "."]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=32
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    ).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    checker = extractor = None
    if safety_checker:
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 16, "patch_size": 8}  # fmt: skip
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
        # Every image lies nearer than this to every forbidden concept: all are blacked out.
        checker.concept_embeds_weights.data.fill_(-2.0)
        extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, checker, extractor, requires_safety_checker=safety_checker
    )


def as_flags(settings) -> list[str]:
    """Settings as a command line has them; None leaves one out."""
    arguments = []
    for name, value in settings.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def run_here(main, arguments, folder: Path) -> subprocess.CompletedProcess:
    """What a script's process would end with, without the seconds that starting one takes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.chdir(folder)
        patch.setenv("SA_DIFFUSERS_CACHE", str(folder / "cache"))
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def run_script(script: Path, arguments, folder: Path) -> subprocess.CompletedProcess:
    """What `python script ...` would end with, as by `run_here`."""

    def main(words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), *words])
            patch.syspath_prepend(str(script.parent))
            runpy.run_path(str(script), run_name="__main__")

    return run_here(main, arguments, folder)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state for a process; a test may ask for another precision than the one before, or than its
    own fixtures of a wider scope."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def known_families():
    """A script that is run here registers a family of its own, which no other test is to find."""
    with mock.patch.dict(registry._FAMILIES):
        yield


@pytest.fixture(scope="session", autouse=True)
def no_failure_of_the_machine():
    """Nothing here has to outlive one, and waiting for the disk takes a fifth of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What other versions have sampled lies in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SA_DIFFUSERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """What is there before a module's tests stays: to walk through it takes a collection a third of a second, and a
    run makes two."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_objective():
    return objective_for(build_tiny_pipeline())


@pytest.fixture
def tiny_settings(tiny_folder, tmp_path) -> dict:
    """Settings of an erasure that runs in seconds."""
    return {
        "concept": ["brad pitt"],
        "surrogate": ["a middle aged man"],
        "pretrained_model_name_or_path": str(tiny_folder),
        "output_dir": str(tmp_path / "erased"),
        "artifacts_dir": str(tmp_path / "artifacts"),
        "num_surrogate_images": 6,
        "num_replay_images": 10,
        "num_inference_steps": 2,
        "sample_batch_size": 5,
        "num_fisher_samples": 3,
        "fisher_timesteps": 4,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "num_eval_images": 2,
        "report_to": "none",
        **BY_HAND,
    }


@pytest.fixture
def tiny_config(tiny_settings) -> SelectiveAmnesiaConfig:
    return SelectiveAmnesiaConfig(**tiny_settings)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP with random weights that knows the embedded pipeline's words."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(embedded_pipeline() / "tokenizer")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "bos_token_id":
            tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id":
            tokenizer.eos_token_id}  # fmt: skip
    vision = {**size, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)).save_pretrained(folder)
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**crop), tokenizer).save_pretrained(folder)
    return folder
