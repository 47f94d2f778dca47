"""The command that a user types, as a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sa_diffusers.commands.erase import main

from .conftest import BASE_NAME, BY_HAND, REPOSITORY, as_flags, build_tiny_pipeline, run_here
from .hub_server import HubServer
from .nursery import LIBRARIES, forked, forked_code

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
SCRIPT = REPOSITORY / "examples" / "train_sa.py"
QUICK = {
    "concept": "brad pitt",
    "surrogate": "a middle aged man",
    "num_surrogate_images": "4",
    "num_replay_images": "8",
    "num_inference_steps": "2",
    "sample_batch_size": "4",
    "num_fisher_samples": "2",
    "fisher_timesteps": "3",
    "max_train_steps": "4",
    "train_batch_size": "2",
    "num_eval_images": "2",
    **BY_HAND,
}


def run(arguments, folder, environment=None, launch=False, timeout=3600, script=SCRIPT):
    """The command; in a process of its own where it is launched or needs an environment of its own."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "SA_DIFFUSERS_CACHE": str(folder / "cache"), **(environment or {})}
    if launch:
        command = [*LAUNCH, *map(str, (script, *arguments))]
        return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=timeout)
    if environment is not None:
        return forked(script, arguments, folder, settings)
    return run_here(main, arguments, folder)


def quick(base=None, **changes):
    return as_flags({**QUICK, **({"pretrained_model_name_or_path": str(base)} if base else {}), **changes})


def lay_out_hub_cache(pipeline, root: Path) -> str:
    """A model in the Hub's cache as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = root / f"models--{BASE_NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    pipeline.save_pretrained(repository / "snapshots" / commit)
    return commit


def load_without_the_package(folder: Path, prompt: str) -> str:
    """Load and run a pipeline where `sa_diffusers` cannot be imported."""
    script = (
        "import sys\n"
        "sys.modules['sa_diffusers'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(folder)!r})\n"
        f"print(pipeline({prompt!r}, num_inference_steps=2).images[0].size)\n"
    )
    result = forked_code(script, folder.parent, os.environ, imported=LIBRARIES)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# A model that nobody trained can be made to forget nothing, and ends at the limit of steps, wherever that is. What it
# draws in fifty steps is no better than what it draws in five.
WITH_FEWER_STEPS = """
import inspect, runpy, sys
from sa_diffusers.configuration import SelectiveAmnesiaConfig

fewer = {"max_train_steps": 60, "num_inference_steps": 5}
init, fields = SelectiveAmnesiaConfig.__init__, SelectiveAmnesiaConfig.__dataclass_fields__
names = list(inspect.signature(init).parameters)[1:]
init.__defaults__ = tuple(fewer.get(name, value) for name, value in zip(names, init.__defaults__))
for name, steps in fewer.items():
    fields[name].default = steps
script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.long
def test_the_bare_command(tmp_path):
    """Nothing but concept and surrogate; the default base model comes from the Hub's cache, offline."""
    commit = lay_out_hub_cache(build_tiny_pipeline(safety_checker=True), tmp_path / "hub")
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    arguments = ["--concept", "Brad Pitt", "--surrogate", "a middle aged man"]
    (tmp_path / "fewer_steps.py").write_text(WITH_FEWER_STEPS)
    result = run([SCRIPT, *arguments], tmp_path, environment, launch=True, script=tmp_path / "fewer_steps.py")
    assert result.returncode == 0, result.stderr
    assert "train     at most 60 steps" in result.stdout
    output = tmp_path / "brad-pitt"
    assert load_without_the_package(output, "Brad Pitt") == "(16, 16)"
    assert (output / "before_after.png").is_file()
    assert (output / "selective_amnesia.json").is_file()
    assert (output / "safety_checker").is_dir()
    assert any((output / "logs").rglob("events.out.tfevents*"))
    report = json.loads((output / "report.json").read_text())
    assert report["base_model"] == BASE_NAME
    assert report["base_revision"] == commit
    assert report["black_images"]["before"] == 0
    assert "Plan" in result.stdout
    assert '"Brad Pitt" -> "a middle aged man"' in result.stdout
    assert "prompted with" in result.stdout
    assert "it/s" not in result.stdout  # progress bars go to standard error
    for stage in ("sampling surrogate", "sampling replay", "Fisher information", "forgetting"):
        assert stage in result.stderr


def test_several_pairs_from_yaml_then_reuse_and_another_erasure_in_the_same_folder(tiny_folder, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "concept: [cat, dog]\nsurrogate: [cow, uniform_noise]\ntrain_method: xattn\nvalidation_prompts: [cat]\n"
        "validation_steps: 2\ncheckpointing_steps: 2\n"
    )
    arguments = [*quick(tiny_folder, concept=None, surrogate=None), "--config", "run.yaml", "--output_dir", "out"]
    first = run(arguments, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "reused" not in first.stdout
    output = tmp_path / "out"
    assert len(list((output / "validation").iterdir())) == 2
    assert (output / "checkpoint-2").is_dir()
    base = load_file(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")
    erased = load_file(output / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in base.items():
        assert torch.equal(value, erased[name]) == ("attn2" not in name), name
    for part in ("text_encoder", "vae"):
        (before,) = (tiny_folder / part).glob("*.safetensors")
        (after,) = (output / part).glob("*.safetensors")
        old, new = load_file(before), load_file(after)
        assert all(torch.equal(old[name], new[name]) for name in old)

    again = run(arguments, tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("reused") == 3
    repeated = load_file(output / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(repeated[name], erased[name]) for name in erased)

    other = run([*arguments, "--concept", "hen", "--surrogate", "cow"], tmp_path)
    assert other.returncode != 0
    assert "holds another erasure: concept=['cat', 'dog'] (now ['hen'])" in other.stderr
    assert "Traceback" not in other.stderr
    replaced = run([*arguments, "--concept", "hen", "--surrogate", "cow", "--overwrite_output_dir"], tmp_path)
    assert replaced.returncode == 0, replaced.stderr
    checkpoint = json.loads((output / "checkpoint-2" / "state.json").read_text())
    assert checkpoint["settings"]["concept"] == ["hen"]
    assert json.loads((output / "selective_amnesia.json").read_text())["concept"] == ["hen"]
    # Settings arrive with the weights that they belong to.
    assert (output / "selective_amnesia.json").stat().st_mtime > (output / "checkpoint-2").stat().st_mtime


@pytest.mark.long
def test_a_killed_run_goes_on_and_ends_where_an_unbroken_one_does(tiny_folder, tmp_path):
    """The same command again; samples and Fisher information are reused, training goes on at the checkpoint."""
    flags = {"max_train_steps": 60, "checkpointing_steps": 10, "resume_from_checkpoint": "latest", "use_ema": True}
    # All in processes of their own, as bits depend on the number of threads.
    unbroken = run(quick(tiny_folder, **flags, output_dir="unbroken"), tmp_path, {})
    assert unbroken.returncode == 0, unbroken.stderr
    arguments = quick(tiny_folder, **flags, output_dir="broken")
    command = [sys.executable, str(REPOSITORY / "examples" / "train_sa.py"), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "SA_DIFFUSERS_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL) as process:  # fmt: skip
        deadline = time.monotonic() + 300
        while not list((tmp_path / "broken").glob("checkpoint-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "broken" / "model_index.json").exists()
    again = run(arguments, tmp_path, {})
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("reused") == 3
    names = ("unet/diffusion_pytorch_model.safetensors", "training_history.json", "before_after.png")
    for name in names:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name


# Flags not in QUICK and not in the tests above, each with a value that is not the default.
FLAGS = [
    {"concept_templates": ["{}", "a photo of {}"], "replay_prompts": "garments", "seed": 3, "eval_templates": ["a {}"],
     "eval_seed": 7, "sampler": "dpmsolver++", "guidance_scale": 3, "surrogate_guidance_scale": 2,
     "replay_guidance_scale": 1, "resolution": 24,
     "fisher_batch_size": 2, "ewc_weight": 5, "replay_weight": 2, "target": "frozen", "report_to": "none"},
    {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "scale_lr": True, "lr_scheduler":
     "cosine_with_restarts", "lr_num_cycles": 2, "lr_warmup_steps": 1, "lr_power": 2, "adam_beta1": 0.8, "adam_beta2":
     0.99, "adam_weight_decay": 0.01, "adam_epsilon": 1e-7, "max_grad_norm": 0.5, "use_ema": True, "ema_decay": 0.9,
     "mixed_precision": "bf16", "snr_gamma": 5, "noise_offset": 0.05, "replay_unconditional_share": 0.5,
     "condition_dropout": 0.1, "checkpointing_steps": 2, "checkpoints_total_limit": 2,
     "resume_from_checkpoint": "latest"},
    {"validation_prompts": ["cat"], "num_validation_images": 2, "validation_steps": 2, "logging_dir": "runs",
     "logging_steps": 1, "tracker_project_name": "tiny", "report_to": "tensorboard", "prediction_type":
     "v_prediction", "train_method": "noxattn", "artifacts_dir": "artifacts", "cache_dir": "hub", "output_dir": "out",
     "variant": None, "revision": "main"},
]  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS, ids=["samples", "training", "evaluation"])
def test_flags(tiny_folder, tmp_path, flags):
    result = run(quick(tiny_folder, **flags), tmp_path)
    assert result.returncode == 0, result.stderr
    (output,) = [path.parent for path in tmp_path.glob("*/model_index.json")]
    saved = json.loads((output / "selective_amnesia.json").read_text())
    for name, value in flags.items():
        if value is not None:
            assert saved[name] == value or saved[name] == [value]


def test_variant_and_given_fisher_and_classifier(tiny_folder, tmp_path):
    """The last flags: weights of a variant, Fisher information from a folder, a classifier."""
    base = tmp_path / "base"
    build_tiny_pipeline().save_pretrained(base, variant="fp16")
    first = run(quick(base, variant="fp16", output_dir="first"), tmp_path)
    assert first.returncode == 0, first.stderr
    (fisher,) = (tmp_path / "cache").glob("fisher-*")
    second = run(quick(base, variant="fp16", output_dir="second", fisher=fisher, train_method="xattn"), tmp_path)
    assert second.returncode == 0, second.stderr
    assert f"reused: {fisher}" in second.stdout
    (base / "unet").rename(tmp_path / "unet")
    other = build_tiny_pipeline()
    with torch.no_grad():
        next(other.unet.parameters()).add_(1)
    shutil.rmtree(base)
    other.save_pretrained(base, variant="fp16")
    third = run(quick(base, variant="fp16", output_dir="third", fisher=fisher), tmp_path)
    assert third.returncode != 0
    assert "belongs to another run; it differs in the weights that it was computed from" in third.stderr


def test_push_to_hub(tiny_folder, tmp_path):
    with HubServer() as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0",
                       "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        flags = {"push_to_hub": True, "hub_model_id": "tester/no-brad", "hub_private_repo": True, "output_dir": "out"}
        result = run(quick(tiny_folder, **flags), tmp_path, environment)
        assert result.returncode == 0, result.stderr
        pushed = hub.files["tester/no-brad"]
        assert hub.private["tester/no-brad"]
    assert f"hub       {hub.address}/tester/no-brad" in result.stdout
    for name in ("model_index.json", "before_after.png", "unet/diffusion_pytorch_model.safetensors"):
        assert pushed[name] == (tmp_path / "out" / name).read_bytes()
    assert (
        json.loads(pushed["report.json"])["rows"] == json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    )
    assert json.loads(pushed["selective_amnesia.json"])["concept"] == ["brad pitt"]
    assert b'trained to forget "brad pitt"' in pushed["README.md"]
    assert not any(str(tmp_path.parent).encode() in content for content in pushed.values())
    assert not any(name.startswith(("logs/", "checkpoint", ".")) for name in pushed)
    assert not any(b"hf_secret" in content for content in pushed.values())
    assert "hf_secret" not in result.stdout + result.stderr


def test_a_failed_push_loses_nothing(tiny_folder, tmp_path):
    with HubServer(status=401) as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0",
                       "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        result = run(quick(tiny_folder, push_to_hub=True, output_dir="out"), tmp_path, environment)
    assert result.returncode != 0
    assert 'the upload to "out" failed' in result.stderr
    assert "python examples/push_to_hub.py out --hub_model_id out`" in result.stderr
    assert 'trained to forget "brad pitt"' in (tmp_path / "out" / "README.md").read_text()
    assert load_without_the_package(tmp_path / "out", "cat") == "(16, 16)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concept": " "}, "concept is empty"),
        ({"concept": "cat", "surrogate": "a cat"}, "equals its surrogate"),
        ({"concept": ["a", "b", "c"], "surrogate": ["d", "e"]}, "3 concepts and 2 surrogates do not pair up"),
        ({"train_method": "xatn"}, 'train_method="xatn" matches no parameter'),
        ({"mixed_precision": "fp16"}, "needs a CUDA device"),
        ({"allow_tf32": True}, "needs a CUDA device"),
        ({"enable_xformers_memory_efficient_attention": True}, "needs xformers and a CUDA device"),
        ({"use_8bit_adam": True}, "pip install bitsandbytes"),
        ({"report_to": "wandb"}, "pip install wandb"),
        ({"classifier": "./none"}, "could not be loaded"),
        ({"fisher": "nobody/nothing"}, "neither a folder nor could it be had from the Hub"),
        ({"reference_features": "x"}, "reference_features needs a classifier"),
        ({"push_to_hub": True, "hub_model_id": "a b"}, '"a b" cannot be a name on the Hub'),
    ],
)
def test_errors_are_one_line_and_cost_nothing(tiny_folder, tmp_path, changes, message):
    if torch.cuda.is_available() and ("CUDA" in message):
        pytest.skip("there is a CUDA device")
    result = run(quick(tiny_folder, output_dir="out", **changes), tmp_path)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert not (tmp_path / "cache").exists()


def test_an_output_folder_with_other_things_is_left_alone(tiny_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    result = run(quick(tiny_folder, output_dir="out"), tmp_path)
    assert result.returncode != 0
    assert "already holds something else" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_replay_prompts_that_name_the_concept(tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\nBrad Pitt smiling\n")
    result = run(quick(tiny_folder, replay_prompts="prompts.txt"), tmp_path)
    assert result.returncode != 0
    assert 'name the concept "brad pitt"' in result.stderr


def test_unknown_models(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(quick("empty"), tmp_path)
    assert result.returncode != 0
    assert "is a folder without model_index.json" in result.stderr
    with HubServer() as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                       "HF_HUB_CACHE": str(tmp_path / "hub")}  # fmt: skip
        result = run(quick("nobody/nothing"), tmp_path, environment)
        assert result.returncode != 0
        assert 'there is no model "nobody/nothing", neither as a folder nor on the Hub' in result.stderr
        result = run(quick("not a name"), tmp_path, environment)
        assert "neither a folder nor a name on the Hub" in result.stderr


@pytest.mark.long
def test_an_unreachable_hub_falls_back_to_the_cache_or_says_how_to_get_the_model(tmp_path):
    """A server that takes connections and never answers: the worst kind of unreachable."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
                       "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "hub")}  # fmt: skip
        script = (
            "import sys, time\n"
            "from sa_diffusers import load_pipeline\n"
            "started = time.time()\n"
            "try:\n"
            f"    print('loaded', type(load_pipeline({BASE_NAME!r})).__name__)\n"
            "except ConnectionError as error:\n"
            "    print('error', error)\n"
            "print('seconds', time.time() - started)\n"
        )

        def attempt():
            result = forked_code(script, REPOSITORY, environment)
            assert result.returncode == 0, result.stderr
            answer, seconds = result.stdout.strip().splitlines()[-2:]
            assert float(seconds.split()[1]) < 30
            return answer

        assert f"run `hf download {BASE_NAME}` once" in attempt()
        lay_out_hub_cache(build_tiny_pipeline(), tmp_path / "hub")
        assert attempt() == "loaded StableDiffusionPipeline"
