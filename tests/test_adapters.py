"""Erasures as adapters: a small file in place of weights, which can be switched on and off."""

import contextlib
import json
import os
import re
import runpy
import shutil
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import PeftAdapterMixin
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sa_diffusers
from sa_diffusers import Erasure, SelectiveAmnesiaConfig, SelectiveAmnesiaTrainer, objective_for
from sa_diffusers.commands import main
from sa_diffusers.configuration import CONFIG_NAME
from sa_diffusers.families.adapters import (
    ADAPTER_FILE,
    KOHYA_FILE,
    LowRankAdapter,
    adapter_layers,
    export_kohya,
    read_adapter,
    save_adapter,
)
from sa_diffusers.merging import extract_adapter, merge_adapter
from sa_diffusers.output_folder import OutputFolder
from sa_diffusers.publish import build_model_card, push_pipeline
from sa_diffusers.seeds import seed_of
from sa_diffusers.training.ewc import ElasticWeightConsolidation, RowsByColumns
from sa_diffusers.training.trainable import AdapterWeights, SwitchedOff

from .conftest import as_flags, build_tiny_pipeline, run_here
from .hub_server import HubServer, card_errors
from .nursery import forked_code
from .test_hub import online, push
from .test_single_file import as_checkpoint

PROMPT = "a dog"


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_tiny_pipeline().unet


def randomised(adapter):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted():
    """A UNet with a random adapter on all that takes one, and random Fisher information of all its weights."""
    module = small_unet()
    names = dict(module.named_parameters())
    generator = torch.Generator().manual_seed(0)
    fisher = {name: torch.rand(value.shape, generator=generator) for name, value in names.items()}
    adapter = LowRankAdapter(module, adapter_layers(module, names).sizes, rank=3, seed=5)
    randomised(adapter)
    return module, adapter, fisher


def merged(layer):
    """The weight with its update, as peft computes it, with its graph."""
    return layer.get_base_layer().weight.detach() + layer.get_delta_weight("default")


def test_the_gradient_of_the_penalty_is_that_of_autograd_on_the_merged_weights(adapted):
    module, adapter, fisher = adapted
    weights = AdapterWeights(module, adapter.parameters, adapter)
    ewc = ElasticWeightConsolidation(weights, fisher, weight=7.0)
    assert any(layer.get_base_layer().weight.dim() == 4 for layer in adapter.layers.values())
    expected = 7.0 * sum(
        (fisher[name] * (merged(layer) - layer.get_base_layer().weight.detach()) ** 2).sum()
        for name, layer in adapter.layers.items()
    )
    gradients = torch.autograd.grad(expected, list(adapter.parameters.values()))
    torch.testing.assert_close(ewc.penalty(), expected.detach())
    for parameter in list(adapter.parameters.values())[::2]:
        parameter.grad = torch.ones_like(parameter)
    ewc.add_gradient_(0.5)
    for number, (parameter, gradient) in enumerate(zip(adapter.parameters.values(), gradients, strict=True)):
        there = 1.0 if number % 2 == 0 else 0.0
        torch.testing.assert_close(parameter.grad - there, 0.5 * gradient, rtol=1e-4, atol=1e-3)


class Stack(PeftAdapterMixin, nn.Module):
    """Equal layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Made(TorchDispatchMode):
    """The largest number of bytes, at one time, of tensors made meanwhile; those given do not count."""

    def __init__(self, others):
        super().__init__()
        self.others = {value.untyped_storage().data_ptr() for value in others}
        self.live, self.peak = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.live |= {id(value): value for value in tree_leaves(result) if isinstance(value, torch.Tensor)}
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in self.live.values()}
        self.peak = max(self.peak, sum(one.nbytes() for place, one in storages.items() if place not in self.others))
        return result


@pytest.fixture(params=[lambda: nn.Linear(144, 64), lambda: nn.Conv2d(16, 64, 3)], ids=["linear", "conv"])
def stack(request, count):
    """Layers of 64 rows and 144 columns with a random adapter of rank 2, and random Fisher information."""
    module = Stack(request.param() for _ in range(count))
    fisher = {name: torch.rand(value.shape) for name, value in module.named_parameters()}
    adapter = LowRankAdapter(module, adapter_layers(module, fisher).sizes, rank=2)
    randomised(adapter)
    return AdapterWeights(module, adapter.parameters, adapter), fisher


UPDATE, MATRICES = 4 * 64 * 144, 4 * 2 * (64 + 144)


@pytest.mark.parametrize("count", [1, 6])
def test_the_penalty_holds_one_layer_s_update_at_a_time(stack, count):
    weights, fisher = stack
    ewc = ElasticWeightConsolidation(weights, fisher, weight=7.0)
    # The gradients stay, and a second one of a layer is added to its first.
    bounds = {ewc.penalty: UPDATE + 64, ewc.add_gradient_: UPDATE + (count + 1) * MATRICES}
    for call, bound in bounds.items():
        with Made([*weights.module.parameters(), *fisher.values()]) as made:
            call()
            call()
        assert UPDATE <= made.peak <= bound < 2 * UPDATE


@pytest.mark.parametrize("count", [1, 6])
def test_rows_by_columns_hold_no_update(stack, count):
    weights, fisher = stack
    factored = RowsByColumns(weights, fisher, weight=7.0)
    bounds = {factored.penalty: MATRICES, factored.add_gradient_: (count + 1) * MATRICES}
    for call, bound in bounds.items():
        with Made([*weights.module.parameters(), *fisher.values()]) as made:
            call()
            call()
        assert 0 < made.peak <= bound < UPDATE / 2


def test_rows_by_columns_are_what_they_stand_for(adapted):
    """Against autograd on ||diag(sqrt r) B A diag(sqrt c)||^2, and equal to the diagonal where that is a product."""
    module, adapter, fisher = adapted
    weights = AdapterWeights(module, adapter.parameters, adapter)
    factored = RowsByColumns(weights, fisher, weight=7.0)
    expected, products = 0, {}
    for name, layer in adapter.layers.items():
        matrix = fisher[name].flatten(1)
        rows, columns = matrix.sum(1) / matrix.sum().sqrt(), matrix.sum(0) / matrix.sum().sqrt()
        update = layer.get_delta_weight("default").flatten(1)
        expected = expected + 7.0 * (rows[:, None].sqrt() * update * columns.sqrt()).square().sum()
        products[name] = torch.outer(rows, columns).view(fisher[name].shape)
    gradients = torch.autograd.grad(expected, list(adapter.parameters.values()))
    torch.testing.assert_close(factored.penalty(), expected.detach(), rtol=1e-4, atol=1e-3)
    factored.add_gradient_(0.5)
    for parameter, gradient in zip(adapter.parameters.values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, 0.5 * gradient, rtol=1e-3, atol=1e-2)
    exact = ElasticWeightConsolidation(weights, products, weight=7.0)
    torch.testing.assert_close(exact.penalty(), expected.detach(), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="no Fisher information for conv_in.weight"):
        RowsByColumns(weights, {}, 1.0)
    # The same from the sums alone.
    sums = {name: torch.cat([value.flatten(1).sum(1), value.flatten(1).sum(0)]) for name, value in fisher.items()
            if value.dim() > 1}  # fmt: skip
    torch.testing.assert_close(RowsByColumns(weights, sums, weight=7.0).penalty(), factored.penalty())
    with pytest.raises(ValueError, match="Fisher information of conv_in.weight has shape"):
        RowsByColumns(weights, {name: value[1:] for name, value in sums.items()}, 1.0)
    # A weight that nothing depends on costs nothing.
    still = RowsByColumns(weights, {name: torch.zeros_like(value) for name, value in fisher.items()}, 1.0)
    assert still.penalty() == 0


def test_the_teacher_is_the_module_as_it_was_and_gradients_are_still_asked_for(adapted):
    module, adapter, _ = adapted
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 7, 16)
    with torch.no_grad():
        expected, other = small_unet()(*inputs).sample, module(*inputs).sample
    teacher = AdapterWeights(module, adapter.parameters, adapter).teacher
    module.train()
    assert torch.equal(teacher(*inputs).sample, expected)
    assert not torch.equal(other, expected)
    assert module.training
    assert all(parameter.requires_grad for parameter in adapter.parameters.values())
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs).sample, other)


def test_the_teacher_is_asked_before_a_forward_pass_and_never_before_its_backward_pass(settings, monkeypatch):
    """Gradient checkpointing runs the forward pass again in the backward pass, as the flags are then."""
    seen = []

    def noted(what, function):
        def call(*args, **kwargs):
            seen.append(what)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(SwitchedOff, "__call__", noted("teacher", SwitchedOff.__call__))
    monkeypatch.setattr(Accelerator, "backward", noted("backward", Accelerator.backward))
    monkeypatch.setattr(UNet2DConditionModel, "forward", noted("forward", UNet2DConditionModel.forward))
    more = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_train_steps": 2, "target": "frozen"}
    erasure = Erasure(SelectiveAmnesiaConfig(**{**settings, **more}))
    surrogates = erasure.surrogates()
    products = erasure.products(surrogates)
    seen.clear()
    with erasure.holding():
        erasure.training_stage.run(surrogates, *products)
    passes = " ".join(seen)
    assert passes.count("teacher") >= 4
    assert re.fullmatch(r"((teacher forward )+forward backward ?){4}", passes), passes


def test_a_module_gets_its_own_layers_back():
    module, plain = small_unet(), small_unet().state_dict()
    module.conv_in.requires_grad_(False)
    flags = {name: value.requires_grad for name, value in module.named_parameters()}
    adapter = LowRankAdapter(module, ["conv_in", "time_embedding.linear_1"], 2)
    randomised(adapter)
    adapter.remove()
    assert {name: value.requires_grad for name, value in module.named_parameters()} == flags
    assert all(torch.equal(value, plain[name]) for name, value in module.state_dict().items())


def test_the_start_is_a_matter_of_the_seed_alone():
    first, again, other = (
        LowRankAdapter(small_unet(), ["conv_in"], 2, seed).state()["conv_in.lora_A.weight"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_grouped_convolutions_stay_frozen_and_are_named():
    module = nn.ModuleDict({"grouped": nn.Conv2d(4, 4, 3, groups=2), "plain": nn.Conv2d(4, 6, 3), "norm":
                            nn.GroupNorm(2, 4), "linear": nn.Linear(5, 7)})  # fmt: skip
    layers = adapter_layers(module, dict(module.named_parameters()))
    assert layers.sizes == {"plain": (6, 36), "linear": (7, 5)}
    assert layers.grouped == ("grouped",)
    assert layers.numbers(3) == 3 * (42 + 12)
    with pytest.raises(ValueError, match="none of the 2 selected parameters is the weight of a linear layer"):
        adapter_layers(module, ["norm.weight", "norm.bias"])


def test_a_layer_whose_name_others_end_in_is_adapted_alone():
    """FLUX has a proj_out of its own, and one in each single block."""
    module = small_unet()
    module.proj_out = nn.Linear(2, 2)
    assert any(name.endswith(".proj_out") for name, _ in module.named_modules())
    assert list(LowRankAdapter(module, ["proj_out"], 2).layers) == ["proj_out.weight"]


@pytest.fixture
def settings(tiny_settings):
    return {**tiny_settings, "adapter": "lora", "lora_rank": 2, "learning_rate": 1e-2, "ewc_weight": 0.0,
            "logging_steps": 1}  # fmt: skip


@pytest.fixture
def erased(settings):
    Erasure(SelectiveAmnesiaConfig(**settings)).run()
    return settings["output_dir"]


def header_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def assert_header_tells(file, base):
    """Concept, surrogate, base and version, in keys of their own, and no folder of this machine."""
    header = header_of(file)
    assert json.loads(header["concept"]) == ["brad pitt"]
    assert json.loads(header["surrogate"]) == ["a middle aged man"]
    assert header["base_model"] == base.name
    assert header["pipeline_class"] == "StableDiffusionPipeline"
    assert header["sa_diffusers_version"] == sa_diffusers.__version__
    assert str(base.parent) not in str(header)
    return header


def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


def test_the_same_adapter_is_the_same_file_to_the_byte(tmp_path):
    """safetensors writes what a header tells in another order each time."""
    objective = objective_for(build_tiny_pipeline())
    adapter = LowRankAdapter(objective.module, adapter_layers(objective.module, objective.select("xattn")).sizes, 2, 5)
    state, told = adapter.state(), {"concept": ["brad pitt", "mütze"], **{name: name for name in "abcdef"}}
    adapter.remove()
    written = set()
    for number in range(4):
        save_adapter(objective, state, 2, tmp_path / str(number), told)
        export_kohya(objective, tmp_path / str(number), tmp_path / str(number))
        written.add(tuple((tmp_path / str(number) / name).read_bytes() for name in (ADAPTER_FILE, KOHYA_FILE)))
    assert len(written) == 1
    found, header = read_adapter(tmp_path / "0")
    assert {name: header[name] for name in "abcdef"} == {name: name for name in "abcdef"}
    assert json.loads(header["concept"]) == told["concept"]
    for name, value in state.items():
        assert torch.equal(found[f"unet.{name}"], value), name


def test_it_is_switched_on_and_off_in_diffusers_alone(erased, tiny_folder):
    base = images(DiffusionPipeline.from_pretrained(tiny_folder))
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.load_lora_weights(erased, adapter_name="a")
    whole = images(pipeline)
    assert np.abs(whole - base).max() > 1e-3
    pipeline.set_adapters("a", 0.0)
    assert np.array_equal(images(pipeline), base)
    pipeline.set_adapters("a", 0.5)
    half = images(pipeline)
    assert not np.array_equal(half, base)
    assert not np.array_equal(half, whole)
    pipeline.set_adapters("a", 1.0)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    np.testing.assert_allclose(images(pipeline), whole, atol=1e-4)
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.load_lora_weights(erased)
    pipeline.unload_lora_weights()
    assert np.array_equal(images(pipeline), base)
    header = assert_header_tells(Path(erased) / ADAPTER_FILE, tiny_folder)
    assert json.loads(header["lora_adapter_metadata"])["unet.r"] == 2


def test_several_are_loaded_together_and_each_is_switched_on_and_off(erased, settings, tiny_folder, tmp_path):
    other = {**settings, "concept": ["cat"], "surrogate": ["dog"], "output_dir": str(tmp_path / "other"), "seed": 1}
    Erasure(SelectiveAmnesiaConfig(**other)).run()
    folders = {"a": erased, "b": other["output_dir"]}
    base = DiffusionPipeline.from_pretrained(tiny_folder)
    weights, plain = dict(base.unet.named_parameters()), images(base)
    alone, updates = {}, {}
    for name, folder in folders.items():
        pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
        pipeline.load_lora_weights(folder)
        alone[name] = images(pipeline)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        updates[name] = {key: value - weights[key] for key, value in pipeline.unet.named_parameters()}
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    for name, folder in folders.items():
        pipeline.load_lora_weights(folder, adapter_name=name)
    for name in folders:
        pipeline.set_adapters(name, 1.0)
        assert np.array_equal(images(pipeline), alone[name])
    pipeline.set_adapters(["a", "b"], [1.0, 0.5])
    both = images(pipeline)
    # Their updates add up, each at its strength.
    with torch.no_grad():
        for key, value in weights.items():
            value += updates["a"][key] + 0.5 * updates["b"][key]
    np.testing.assert_allclose(both, images(base), atol=1e-3)
    assert np.abs(both - alone["a"]).max() > 1e-3
    pipeline.set_adapters(["a", "b"], [0.0, 0.0])
    assert np.array_equal(images(pipeline), plain)


def test_fisher_information_is_that_of_the_weights(settings, tmp_path):
    """The same artefact serves both."""
    configs = [SelectiveAmnesiaConfig(**{**settings, "ewc_weight": 1.0, **more}) for more in ({}, {"adapter": None})]
    adapter, full = (Erasure(config) for config in configs)
    assert adapter.fisher_stage.folder == full.fisher_stage.folder
    assert adapter.identity != full.identity
    # An adapter on fewer layers takes it too, handed in.
    full.fisher_stage.run()
    made = full.fisher_stage.folder / "fisher.safetensors"
    before = made.stat().st_mtime_ns
    adapter.run()
    assert made.stat().st_mtime_ns == before
    more = {"ewc_weight": 1.0, "train_method": "xattn", "fisher": str(full.fisher_stage.folder)}
    fewer = Erasure(SelectiveAmnesiaConfig(**{**settings, **more, "output_dir": str(tmp_path / "fewer")}))
    assert len(fewer.subject.layers.sizes) < len(adapter.subject.layers.sizes)
    fewer.run()
    history = json.loads((tmp_path / "fewer" / "training_history.json").read_text())
    assert history[-1]["ewc_penalty"] > 0


@pytest.mark.long
def test_rows_by_columns_are_estimated_as_such_and_both_forms_are_taken(settings, tmp_path):
    """Nothing as large as the weights is kept; the diagonal, handed in, gives the same training to rounding."""
    more = {"ewc_weight": 1.0, "fisher_form": "rows_by_columns"}
    exact = Erasure(SelectiveAmnesiaConfig(**{**settings, "ewc_weight": 1.0})).fisher_stage
    assert exact.run() is not None
    erasure = Erasure(SelectiveAmnesiaConfig(**{**settings, **more}))
    assert any(line.endswith("gradient, rows by columns") for line in erasure.fisher_stage.plan())
    sizes, folder, diagonal = erasure.subject.layers.sizes, erasure.fisher_stage.folder, exact.folder
    erasure.run()
    kept = load_file(folder / "fisher.safetensors")
    assert {name: len(value) for name, value in kept.items()} == {f"{k}.weight": sum(v) for k, v in sizes.items()}
    # A rank is no matter of its own.
    other = {**settings, **more, "lora_rank": 3, "output_dir": str(tmp_path / "other")}
    assert Erasure(SelectiveAmnesiaConfig(**other)).fisher_stage.folder == folder
    given = {**settings, **more, "fisher": str(diagonal), "output_dir": str(tmp_path / "given")}
    Erasure(SelectiveAmnesiaConfig(**given)).run()
    made, same = (load_file(Path(folder) / ADAPTER_FILE) for folder in (settings["output_dir"], given["output_dir"]))
    for name, value in made.items():
        torch.testing.assert_close(same[name], value, rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="rows by columns alone, which an adapter's run with"):
        Erasure(SelectiveAmnesiaConfig(**{**other, "fisher_form": "diagonal", "fisher": str(folder)}))


def test_rank_counts_for_an_adapter_and_for_nothing_else(settings):
    def digest(**more):
        return Erasure(SelectiveAmnesiaConfig(**{**settings, **more})).identity.digest

    assert len({digest(), digest(lora_rank=3), digest(fisher_form="rows_by_columns")}) == 3
    assert digest(adapter=None) == digest(adapter=None, lora_rank=3)
    assert digest() == digest(lora_format="kohya", train_method="full")


def test_one_kind_of_erasure_replaces_the_other_in_a_folder(settings, tmp_path):
    output = tmp_path / "erased"
    Erasure(SelectiveAmnesiaConfig(**{**settings, "checkpointing_steps": 1})).run()
    with pytest.raises(ValueError, match="holds another erasure: adapter='lora'"):
        Erasure(SelectiveAmnesiaConfig(**{**settings, "adapter": None}))
    shutil.rmtree(output / ".selective_amnesia")
    with pytest.raises(ValueError, match="holds another erasure: adapter='lora'"):
        Erasure(SelectiveAmnesiaConfig(**{**settings, "adapter": None}))
    for more, there, gone in (
        ({"adapter": None, "overwrite_output_dir": True}, "model_index.json", ADAPTER_FILE),
        ({"overwrite_output_dir": True}, ADAPTER_FILE, "model_index.json"),
    ):
        Erasure(SelectiveAmnesiaConfig(**{**settings, **more})).run()
        assert (output / there).is_file()
        assert not (output / gone).exists()
        assert (output / "unet").is_dir() == (there == "model_index.json")


def test_what_cannot_be_adapted_is_refused_before_the_work(settings, tmp_path, capsys):
    why = r'adapter="dora" is not one of \'lora\': .* no product of two matrices, .* Choose lora, or leave adapter out'
    with pytest.raises(ValueError, match=why):
        SelectiveAmnesiaConfig(**{**settings, "adapter": "dora"})
    with pytest.raises(SystemExit, match="2"):
        main(["erase", *as_flags({**settings, "adapter": "dora"})])
    assert re.search(why, " ".join(capsys.readouterr().err.split()))
    with pytest.raises(ValueError, match="lora_format=kohya has no meaning without an adapter"):
        SelectiveAmnesiaConfig(**{**settings, "adapter": None, "lora_format": "kohya"})
    with pytest.raises(ValueError, match="fisher_form=rows_by_columns is for adapters"):
        SelectiveAmnesiaConfig(**{**settings, "adapter": None, "fisher_form": "rows_by_columns"})
    with pytest.raises(ValueError, match="none of the .* selected parameters is the weight"):
        Erasure(SelectiveAmnesiaConfig(**{**settings, "train_method": r"norm"}))
    assert not (tmp_path / "artifacts").exists()


def test_python_has_the_erasure_in_memory_and_the_base_model_below(settings, tiny_folder):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    base = images(pipeline)
    trainer = SelectiveAmnesiaTrainer(pipeline, SelectiveAmnesiaConfig(**settings))
    trainer.train()
    whole = images(trainer.pipeline)
    assert not np.array_equal(whole, base)
    report = trainer.evaluate()
    assert report.rows
    assert np.array_equal(images(trainer.pipeline), whole)
    trainer.pipeline.unload_lora_weights()
    assert np.array_equal(images(trainer.pipeline), base)
    again = SelectiveAmnesiaTrainer(str(tiny_folder), SelectiveAmnesiaConfig(**settings))
    again.train()
    assert np.array_equal(images(again.pipeline), whole)
    assert again.evaluate().rows


def test_one_call_gives_a_pipeline_with_the_adapter(settings, tiny_folder):
    import sa_diffusers

    given = DiffusionPipeline.from_pretrained(tiny_folder)
    base = images(given)
    positional = ("concept", "surrogate", "output_dir", "pretrained_model_name_or_path")
    more = {name: value for name, value in settings.items() if name not in positional}
    pipeline, report = sa_diffusers.erase(given, "brad pitt", "a middle aged man", **more)
    assert report.rows
    assert np.array_equal(images(given), base)
    assert not np.array_equal(images(pipeline), base)
    pipeline.unload_lora_weights()
    assert np.array_equal(images(pipeline), base)


@pytest.mark.long
def test_probes_calibrate_the_penalty_and_the_excursion_is_undone(settings):
    """The learning rate and the weight of the penalty are found, on steps of which nothing is left."""
    more = {"learning_rate": None, "ewc_weight": None, "num_probe_images": 8, "forget_target": None, "use_ema": True}
    seen = []
    config = SelectiveAmnesiaConfig(**{**settings, **more})

    def look(state):
        if state.step == 1:
            seen.append({name: value.detach().clone() for name, value in state.parameters.items()})

    erasure = Erasure(config, callbacks=[look])
    erasure.run()
    # After one step, at the rate that was found, all is still next to where it began.
    history = json.loads((erasure.output_dir / "training_history.json").read_text())
    start = LowRankAdapter(small_unet(), [name.split(".lora_")[0] for name in seen[0]], 2, seed_of("adapter", 0, 0))
    assert start.parameters.keys() == seen[0].keys()
    for name, value in start.parameters.items():
        assert (seen[0][name] - value).abs().max() < 4 * history[0]["learning_rate"], name
    assert any("forgotten" in row for row in history)
    assert all(np.isfinite(row["ewc_penalty"]) for row in history if "ewc_penalty" in row)


def assert_report_says_adapter(folder):
    assert json.loads((folder / "report.json").read_text())["adapter"] == "LoRA, rank 2"
    for name in ("report.md", "report.html"):
        text = " ".join(re.sub(r"<[^>]+>", "", (folder / name).read_text()).split())
        assert "erased, an adapter (LoRA, rank 2) on the base model, at full strength: it can be switched off" in text


def test_evaluating_and_attacking_take_an_adapter(erased, tiny_folder, clip_folder, tmp_path):
    for protocol in ("concept", "robustness"):
        arguments = ["evaluate", "--base", tiny_folder, "--erased", erased, "--protocol", protocol, "--images", 2,
                     "--clip", clip_folder, "--batch_size", 2, "--inversion_steps", 2]  # fmt: skip
        result = run_here(main, arguments, tmp_path)
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / "erased" / f"evaluation-{protocol}" / "report.json").read_text())
        assert report["base_module"] != report["erased_module"]
        assert_report_says_adapter(tmp_path / "erased" / f"evaluation-{protocol}")
    assert_report_says_adapter(tmp_path / "erased")
    # It is about these weights, by the run's own report.
    assert "Protocol: concept" in build_model_card(erased).content
    result = run_here(main, ["evaluate", "--base", erased, "--erased", erased, "--protocol", "concept"], tmp_path)
    assert "holds an adapter: give the model that it was trained on" in result.stderr


def test_its_card_says_what_it_is_and_its_snippet_runs(erased, tiny_folder, tmp_path, monkeypatch):
    (tiny_folder / "README.md").write_text(
        "---\nlicense: openrail\nextra_gated_prompt: Say that you agree.\n---\n", "utf-8"
    )
    try:
        card = build_model_card(erased)
    finally:
        (tiny_folder / "README.md").unlink()
    data = card.data.to_dict()
    assert "lora" in data["tags"]
    assert data["license"] == "openrail"
    assert data["extra_gated_prompt"] == "Say that you agree."
    assert data["widget"][0]["text"]
    assert "An adapter is no safety measure" in card.content
    snippet = card.content.split("```python\n")[1].split("```")[0]
    script = tmp_path / "snippet.py"
    script.write_text(snippet, "utf-8")
    for source in (tiny_folder, tmp_path / "erased"):
        target = tmp_path / source.name
        if not target.exists():
            target.symlink_to(source)
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(script))
    assert found["image"].size == (16, 16)
    assert found["pipeline"].get_active_adapters() == ["erasure"]


@pytest.mark.parametrize("kind", ["single file", "trained alone", "one variant"])
def test_its_snippet_runs_whatever_the_base_model_is(kind, settings, tiny_folder, tmp_path, monkeypatch):
    """Plain diffusers loads neither of the first two by its name, and the third by its variant."""
    monkeypatch.chdir(tmp_path)
    more, pipeline = {}, build_tiny_pipeline()
    if kind == "single file":
        save_file(as_checkpoint(pipeline), "base.safetensors")
        shutil.copytree(tiny_folder, "kind")
        more = {"single_file_config": "kind"}
    elif kind == "one variant":
        pipeline.to(torch.float16).save_pretrained("base", variant="fp16")
    else:
        whole = {**settings, "adapter": None, "output_dir": "base", "save_components": "trained"}
        Erasure(SelectiveAmnesiaConfig(**whole)).run()
    name = "base.safetensors" if more else "base"
    config = {**settings, **more, "pretrained_model_name_or_path": name, "train_method": "xattn", "max_train_steps": 1}
    result = run_here(main, ["erase", *as_flags({**config, "output_dir": "erased"})], tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = "DiffusionPipeline.from_pretrained" if kind == "one variant" else "sa_diffusers.load_pipeline"
    assert f"load      {loaded}" in result.stdout
    snippet = build_model_card("erased").content.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(snippet, names)
    assert names["image"].size == (16, 16)
    assert names["pipeline"].get_active_adapters() == ["erasure"]


def test_its_snippet_samples_by_the_prediction_type_that_was_given(settings, tiny_folder):
    """The base model's scheduler says another one, and the file holds no scheduler."""
    output = Path(settings["output_dir"])
    Erasure(SelectiveAmnesiaConfig(**{**settings, "prediction_type": "v_prediction", "max_train_steps": 1})).run()
    assert DiffusionPipeline.from_pretrained(tiny_folder).scheduler.config.prediction_type == "epsilon"
    pipeline = assert_snippet_runs_in_diffusers(build_model_card(output).content, tiny_folder.parent, output)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_a_card_of_a_base_on_the_hub_names_the_relation(erased, tmp_path):
    file = tmp_path / "erased" / CONFIG_NAME
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "pretrained_model_name_or_path": "someone/base"}))
    (tmp_path / "erased" / "report.json").unlink()
    data = ModelCard(str(build_model_card(erased))).data
    assert data.base_model == "someone/base"
    assert data.base_model_relation == "adapter"


def test_what_is_pushed_is_small_and_loads_by_the_snippet_on_its_card(erased, tiny_folder, tmp_path):
    with HubServer() as hub:
        result = push(hub, erased, tmp_path, "--hub_model_id", "adapter")
        assert result.returncode == 0, result.stderr
        pushed = hub.files["tester/adapter"]
        card = pushed["README.md"].decode()
        assert card_errors(card) == []
        (tmp_path / tiny_folder.name).symlink_to(tiny_folder)
        script = card.split("```python\n")[1].split("```")[0] + textwrap.dedent("""
            from diffusers import DiffusionPipeline
            from sa_diffusers import objective_for
            from sa_diffusers.families.adapters import find_adapter, has_adapter, with_adapter

            assert image.size == (16, 16)
            assert pipeline.get_active_adapters() == ["erasure"]
            file = find_adapter("tester/adapter")
            base = DiffusionPipeline.from_pretrained("pipeline")
            assert has_adapter(with_adapter(objective_for(base), file))
            assert find_adapter("tester/nothing") is None
        """)
        result = forked_code(script, tmp_path, online(hub, tmp_path / "cache"))
        assert result.returncode == 0, result.stderr
    assert 'load_lora_weights("tester/adapter"' in card
    assert ADAPTER_FILE in pushed
    assert not [name for name in pushed if name.startswith(("unet", "vae", "text_encoder", "model_index", "."))]
    whole = sum(file.stat().st_size for file in tiny_folder.rglob("*.safetensors"))
    assert len(pushed[ADAPTER_FILE]) < 0.5 * whole
    for name, content in pushed.items():
        assert str(tmp_path.parent).encode() not in content, name


def test_the_repository_of_an_adapter_is_gated_as_that_of_its_base_is(erased, tiny_folder, tmp_path):
    """What a card asks, the Hub asks of nobody unless the repository is gated."""
    (tiny_folder / "README.md").write_text("---\nextra_gated_prompt: Say that you agree.\n---\n", "utf-8")
    try:
        with HubServer() as hub:
            for name, there in (("tester/new", None), ("tester/old", "manual")):
                if there:
                    hub.start_repository(name, private=False)
                    hub.gated[name] = there
                result = push(hub, erased, tmp_path, "--hub_model_id", name)
                assert result.returncode == 0, result.stderr
                assert ADAPTER_FILE in hub.files[name]
                assert hub.gated[name] == (there or "auto")
            # There is nothing to download before.
            (gated,) = [place for place, asked in enumerate(hub.requests) if asked[1].endswith("/settings")]
            assert not any(asked[1].startswith("/large/") for asked in hub.requests[:gated])
            for name, gate in (("someone/gated", "manual"), ("someone/open", None)):
                hub.start_repository(name, private=False)
                if gate:
                    hub.gated[name] = gate
            script = """
                from sa_diffusers.hub import gate_of

                assert gate_of("someone/gated") == "manual"
                assert gate_of("someone/open") is None
                assert gate_of("someone/unknown") is None
            """
            result = forked_code(textwrap.dedent(script), tmp_path, online(hub, tmp_path / "cache"))
            assert result.returncode == 0, result.stderr
    finally:
        (tiny_folder / "README.md").unlink()
    with HubServer() as hub:
        result = push(hub, erased, tmp_path, "--hub_model_id", "tester/new")
        assert result.returncode == 0, result.stderr
        assert not hub.gated


def test_merge_writes_the_pipeline_that_the_adapter_makes(erased, tiny_folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.load_lora_weights(erased)
    expected = images(pipeline)
    result = run_here(main, ["merge", erased, "--output_dir", tmp_path / "merged"], tmp_path)
    assert result.returncode == 0, result.stderr
    found = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert not hasattr(found.unet, "peft_config")
    np.testing.assert_allclose(images(found), expected, atol=1e-4)
    result = run_here(main, ["merge", erased, "--output_dir", tmp_path / "merged"], tmp_path)
    assert "holds something already: choose an empty folder" in result.stderr
    result = run_here(main, ["merge", erased, "--output_dir", tmp_path / "more", "--base", erased], tmp_path)
    assert "holds an adapter: give the model that it was trained on, or fuse the two" in result.stderr
    assert "pretrained_model_name_or_path" not in result.stderr
    result = run_here(main, ["merge", tmp_path / "merged", "--output_dir", tmp_path / "more"], tmp_path)
    assert "holds no adapter" in result.stderr
    assert "brad pitt" in build_model_card(tmp_path / "merged").content
    for name in ("merged_adapter.json", "README.md"):
        # They may be published.
        assert str(tmp_path) not in (tmp_path / "merged" / name).read_text(), name
    # What the merged one changes is what the adapter did: nothing is lost at its own rank.
    arguments = ["extract", tmp_path / "merged", "--output_dir", tmp_path / "extracted", "--lora_rank", 2]
    result = run_here(main, arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "holds     100.0% of the update" in result.stdout
    assert "warning" not in result.stderr
    assert_header_tells(tmp_path / "extracted" / ADAPTER_FILE, tiny_folder)
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.load_lora_weights(tmp_path / "extracted")
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-3)
    for file in (ADAPTER_FILE, "unet/diffusion_pytorch_model.safetensors"):
        folder = tmp_path / ("extracted" if file == ADAPTER_FILE else "merged")
        OutputFolder(folder).check_digests()
        with open(folder / file, "r+b") as weights:
            weights.seek(-1, os.SEEK_END)
            weights.write(b"\1")
        with pytest.raises(ValueError, match=f"{file} is not what the run wrote"):
            push_pipeline(folder, "tester/changed")


def assert_snippet_runs_in_diffusers(card, folder, adapter=None):
    """As it stands, in the folder that holds what it names."""
    snippet = card.split("```python\n")[1].split("```")[0]
    assert "sa_diffusers" not in snippet
    if adapter is not None:
        snippet = snippet.replace(f'"{adapter.name}"', repr(str(adapter)))
    with contextlib.chdir(folder):
        names = {}
        exec(snippet, names)
    assert names["image"].size == (16, 16)
    return names["pipeline"]


def test_what_no_erasure_made_is_not_merged(erased, tiny_folder, tmp_path):
    """Somebody's LoRA of a style; the header alone tells one of an erasure."""
    state, header = read_adapter(erased)
    for told in (header, {"format": "pt"}):
        (tmp_path / "other").mkdir(exist_ok=True)
        save_file(state, tmp_path / "other" / ADAPTER_FILE, told)
        if told is header:
            merge_adapter(tmp_path / "other", tmp_path / "merged", base=str(tiny_folder))
            continue
        with pytest.raises(ValueError, match="other does not say that an erasure made it: fuse it in Python"):
            merge_adapter(tmp_path / "other", tmp_path / "not", base=str(tiny_folder))


def test_an_adapter_of_half_its_matrices_is_refused(erased, tiny_folder, tmp_path):
    state, header = read_adapter(erased)
    (tmp_path / "half").mkdir()
    told = {name: value for name, value in header.items() if name != "lora_adapter_metadata"}
    half = {name: value for name, value in state.items() if "lora_A" in name}
    save_file(half, tmp_path / "half" / ADAPTER_FILE, told)
    with pytest.raises(ValueError, match="could not be loaded into a StableDiffusionPipeline.* or is damaged"):
        merge_adapter(tmp_path / "half", tmp_path / "merged", base=str(tiny_folder))


def test_the_card_says_that_it_was_merged_or_extracted(erased, tiny_folder, tmp_path):
    """And how: the run alone makes something else."""
    merge_adapter(erased, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card == build_model_card(tmp_path / "merged").content
    assert card_errors(card) == []
    assert "with the adapter (LoRA, rank 2, `erased`) that was trained fused into its weights" in card
    assert "made of the adapter `erased`, whose own card has what was measured of that" in card
    assert "This folder holds no evaluation." in card
    assert_snippet_runs_in_diffusers(card, tmp_path)
    assert "sa-diffusers merge again --output_dir again-merged" in card
    # As if the merged weights had been trained.
    extract_adapter(tmp_path / "merged", tmp_path / "extracted", 1)
    card = (tmp_path / "extracted" / "README.md").read_text()
    assert_snippet_runs_in_diffusers(card, tiny_folder.parent, tmp_path / "extracted")
    share = float(header_of(tmp_path / "extracted" / ADAPTER_FILE)["share_of_update"])
    assert 0 < share < 1
    assert f"extracted from weights that were trained, and holds {100 * share:.1f} % of what the training" in card
    assert "sa-diffusers extract again --output_dir again-extracted --lora_rank 1" in card
    assert "fused" not in build_model_card(erased).content


def test_merging_extracting_and_evaluating_take_nothing_damaged(erased, tmp_path):
    folder, output = Path(erased), tmp_path / "merged"
    whole = (folder / ADAPTER_FILE).read_bytes()
    (folder / ADAPTER_FILE).write_bytes(whole[:-8] + b"\x00\x00\x80\x3f" * 2)
    commands = [["merge", erased, "--output_dir", output], ["extract", erased, "--output_dir", output],
                ["evaluate", "--base", "base", "--erased", erased, "--protocol", "concept"]]  # fmt: skip
    for command in commands:
        assert "is not what the run wrote" in run_here(main, command, tmp_path).stderr
    (tmp_path / "file").touch()
    for command in commands[:2]:
        result = run_here(main, [*command[:-1], tmp_path / "file" / "deep" / "merged"], tmp_path)
        assert f"nothing can be written into {tmp_path}/file: choose another folder" in result.stderr
    # What a run is putting in place is its own to finish.
    (folder / ".saved").mkdir()
    with OutputFolder(folder).lock:
        for command in commands:
            assert "is in use by another run" in run_here(main, command, tmp_path).stderr
    (folder / ".saved").rmdir()
    shutil.rmtree(folder / ".selective_amnesia")
    header = header_of(folder / ADAPTER_FILE)
    tensors = load_file(folder / ADAPTER_FILE)
    name = next(iter(tensors))
    lies = json.dumps({**json.loads(header["lora_adapter_metadata"]), "unet.use_dora": True})
    for held, told, why in (
        ({**tensors, name: torch.full_like(tensors[name], torch.nan)}, header, "is not finite, or without values"),
        (tensors, {**header, "lora_adapter_metadata": lies}, "is not finite, or without values"),
        ({}, header, "it holds no matrices"),
    ):
        save_file(held, folder / ADAPTER_FILE, told)
        result = run_here(main, ["merge", erased, "--output_dir", output], tmp_path)
        assert why in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert not output.exists()
    metadata = json.loads(header["lora_adapter_metadata"])
    encoder = {f"text_encoder.layers.0.q_proj.lora_{which}.weight": torch.ones(2, 2) for which in "AB"}
    # As peft has them for layers with biases of their own, of which these have none to add them to.
    layers = [key for key in tensors if "attn1.to_q.lora_B" in key]
    biases = {key.replace("weight", "bias"): torch.ones(len(tensors[key])) for key in layers}
    ours = {key: value for key, value in tensors.items() if any(key.startswith(k.split(".lora_")[0]) for k in layers)}
    for held, changes, why in (
        (tensors, {"unet.target_modules": "("}, "could not be loaded into a StableDiffusionPipeline"),
        ({**tensors, **encoder}, {}, "has matrices for the text_encoder too, and only those of the unet are taken"),
        (
            {**ours, **biases},
            {"unet.lora_bias": True, "unet.target_modules": ["attn1.to_q"]},
            "cannot be fused into the",
        ),
    ):
        told = {**header, "lora_adapter_metadata": json.dumps({**metadata, **changes})}
        save_file(held, folder / ADAPTER_FILE, told)
        result = run_here(main, ["merge", erased, "--output_dir", output], tmp_path)
        assert why in result.stderr.splitlines()[-1], result.stderr
        assert "Traceback" not in result.stderr
        assert not output.exists()


def test_other_weights_of_the_same_shape_are_warned_of(erased, tiny_folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1)
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="was made from other weights than those of this base model"):
        merge_adapter(erased, tmp_path / "merged", str(tmp_path / "other"))
    # The report of a run of weights says which they were made from.
    shutil.copy(Path(erased) / "report.json", tmp_path / "merged")
    with pytest.warns(UserWarning, match="the difference to these is not the work of the erasure alone"):
        extract_adapter(tmp_path / "merged", tmp_path / "extracted", base=str(tmp_path / "other"))


def test_what_is_extracted_tells_how_its_base_is_loaded(settings, tiny_folder, tmp_path):
    """The only variant that there is; of another base than the erasure's own none of what is known of that."""
    base, output = tmp_path / "base", Path(settings["output_dir"])
    build_tiny_pipeline().to(torch.float16).save_pretrained(base, variant="fp16")
    config = {**settings, "adapter": None, "pretrained_model_name_or_path": str(base), "max_train_steps": 1}
    Erasure(SelectiveAmnesiaConfig(**config)).run()
    extract_adapter(output, tmp_path / "extracted", 1)
    assert assert_header_tells(tmp_path / "extracted" / ADAPTER_FILE, base)["base_variant"] == "fp16"
    assert_snippet_runs_in_diffusers((tmp_path / "extracted" / "README.md").read_text(), tmp_path)
    # As of a base on the Hub.
    recorded = json.loads((output / CONFIG_NAME).read_text())
    (output / CONFIG_NAME).write_text(json.dumps({**recorded, "revision": "v1", "variant": "fp16"}))
    shutil.rmtree(output / ".selective_amnesia")
    with pytest.warns(UserWarning, match="was made from other weights"):
        extract_adapter(output, tmp_path / "other", 1, base=str(tiny_folder))
    header = assert_header_tells(tmp_path / "other" / ADAPTER_FILE, tiny_folder)
    assert not {"base_variant", "base_model_revision"} & header.keys()
    card = (tmp_path / "other" / "README.md").read_text()
    assert_snippet_runs_in_diffusers(card, tiny_folder.parent, tmp_path / "other")


def test_weights_in_half_precision_are_extracted_and_merged_so(settings, tmp_path):
    """Beside a base in float32 every weight would differ, by its rounding."""
    more = {"weights_dtype": "bfloat16", "train_method": "xattn", "max_train_steps": 2}
    Erasure(SelectiveAmnesiaConfig(**{**settings, **more, "adapter": None})).run()
    extracted = extract_adapter(tmp_path / "erased", tmp_path / "extracted", 2)
    config = SelectiveAmnesiaConfig(**{**settings, **more, "output_dir": str(tmp_path / "adapter")})
    erasure = Erasure(config)
    assert extracted.layers == len(erasure.subject.layers.sizes)
    erasure.run()
    merge_adapter(erasure.output_dir, tmp_path / "merged")
    weights = load_file(next((tmp_path / "merged" / "unet").glob("*.safetensors")))
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_no_rank_is_higher_than_a_layer_can_have(settings, tiny_folder, tmp_path):
    highest = max(map(min, adapter_layers(small_unet(), dict(small_unet().named_parameters())).sizes.values()))
    with pytest.raises(ValueError, match=f"lora_rank={highest + 1}: no update of .* higher rank than {highest}"):
        Erasure(SelectiveAmnesiaConfig(**{**settings, "lora_rank": highest + 1}))
    Erasure(SelectiveAmnesiaConfig(**{**settings, "lora_rank": highest}))
    Erasure(SelectiveAmnesiaConfig(**{**settings, "adapter": None})).run()
    assert extract_adapter(tmp_path / "erased", tmp_path / "extracted", 10_000).rank == highest


def test_extract_says_what_a_rank_keeps(settings, tiny_folder, tmp_path):
    Erasure(SelectiveAmnesiaConfig(**{**settings, "adapter": None})).run()
    kept = []
    for rank in (1, 4, 400):
        extracted = extract_adapter(tmp_path / "erased", tmp_path / f"rank-{rank}", rank)
        kept.append(extracted.kept)
    assert kept[0] < kept[1] < kept[2]
    assert extracted.kept + extracted.outside == pytest.approx(1)
    assert extracted.outside > 0
    base, full = (objective_for(DiffusionPipeline.from_pretrained(folder)).module for folder in
                  (tiny_folder, tmp_path / "erased"))  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.load_lora_weights(tmp_path / "rank-400")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after, before = pipeline.unet.state_dict(), base.state_dict()
    for name, value in full.state_dict().items():
        wanted = value if value.dim() > 1 else before[name]
        torch.testing.assert_close(after[name], wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="differ in no layer"):
        extract_adapter(tiny_folder, tmp_path / "none", base=str(tiny_folder))


def test_kohya_s_names_come_back(settings, tiny_folder, tmp_path):
    """All that is exported loads in diffusers again, to the same images."""
    output = tmp_path / "erased"
    config = {**settings, "lora_format": "kohya", "train_method": "xattn"}
    Erasure(SelectiveAmnesiaConfig(**config)).run()
    assert_header_tells(output / KOHYA_FILE, tiny_folder)
    found = []
    for name in (ADAPTER_FILE, KOHYA_FILE):
        pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
        pipeline.load_lora_weights(output, weight_name=name)
        found.append(images(pipeline))
    assert np.array_equal(*found)
    # Whatever happens to it, it is made of the adapter again, and nothing is trained.
    whole = (output / KOHYA_FILE).read_bytes()
    kept = (output / ADAPTER_FILE).stat()
    (output / KOHYA_FILE).unlink()
    Erasure(SelectiveAmnesiaConfig(**config)).run()
    assert (output / KOHYA_FILE).read_bytes() == whole
    (output / KOHYA_FILE).write_bytes(whole[:-4] + b"\0\0\0\1")
    Erasure(SelectiveAmnesiaConfig(**config)).run()
    assert (output / KOHYA_FILE).read_bytes() == whole
    assert (output / ADAPTER_FILE).stat().st_mtime_ns == kept.st_mtime_ns


def test_another_format_is_added_to_what_is_finished_and_is_on_record(settings, tmp_path):
    output, config = tmp_path / "erased", {**settings, "train_method": "xattn"}
    Erasure(SelectiveAmnesiaConfig(**config)).run()
    kept = (output / ADAPTER_FILE).stat()
    Erasure(SelectiveAmnesiaConfig(**{**config, "lora_format": "kohya"})).run()
    assert (output / KOHYA_FILE).is_file()
    assert (output / ADAPTER_FILE).stat().st_mtime_ns == kept.st_mtime_ns
    OutputFolder(output).check_digests()
    (output / KOHYA_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match="is not what the run wrote"):
        OutputFolder(output).check_digests()


@pytest.mark.parametrize("form", ["diagonal", "rows_by_columns"])
def test_on_weights_in_half_precision_it_is_trained_in_float32(settings, form):
    """Steps of a millionth would be lost beside matrices that are rounded to three digits."""
    seen = []
    more = {"weights_dtype": "bfloat16", "learning_rate": 1e-6, "ewc_weight": 1.0, "fisher_form": form,
            "train_method": "xattn", "max_train_steps": 2}  # fmt: skip

    def look(state):
        seen.append({name: value.detach().clone() for name, value in state.parameters.items()})

    erasure = Erasure(SelectiveAmnesiaConfig(**{**settings, **more}), callbacks=[look])
    erasure.run()
    assert {value.dtype for value in seen[-1].values()} == {torch.float32}
    moved = [name for name, value in seen[-1].items() if "lora_A" in name and not torch.equal(value, seen[0][name])]
    assert len(moved) > 0.8 * len(seen[0]) / 2
    with safe_open(erasure.output_dir / ADAPTER_FILE, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118


def test_every_flag_of_an_adapter_is_one_of_the_command(settings, tmp_path):
    result = run_here(main, ["erase", *as_flags({**settings, "lora_format": "diffusers"})], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "load_lora_weights" in result.stdout
    assert "an adapter of rank 2 on" in result.stdout
