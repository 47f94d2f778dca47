"""The command that a user types, for each family's best-known base, as its repository lies in the Hub's cache."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from .conftest import BY_HAND, REPOSITORY, as_flags
from .nursery import Nursery
from .test_every_family import pictures
from .test_train_script import LAUNCH
from .tiny_families import FAMILIES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What makes it end within seconds; all else is left to the family.
TINY = {
    "num_surrogate_images": 4, "num_replay_images": 4, "num_inference_steps": 2, "sample_batch_size": 4,
    "num_fisher_samples": 2, "fisher_timesteps": 2, "max_train_steps": 3, "train_batch_size": 2, "num_eval_images": 2,
    "report_to": "none", **BY_HAND,
}  # fmt: skip
NAMES = [name for name, family in FAMILIES.items() if family.repository]


def bytes_of(module):
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def lay_out(family, root: Path) -> Path:
    """A repository in the Hub's cache as a download leaves it: shards with their index, one variant."""
    repository = root / f"models--{family.repository.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    pipeline, variant = family.build(), {"variant": family.variant} if family.variant else {}
    if family.variant == "fp16":
        pipeline.to(torch.float16)
    pipeline.save_pretrained(snapshot, **variant)
    for part, count in family.shards.items():
        module = getattr(pipeline, part)
        for file in (snapshot / part).glob("*.safetensors"):
            file.unlink()
        # Shards are filled tensor by tensor: none is quite full.
        size = bytes_of(module) // count
        while len(list((snapshot / part).glob("*.safetensors"))) != count:
            for file in (snapshot / part).glob("*.safetensors*"):
                file.unlink()
            size += 512
            module.save_pretrained(snapshot / part, max_shard_size=size, **variant)
        assert list((snapshot / part).glob("*.index*.json"))
    # Beside the folders there is a checkpoint for other programs, of which a download takes the name alone.
    (snapshot / "model.safetensors").write_bytes(b"for other programs")
    return snapshot


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def nursery(hub):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "HF_HUB_CACHE": str(hub)}  # fmt: skip
    with Nursery(environment, LAUNCH, 900) as started:
        yield started


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_the_command_ends_in_a_pipeline_that_plain_diffusers_loads(name, hub, nursery, tmp_path):
    family = FAMILIES[name]
    snapshot = lay_out(family, hub)
    arguments = ["--pretrained_model_name_or_path", family.repository, "--concept", "Brad Pitt",
                 "--surrogate", "a middle aged man", *as_flags({**TINY, **family.settings})]  # fmt: skip
    script = REPOSITORY / "examples" / "train_sa.py"
    result = nursery.run(script, arguments, tmp_path, {"SA_DIFFUSERS_CACHE": str(tmp_path / "cache")})
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    report = json.loads((tmp_path / "brad-pitt" / "report.json").read_text())
    assert (report["base_model"], report["base_revision"]) == (family.repository, COMMIT)
    options = {"variant": family.variant} if family.variant else {}
    before = DiffusionPipeline.from_pretrained(snapshot, dtype=torch.float32, **options)
    after = DiffusionPipeline.from_pretrained(tmp_path / "brad-pitt")
    assert type(after) is type(before)
    for part, module in before.components.items():
        if isinstance(module, torch.nn.Module):
            saved = getattr(after, part).state_dict()
            equal = all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())
            assert equal == (part != family.part), part
    drawn, expected = (pictures(pipeline, family, output_type="np") for pipeline in (after, before))
    assert np.isfinite(drawn).all()
    assert np.abs(drawn - expected).max() > 1e-3
