"""Adapters on a base model whose linear layers are held in few bits."""

import copy
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.utils import is_bitsandbytes_available
from torch import nn

import sa_diffusers
from sa_diffusers import (
    Erasure,
    FisherEstimator,
    SampleSet,
    SelectiveAmnesiaConfig,
    embedded_pipeline,
    load_pipeline,
    objective_for,
)
from sa_diffusers.commands import main
from sa_diffusers.evaluation.eval_unlearn import SelectiveAmnesiaTechnique
from sa_diffusers.families.adapters import ADAPTER_FILE, adapter_layers
from sa_diffusers.families.digests import fingerprint_module
from sa_diffusers.footprint import without_values
from sa_diffusers.merging import merge_adapter
from sa_diffusers.publish import build_model_card
from sa_diffusers.quantization import (
    check_quantization,
    dequantized,
    differentiable,
    kind_of,
    lighten_,
    quantizable,
    quantization_config,
    quantization_of,
    quantize_,
    quantized_bytes,
)

from .conftest import as_flags, run_here
from .test_adapters import images
from .test_identity import digests
from .test_processes import launch
from .tiny_families import FAMILIES

pytestmark = pytest.mark.quantized

CLASSIFIER = embedded_pipeline().parent / "classifier"
KINDS = ("int8", "fp8")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def settings(tiny_settings, kind):
    return {**tiny_settings, "adapter": "lora", "lora_rank": 2, "learning_rate": 1e-2, "ewc_weight": 1.0,
            "base_quantization": kind, "logging_steps": 1}  # fmt: skip


def quantised(folder, kind):
    """As a user of diffusers loads it."""
    config = PipelineQuantizationConfig(quant_mapping={"unet": quantization_config(kind, torch.float32)})
    return DiffusionPipeline.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def test_an_adapter_is_trained_and_loads_onto_either_base(settings, kind, tiny_folder, tmp_path):
    erasure = Erasure(SelectiveAmnesiaConfig(**settings))
    assert quantization_of(erasure.objective.module) == kind
    erasure.run()
    history = json.loads((tmp_path / "erased" / "training_history.json").read_text())
    assert history[-1]["ewc_penalty"] > 0
    assert np.isfinite([row["surrogate_loss"] for row in history]).all()
    for base in (DiffusionPipeline.from_pretrained(tiny_folder), quantised(tiny_folder, kind)):
        before = images(base)
        base.load_lora_weights(tmp_path / "erased", adapter_name="erasure")
        erased = images(base)
        assert np.abs(erased - before).max() > 1e-3
        base.set_adapters("erasure", 0.0)
        np.testing.assert_allclose(images(base), before, atol=1e-6)
        base.unload_lora_weights()
        assert np.array_equal(images(base), before)
    assert json.loads((tmp_path / "erased" / "selective_amnesia.json").read_text())["base_quantization"] == kind
    card = build_model_card(tmp_path / "erased").content
    assert f"quantised to {kind}" in card
    assert "`base_quantization`" in card
    assert f"| base quantization | {kind} |" in (tmp_path / "erased" / "report.md").read_text()


@pytest.mark.long
def test_adapters_are_fused_before_or_after_the_base_is_quantised(settings, kind, tiny_folder, tmp_path):
    """In diffusers alone, and by the setting; the sum is rounded to the bits that there are."""
    Erasure(SelectiveAmnesiaConfig(**{**settings, "ewc_weight": 0.0, "learning_rate": 0.1})).run()

    def erased(pipeline):
        pipeline.load_lora_weights(tmp_path / "erased", adapter_name="first")
        return pipeline

    plain = images(quantised(tiny_folder, kind))
    fused = erased(quantised(tiny_folder, kind))
    expected = images(fused)
    fused.fuse_lora()
    fused.unload_lora_weights()
    assert quantization_of(fused.unet) == kind
    assert np.abs(images(fused) - expected).mean() < 0.5 * np.abs(plain - expected).mean()
    by_hand = erased(DiffusionPipeline.from_pretrained(tiny_folder))
    by_hand.fuse_lora()
    by_hand.unload_lora_weights()
    more = {**settings, "fuse_adapters": True, "concept": ["a cat"], "output_dir": str(tmp_path / "second")}
    config = SelectiveAmnesiaConfig(**more)
    for given, same in (
        (DiffusionPipeline.from_pretrained(tiny_folder), by_hand),
        (quantised(tiny_folder, kind), fused),
    ):
        erasure = Erasure(config, pipeline=erased(given))
        assert quantization_of(erasure.objective.module) == kind
        assert erasure.base == Erasure(config, pipeline=same).base
    erasure.run()
    assert (tmp_path / "second" / ADAPTER_FILE).is_file()


def test_it_is_merged_with_the_base_in_its_own_precision_alone(settings, kind, tiny_folder, tmp_path):
    Erasure(SelectiveAmnesiaConfig(**{**settings, "ewc_weight": 0.0})).run()
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.load_lora_weights(tmp_path / "erased")
    expected = images(pipeline)
    with pytest.warns(UserWarning, match=f"quantised to {kind}, and goes into its own weights: whether it forgets"):
        merge_adapter(tmp_path / "erased", tmp_path / "merged")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert quantization_of(merged.unet) is None
    np.testing.assert_allclose(images(merged), expected, atol=1e-4)
    quantised(tiny_folder, kind).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"its unet is stored quantised \(torchao\).* in its own precision"):
        merge_adapter(tmp_path / "erased", tmp_path / "again", str(tmp_path / "small"))
    with pytest.raises(ValueError, match="its unet is stored quantised"):
        Erasure(SelectiveAmnesiaConfig(**{**settings, "pretrained_model_name_or_path": str(tmp_path / "small"),
                                          "overwrite_output_dir": True}))  # fmt: skip


@pytest.mark.long
def test_it_is_evaluated_on_the_base_that_it_was_trained_on(settings, kind, tiny_folder, tmp_path, capsys):
    """Unless another is asked for, which is said; weights that it was merged into are none that it was trained on."""
    own = Erasure(SelectiveAmnesiaConfig(**{**settings, "ewc_weight": 0.0})).run().report
    evaluation = ["evaluate", "--base", tiny_folder, "--classifier", CLASSIFIER, "--clip", "none", "--images", "1",
                  "--num_inference_steps", "1", "--protocol", "concept", "--output_dir"]  # fmt: skip

    def evaluated(name, *flags):
        result = run_here(main, [*evaluation, name, *flags], tmp_path)
        assert result.returncode == 0, result.stderr
        page = (tmp_path / name / "report.md").read_text()
        return json.loads((tmp_path / name / "report.json").read_text()), page, result.stderr

    erased = ["--erased", tmp_path / "erased"]
    report, page, said = evaluated("same", *erased)
    assert (report["base_module"], report["erased_module"]) == (own.base_module, own.erased_module)
    assert f"| base quantization | {kind} |" in page
    assert "base_quantization" not in said
    technique = SelectiveAmnesiaTechnique(str(tmp_path / "erased"))
    assert quantization_of(technique.objective.module) == kind
    report, page, said = evaluated("other", *erased, "--base_quantization", "none")
    assert report["base_module"] != own.base_module
    assert f"| base quantization | none, trained on {kind} |" in page
    assert f"warning: base_quantization none, trained on {kind}: the adapter is measured on another base" in said
    merge_adapter(tmp_path / "erased", tmp_path / "merged")
    merged = ["--erased", tmp_path / "merged"]
    report, page, _ = evaluated("third", *merged)
    assert report["base_module"] != own.base_module
    assert "base quantization" not in page
    refused = run_here(main, [*evaluation, "fourth", *merged, "--base_quantization", kind], tmp_path)
    assert f"--base_quantization {kind} is for adapters, and {tmp_path / 'merged'} holds none" in refused.stderr


@pytest.mark.parametrize("kind", ["int8"])
def test_what_cannot_be_quantised_here_says_how_it_is_evaluated(settings, tiny_folder, tmp_path):
    Erasure(SelectiveAmnesiaConfig(**{**settings, "ewc_weight": 0.0})).run()
    file = tmp_path / "erased" / "selective_amnesia.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_quantization": "nf4"}))
    arguments = ["evaluate", "--base", tiny_folder, "--erased", tmp_path / "erased", "--protocol", "concept"]
    refused = run_here(main, arguments, tmp_path)
    assert refused.returncode == 1
    assert 'base_quantization="nf4" needs a CUDA device and there is none' in refused.stderr
    assert "--base_quantization none measures it on the base model in its own precision" in refused.stderr


class KilledAfter:
    def after_step(self, state):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["int8"])
def test_a_killed_run_goes_on_to_the_same_bits(settings, tmp_path):
    settings = {**settings, "checkpointing_steps": 1}
    config = SelectiveAmnesiaConfig(**settings)
    process = os.fork()
    if process == 0:
        try:
            Erasure(config, callbacks=[KilledAfter()]).run()
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    with pytest.raises(ValueError, match="is of another run|holds another"):
        Erasure(config.replace(base_quantization="fp8", resume_from_checkpoint=str(tmp_path / "erased/checkpoint-2")))
    Erasure(config).run()
    Erasure(config.replace(output_dir=str(tmp_path / "whole"))).run()
    one, other = ((tmp_path / name / "training_history.json").read_text() for name in ("erased", "whole"))
    assert one == other


@pytest.mark.parametrize("kind", ["int8"])
def test_two_processes_train_on_it(settings, tmp_path):
    whole = {**settings, "output_dir": str(tmp_path / "alone")}
    Erasure(SelectiveAmnesiaConfig(**whole)).run()
    result = launch(2, as_flags({**settings, "train_batch_size": 1}), tmp_path)
    assert result.returncode == 0, result.stderr
    one, other = (json.loads((tmp_path / name / "training_history.json").read_text()) for name in ("alone", "erased"))
    for name in ("surrogate_loss", "ewc_penalty"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in other], rel=1e-3)


@pytest.mark.parametrize("name", ["stable diffusion", "SD3", "FLUX"])
def test_fisher_information_is_that_of_the_dequantised_weights(name, kind):
    """Against autograd on the same numbers in plain weights."""
    family = FAMILIES[name]
    pipeline = family.build()
    module = getattr(pipeline, family.part)
    quantize_(module, kind)
    oracle = copy.copy(pipeline)
    plain = copy.deepcopy(module)
    for layer in plain.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(dequantized(layer.weight))
    setattr(oracle, family.part, plain)
    lighten_(module)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, family.size, family.size, generator=generator) * 2 - 1
    latents = objective_for(pipeline).encode_images(pictures, 0)
    samples = SampleSet(latents, ["brad pitt", "a dog"], [None, None], [0, 1], {})
    found, expected = (FisherEstimator(each, "full", timesteps=4).estimate(samples) for each in (pipeline, oracle))
    assert found.values.keys() == expected.values.keys() == dict(plain.named_parameters()).keys()
    largest = float(max(value.max() for value in expected.values.values()))
    for key, value in expected.values.items():
        torch.testing.assert_close(found.values[key], value, rtol=2e-3, atol=1e-5 * largest, msg=key)
    assert found.config["weights_dtype"] == f"float32, {kind}"
    estimator = FisherEstimator(pipeline, "full", timesteps=4, form="rows_by_columns", gradient_checkpointing=True)
    for key, value in estimator.estimate(samples).values.items():
        matrix = expected.values[key].flatten(1)
        sums = torch.cat([matrix.sum(1), matrix.sum(0)])
        torch.testing.assert_close(value, sums, rtol=2e-3, atol=1e-5 * float(sums.max()), msg=key)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_layer_keeps_no_weight_for_the_backward_pass(kind, precision):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 48))
    module.dtype = torch.float32
    quantize_(module, kind)
    inputs = torch.randn(5, 3, 64, requires_grad=True)

    def passed():
        kept = []
        inputs.grad = None
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"),
            torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.numel()) or value, lambda x: x),
        ):
            output = module(inputs)
        output.float().square().sum().backward()
        return output, inputs.grad, max(kept, default=0)

    output, gradient, kept = passed()
    lighten_(module)
    lighter, again, left = passed()
    assert kept >= 48 * 64 > left
    # torchao's own leaves float32 to the next layer where scales are in it; other linear layers do not under autocast.
    assert lighter.dtype == (torch.float32 if precision == "no" else torch.bfloat16)
    assert torch.equal(output.to(lighter.dtype), lighter)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if precision == "no" else {"rtol": 5e-2, "atol": 0.3}
    torch.testing.assert_close(again, gradient, **tolerance)


def test_all_that_is_made_depends_on_it(tiny_settings, kind):
    plain = {**tiny_settings, "adapter": "lora", "num_fisher_samples": 5, "num_probe_images": 8}
    before = digests(plain)
    AcceleratorState._reset_state(reset_partial_state=True)
    after = digests({**plain, "base_quantization": kind})
    assert all(after[name] != before[name] for name in before)


def test_a_pipeline_in_memory_is_what_one_from_its_folder_is(settings, kind, tiny_folder, tmp_path):
    config = SelectiveAmnesiaConfig(**settings)
    loaded = Erasure(config)
    for pipeline in (DiffusionPipeline.from_pretrained(tiny_folder), quantised(tiny_folder, kind)):
        given = Erasure(config, pipeline=pipeline)
        assert given.base == loaded.base
        assert quantization_of(pipeline.unet) == kind
    with pytest.raises(ValueError, match=f'quantised to {kind}: give adapter="lora" and base_quantization="{kind}"'):
        Erasure(config.replace(base_quantization=None), pipeline=quantised(tiny_folder, kind))
    with pytest.raises(ValueError, match='nf4" is done while a model is loaded'):
        quantize_(pipeline.unet, "nf4")


@pytest.mark.parametrize("kind", ["int8"])
def test_the_function_and_the_command_take_it(settings, tiny_folder, tmp_path):
    more = {name: value for name, value in settings.items()
            if name not in ("concept", "surrogate", "pretrained_model_name_or_path", "output_dir")}  # fmt: skip
    pipeline, _ = sa_diffusers.erase(str(tiny_folder), "brad pitt", "a middle aged man", **more)
    assert quantization_of(pipeline.unet) == "int8"
    assert pipeline.get_active_adapters() == ["erasure"]
    result = run_here(main, ["erase", *as_flags(settings)], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "erased" / ADAPTER_FILE).is_file()


def test_half_precision_goes_with_it(settings, kind, tmp_path):
    seen = []
    config = SelectiveAmnesiaConfig(**{**settings, "weights_dtype": "bfloat16"})
    Erasure(config, callbacks=[lambda state: seen.append({value.dtype for value in state.parameters.values()})]).run()
    # Small updates add up.
    assert seen[0] == {torch.float32}
    history = json.loads((tmp_path / "erased" / "training_history.json").read_text())
    assert np.isfinite([row["surrogate_loss"] for row in history]).all()


def test_what_cannot_be_is_refused_before_the_work(tiny_settings, tmp_path):
    with pytest.raises(ValueError, match="base_quantization=int8 is for adapters.*: give adapter, or leave it out"):
        SelectiveAmnesiaConfig(**tiny_settings, base_quantization="int8")
    with pytest.raises(ValueError, match='base_quantization="int4" is not one of'):
        SelectiveAmnesiaConfig(**tiny_settings, adapter="lora", base_quantization="int4")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='base_quantization="nf4" needs a CUDA device and there is none'):
            Erasure(SelectiveAmnesiaConfig(**tiny_settings, adapter="lora", base_quantization="nf4"))
    if not is_bitsandbytes_available():
        with pytest.raises(ValueError, match="needs bitsandbytes 0.43.3 or newer: pip install -U bitsandbytes"):
            check_quantization("nf4", has_cuda=True)
    assert not (tmp_path / "artifacts").exists()
    assert not (Path(tiny_settings["output_dir"])).exists()


def test_its_bytes_are_those_of_the_tensors(kind):
    layer = nn.Sequential(nn.Linear(96, 40, bias=False))
    layer.dtype = torch.float32
    quantize_(layer, kind)
    weight = layer[0].weight
    held = [value for value in vars(weight).values() if isinstance(value, torch.Tensor)]
    assert kind_of(weight) == kind
    assert quantized_bytes(kind, 40, 96) == sum(value.numel() * value.element_size() for value in held)
    # 4 bits, 8 for each 64, and 32 for each 256 of those.
    assert 8 * quantized_bytes("nf4", 4096, 4096) / 4096**2 == pytest.approx(4.127, abs=1e-3)
    unet = FAMILIES["stable diffusion"].build().unet
    assert all(name in quantizable(unet) for name in adapter_layers(unet, [
        f"{name}.weight" for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)]).sizes)  # fmt: skip


def test_load_pipeline_says_what_it_quantised(tiny_folder, kind):
    pipeline = load_pipeline(str(tiny_folder), base_quantization=kind)
    assert quantization_of(pipeline.unet) == kind
    assert quantization_of(pipeline.text_encoder) is None
    assert objective_for(pipeline).module is pipeline.unet


def test_a_layer_of_4_bits_is_known():
    """As bitsandbytes has it on a CPU: shape, bytes, digest, and the gradient of what it stands for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 96))
    small = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4"))
    small.load_state_dict(plain.state_dict())
    small.to("cpu")
    weight = small[0].weight
    assert quantization_of(small) == "nf4"
    assert adapter_layers(small, ["0.weight"]).sizes == {"0": (96, 64)}
    state = weight.quant_state
    held = (weight, state.absmax, state.state2.absmax)
    assert quantized_bytes("nf4", 96, 64) == sum(value.numel() * value.element_size() for value in held)
    assert fingerprint_module(small) == fingerprint_module(copy.deepcopy(small)) != fingerprint_module(plain)
    plain[0].weight.data = dequantized(weight).float()
    inputs = torch.randn(5, 3, 64)
    with differentiable(small, dict(small.named_parameters())) as found:
        gradients = torch.autograd.grad(small(inputs).square().sum(), list(found.values()))
    expected = torch.autograd.grad(plain(inputs).square().sum(), list(plain.parameters()))
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-3)
    blank = without_values(small, [small])
    assert blank[0].weight.shape == (96, 64)
    assert blank[0].weight.is_meta
