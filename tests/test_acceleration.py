"""What makes training faster or smaller, for each family: it works, or a sentence says what is missing."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models import attention, attention_dispatch, attention_processor
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from sa_diffusers import Erasure, SelectiveAmnesiaConfig, objective_for
from sa_diffusers.stages.subject import enable_xformers, hands_to_xformers

from .test_every_family import PROMPTS, drawn, settings_of
from .tiny_families import FAMILIES

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
# With xformers and a CUDA device the flag works, and has no refusal to test.
HAS_XFORMERS = importlib.util.find_spec("xformers") is not None and torch.cuda.is_available()

HANDED = [FAMILIES[name] for name in ("stable diffusion", "SDXL", "SD3", "FLUX", "FLUX.2 klein")]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def objective(family):
    return objective_for(family.build())


def step(objective, family):
    """A forward and a backward pass: the losses, and the gradient of every parameter."""
    module = objective.module
    samples, timesteps, noise = drawn(objective, family.size)
    conditions = objective.encode_prompts(PROMPTS * 2)
    module.requires_grad_(True)
    module.train()
    module.zero_grad(set_to_none=True)
    losses = objective.negative_elbo(module, samples, conditions, timesteps, noise)
    losses.sum().backward()
    return losses.detach(), {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    largest = max(float(value.abs().max()) for value in other[1].values())
    for name, value in other[1].items():
        torch.testing.assert_close(one[1][name], value, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_gradient_checkpointing_gives_the_same_gradient(family, objective):
    plain = step(objective, family)
    objective.module.enable_gradient_checkpointing()
    calls, original = [], torch.utils.checkpoint.checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.utils.checkpoint, "checkpoint", lambda *given, **named: calls.append(1) or original(*given, **named)
        )
        checkpointed = step(objective, family)
    assert calls
    assert_same(checkpointed, plain)


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_every_kernel_of_pytorch_s_attention_gives_the_same_gradient(family, objective, kernel):
    """Those that a CPU has."""
    plain = step(objective, family)
    # What has a mask, a text encoder, is left to the kernel that can do it.
    with sdpa_kernel([kernel, SDPBackend.MATH], set_priority=True):
        chosen = step(objective, family)
    assert_same(chosen, plain)


def test_attention_that_a_pipeline_in_memory_has_chosen_is_kept(family, tmp_path):
    """By `set_attention_backend` of diffusers: samples, Fisher information and training call the module as it is."""
    plain = step(objective_for(family.build()), family)
    pipeline = family.build()
    # diffusers sets it for all that comes later too; the context takes that back.
    with attention_backend("native"):
        getattr(pipeline, family.part).set_attention_backend("_native_math")
        assert_same(step(objective_for(pipeline), family), plain)


class Kernel:
    """Stands in for xformers, which no CPU has: the same attention by PyTorch."""

    @staticmethod
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, op=None):
        # [batch, places, width], or with heads behind the places.
        turned = [part.transpose(1, 2) if part.dim() == 4 else part for part in (query, key, value)]
        result = F.scaled_dot_product_attention(*turned, attn_mask=attn_bias, scale=scale)
        return result.transpose(1, 2) if query.dim() == 4 else result


def test_what_is_handed_to_xformers_computes_the_same(family, objective, monkeypatch):
    """And what is not would compute another thing, or nothing: diffusers puts plain attention in its place."""
    assert (family in HANDED) == hands_to_xformers(objective.module)
    plain = step(objective, family)
    drawn_anywhere = torch.randn
    with monkeypatch.context() as patch:
        for place in (attention, attention_processor):
            patch.setattr(place, "is_xformers_available", lambda: True)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch, "randn", lambda *given, device=None, **named: drawn_anywhere(*given, **named))
        patch.setattr(attention, "xops", SimpleNamespace(ops=Kernel), raising=False)
        monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=Kernel))
        monkeypatch.setattr(attention_dispatch, "xops", Kernel, raising=False)
        objective.module.enable_xformers_memory_efficient_attention()
    if family in HANDED:
        assert_same(step(objective, family), plain)
    else:
        with pytest.raises((AssertionError, ValueError, TypeError, RuntimeError)):
            assert_same(step(objective, family), plain)


@pytest.mark.parametrize("installed", [False] if not HAS_XFORMERS else [])
def test_xformers_is_refused_where_it_is_missing(family, objective, installed):
    if family not in HANDED:
        with pytest.raises(ValueError, match="diffusers hands no attention of .* to xformers, or another in its place"):
            enable_xformers(objective.module)
        return
    with pytest.raises(ValueError, match="needs xformers and a CUDA device .*leave the flag out") as error:
        enable_xformers(objective.module)
    assert "\n" not in str(error.value)


def test_xformers_is_refused_where_it_would_change_nothing():
    module = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="diffusers hands no attention of UNet2DModel to xformers"):
        enable_xformers(module)


def test_8_bit_adam_trains_or_says_what_is_missing(family, tmp_path):
    base, output = tmp_path / "base", tmp_path / "out"
    family.build().save_pretrained(base)
    config = SelectiveAmnesiaConfig(**{**settings_of(family, base, output), "use_8bit_adam": True,
                                       "max_train_steps": 2, "checkpointing_steps": 1})  # fmt: skip
    if not HAS_BITSANDBYTES:
        with pytest.raises(ValueError, match="use_8bit_adam needs bitsandbytes: pip install bitsandbytes"):
            Erasure(config)
        return
    Erasure(config).run()
    before, after = (load_file(next((folder / family.part).glob("*.safetensors"))) for folder in (base, output))
    assert sum(not torch.equal(value, before[name]) for name, value in after.items()) > 0.8 * len(after)
    assert all(torch.isfinite(value).all() for value in after.values())
    # From the checkpoint before the last step, with the optimiser's state as it was.
    history = json.loads((output / "training_history.json").read_text())
    resumed = config.replace(output_dir=str(tmp_path / "again"), resume_from_checkpoint=str(output / "checkpoint-1"))
    Erasure(resumed).run()
    again = load_file(next((tmp_path / "again" / family.part).glob("*.safetensors")))
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    assert json.loads((tmp_path / "again" / "training_history.json").read_text()) == history
