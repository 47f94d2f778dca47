"""What every family must do. A family is its own file in the package, and a line in `tiny_families.FAMILIES`."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from sa_diffusers import (
    Erasure,
    FisherEstimator,
    SampleSet,
    SamplingSettings,
    SelectiveAmnesiaConfig,
    load_pipeline,
    objective_for,
    pair_concepts,
)
from sa_diffusers.evaluation.attacks import AttackSettings, Inversion
from sa_diffusers.evaluation.attacks.inversion import INVERTED_TOKEN, TextualInversion
from sa_diffusers.evaluation.subject import Subject
from sa_diffusers.families.adapters import (
    ADAPTER_FILE,
    KOHYA_FILE,
    LowRankAdapter,
    adapter_layers,
    check_kohya,
    export_kohya,
    save_adapter,
)
from sa_diffusers.merging import extract_adapter, merge_adapter
from sa_diffusers.quantization import quantization_config, quantization_of
from sa_diffusers.seeds import generator_of
from sa_diffusers.training.ewc import ElasticWeightConsolidation
from sa_diffusers.training.trainable import AdapterWeights
from sa_diffusers.training.training import Training

from .conftest import BY_HAND
from .nursery import forked
from .test_cost import STAGES, figures, planned, summed
from .test_processes import environment
from .tiny_families import ADAPTED, FAMILIES, VARIANTS

PROMPTS = ["brad pitt", "a dog on grass"]
STEPS = 3


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def base(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "base"
    family.build().save_pretrained(folder)
    return folder


def drawn(objective, size):
    """Samples as large as the family's own, timesteps from first to last, and noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    samples = objective.encode_images(images, 0).repeat(2, 1, 1, 1)
    total = objective.num_train_timesteps
    timesteps = torch.tensor([0, total // 3, total // 2, total - 1])
    return samples, timesteps, objective.draw_noise(samples, generator)


def settings_of(family, base, output):
    """Of a whole run on few samples; sampler and guidance are the family's own."""
    return {
        "concept": ["brad pitt"], "surrogate": ["a middle aged man"], "pretrained_model_name_or_path": str(base),
        "output_dir": str(output), "artifacts_dir": str(base.parent / "artifacts"), "num_surrogate_images": 4,
        "num_replay_images": 4, "num_inference_steps": 2, "sample_batch_size": 4, "num_fisher_samples": 2,
        "fisher_timesteps": 4, "max_train_steps": STEPS, "train_batch_size": 2, "num_eval_images": 2,
        "report_to": "none", "logging_steps": 1, **BY_HAND, **family.settings,
    }  # fmt: skip


def erase(family, base, output, callbacks=(), **settings):
    config = SelectiveAmnesiaConfig(**{**settings_of(family, base, output), **settings})
    Erasure(config, callbacks=callbacks).run()
    return output


def trained(family, base, output, callbacks=(), **settings):
    """As by `erase`, but for the evaluation."""
    erasure = Erasure(SelectiveAmnesiaConfig(**{**settings_of(family, base, output), **settings}), callbacks=callbacks)
    with erasure.holding():
        surrogates = erasure.surrogates()
        erasure.training_stage.run(surrogates, *erasure.products(surrogates))
    return output


def weights(folder, part):
    """As a user has them; those of an adapter are fused into the base model's."""
    if not (folder / ADAPTER_FILE).is_file():
        return getattr(DiffusionPipeline.from_pretrained(folder), part).state_dict()
    pipeline = DiffusionPipeline.from_pretrained(folder.parent / "base")
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora(components=[part])
    pipeline.unload_lora_weights()
    return getattr(pipeline, part).state_dict()


def pictures(pipeline, family, guidance=3.0, **kwargs):
    """As a user samples, one seed for each prompt."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    # Some pipelines write into the list that they are given.
    return pipeline(prompt=[*PROMPTS], height=family.size, width=family.size, num_inference_steps=3,
                    generator=generators, **family.sampled(guidance), **kwargs).images  # fmt: skip


# What is trained in the tests of training: the weights, or an adapter, on the layers that are the family's default.
KINDS = {"full": {}, "adapter": {"adapter": "lora", "lora_rank": 2}}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def runs(family, base):
    """Selection, or kind, -> the folder of a run with it; of selections but `full` without its evaluation."""
    made = {name: erase(family, base, base.parent / name, **settings) for name, settings in KINDS.items()}
    for name in ("xattn", "noxattn"):
        made[name] = trained(family, base, base.parent / name, train_method=name)
    return made


def moved(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_what_is_selected_is_trained_and_nothing_else(family, base, runs):
    before, objective = weights(base, family.part), objective_for(DiffusionPipeline.from_pretrained(base))
    for selection in ("full", "xattn", "noxattn"):
        folder = runs[selection]
        selected = objective.select(selection)
        found = moved(before, weights(folder, family.part))
        assert found <= set(selected), selection
        # What a loss has no gradient for stays: the key's bias in attention, the last text stream.
        assert len(found) > 0.8 * len(selected), selection
        assert (len(selected) == len(list(objective.module.parameters()))) == (selection == "full")


def test_an_adapter_goes_on_the_layers_that_are_usual(family, base):
    """Of transformers attention, as in diffusers' training scripts; of a UNet all that take one."""
    (name,) = [name for name, each in FAMILIES.items() if each is family]
    config = SelectiveAmnesiaConfig(**{**settings_of(family, base, base.parent / "planned"), **KINDS["adapter"]})
    subject = Erasure(config).subject
    if family.part == "unet":
        assert subject.layers == adapter_layers(subject.objective.module, subject.objective.select("full"))
    else:
        assert {re.sub(r"^.*?\.\d+\.", "", layer) for layer in subject.layers.sizes} == set(ADAPTED[name])


def test_a_plan_names_the_convolutions_that_take_no_adapter(family, base):
    settings = {**settings_of(family, base, base.parent / "planned"), **KINDS["adapter"], "train_method": "full"}
    plan = Erasure(SelectiveAmnesiaConfig(**settings)).plan()
    # Of these families Sana's alone has some, one a block.
    grouped = [name for name, layer in getattr(family.build(), family.part).named_modules()
               if getattr(layer, "groups", 1) > 1]  # fmt: skip
    told = "frozen, as convolutions of several groups: transformer_blocks.*.ff.conv_depth (2 in all)\n"
    assert (told in plan, "several groups" in plan) == (bool(grouped), bool(grouped))


def test_an_adapter_comes_back_to_the_last_number(family, base, tmp_path):
    """On every layer that takes one, by the pipeline's own loader."""
    objective, loaded = (objective_for(DiffusionPipeline.from_pretrained(base)) for _ in range(2))
    adapter = LowRankAdapter(objective.module, adapter_layers(objective.module, objective.select("full")).sizes, 2)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in adapter.state().items()}
    adapter.remove()
    save_adapter(objective, state, 2, tmp_path, {})
    loaded.pipeline.load_lora_weights(tmp_path, adapter_name="erasure")
    found = get_peft_model_state_dict(loaded.module, adapter_name="erasure")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    layers = [layer for layer in loaded.module.modules() if isinstance(layer, LoraLayer)]
    assert {layer.scaling["erasure"] for layer in layers} == {1.0}


def test_an_adapter_is_trained_on_the_family_s_own_layers(family, base, runs):
    before, objective = weights(base, family.part), objective_for(DiffusionPipeline.from_pretrained(base))
    layers = adapter_layers(objective.module, objective.select(objective.adapted or "full"))
    wanted = {f"{name}.weight" for name in layers.sizes}
    found = moved(before, weights(runs["adapter"], family.part))
    assert found <= wanted
    assert len(found) > 0.8 * len(wanted)


def test_the_penalty_of_an_adapter_is_that_of_autograd_on_the_merged_weights(family):
    """Of every layer that takes one; the merged weights are as peft makes them."""
    objective = objective_for(family.build())
    module, generator = objective.module, torch.Generator().manual_seed(0)
    selected = objective.select("full")
    fisher = {name: torch.rand(value.shape, generator=generator) for name, value in module.named_parameters()}
    adapter = LowRankAdapter(module, adapter_layers(module, selected).sizes, rank=2)
    for parameter in adapter.parameters.values():
        torch.nn.init.normal_(parameter, generator=generator)
    bases = {name: layer.get_base_layer().weight.detach() for name, layer in adapter.layers.items()}
    assert {2} < {weight.dim() for weight in bases.values()} or family.part == "transformer"
    expected = 0
    for name, layer in adapter.layers.items():
        merged = bases[name] + layer.get_delta_weight("default")
        expected = expected + 7.0 * (fisher[name] * (merged - bases[name]).square()).sum()
    gradients = torch.autograd.grad(expected, list(adapter.parameters.values()))
    ewc = ElasticWeightConsolidation(AdapterWeights(module, adapter.parameters, adapter), fisher, 7.0)
    torch.testing.assert_close(ewc.penalty(), expected.detach(), rtol=1e-4, atol=0)
    ewc.add_gradient_()
    for (name, parameter), gradient in zip(adapter.parameters.items(), gradients, strict=True):
        close = {"rtol": 1e-4, "atol": 1e-5 * float(gradient.abs().max())}
        torch.testing.assert_close(parameter.grad, gradient, **close, msg=lambda text, name=name: f"{name}: {text}")


def test_an_adapter_loads_in_diffusers_alone_and_is_switched_on_and_off(family, base, runs):
    plain = pictures(DiffusionPipeline.from_pretrained(base), family, output_type="np")
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(runs["adapter"], adapter_name="erasure")
    whole = pictures(pipeline, family, output_type="np")
    assert np.abs(whole - plain).max() > 1e-6
    pipeline.set_adapters("erasure", 0.0)
    assert np.array_equal(pictures(pipeline, family, output_type="np"), plain)
    pipeline.set_adapters("erasure", 1.0)
    assert np.array_equal(pictures(pipeline, family, output_type="np"), whole)
    pipeline.unload_lora_weights()
    assert np.array_equal(pictures(pipeline, family, output_type="np"), plain)


@pytest.mark.quantized
@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_an_adapter_is_trained_on_a_quantised_base(family, base, tmp_path, bits):
    """And loads onto that as diffusers quantises it."""
    # Under the frozen target the base model's own samples would teach nothing.
    settings = {"base_quantization": bits, "train_method": "full", "max_train_steps": 2, "target": "noise"}
    config = SelectiveAmnesiaConfig(**{**settings_of(family, base, tmp_path), **KINDS["adapter"], **settings})
    objective = objective_for(load_pipeline(str(base), base_quantization=bits))
    images = torch.rand(2, 3, family.size, family.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = SampleSet(objective.encode_images(images, 0), PROMPTS, PROMPTS, [0, 1], {"base": "test"})
    fisher = FisherEstimator(objective, "full", timesteps=2).estimate(samples)
    training = Training(objective, config, samples, samples, fisher)
    training.train()
    # At the second step the weights are away from where they began.
    assert training.history[-1]["ewc_penalty"] > 0
    training.save(tmp_path / "erased")
    quantised = PipelineQuantizationConfig(quant_mapping={family.part: quantization_config(bits, torch.float32)})
    pipeline = DiffusionPipeline.from_pretrained(base, quantization_config=quantised, dtype=torch.float32)
    assert quantization_of(getattr(pipeline, family.part)) == bits
    before = pictures(pipeline, family, output_type="np")
    pipeline.load_lora_weights(tmp_path / "erased")
    assert np.abs(pictures(pipeline, family, output_type="np") - before).max() > 1e-6
    if bits == "int8" and not torch.cuda.is_available():
        with pytest.raises(ValueError, match='"nf4" needs a CUDA device and there is none: use "int8" or "fp8"'):
            Erasure(config.replace(base_quantization="nf4"))


def test_an_adapter_is_merged_and_extracted_again(family, base, runs):
    merge_adapter(runs["adapter"], base.parent / "merged")
    found, fused = weights(base.parent / "merged", family.part), weights(runs["adapter"], family.part)
    assert all(torch.equal(value, fused[name]) for name, value in found.items())
    assert extract_adapter(base.parent / "merged", base.parent / "extracted", 2).kept > 0.999
    again = weights(base.parent / "extracted", family.part)
    for name, value in fused.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)


def test_an_adapter_under_kohya_s_names_is_the_same_or_is_refused(family, base, tmp_path):
    objective = objective_for(DiffusionPipeline.from_pretrained(base))
    name = type(objective.pipeline).__name__
    every = adapter_layers(objective.module, objective.select("full")).sizes
    if family.part != "unet":
        with pytest.raises(ValueError, match=f"does not convert adapters of a {name}: leave it out"):
            check_kohya(objective, every, 2)
        return
    if name == "StableDiffusionXLPipeline":
        lost = r"2 of \d+ layers do not come back from it, such as add_embedding.linear_1, add_embedding.linear_2: "
        with pytest.raises(ValueError, match=lost):
            check_kohya(objective, every, 2)
    layers = adapter_layers(objective.module, objective.select("xattn")).sizes
    adapter = LowRankAdapter(objective.module, layers, 2, 5)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in adapter.state().items()}
    adapter.remove()
    check_kohya(objective, layers, 2)
    save_adapter(objective, state, 2, tmp_path, {})
    export_kohya(objective, tmp_path, tmp_path)
    found = []
    for file in (None, ADAPTER_FILE, KOHYA_FILE):
        pipeline = DiffusionPipeline.from_pretrained(base)
        if file is not None:
            pipeline.load_lora_weights(tmp_path, weight_name=file)
        found.append(pictures(pipeline, family, output_type="np"))
    assert np.array_equal(found[1], found[2])
    assert np.abs(found[1] - found[0]).max() > 1e-6


def test_what_is_saved_loads_in_diffusers_alone_and_samples_otherwise(family, base, runs):
    before, after = (
        pictures(DiffusionPipeline.from_pretrained(folder), family, output_type="np") for folder in (base, runs["full"])
    )
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-3
    report = json.loads((runs["full"] / "report.json").read_text())
    assert report["rows"]


def test_the_loss_is_that_of_the_published_script(family):
    objective = objective_for(family.build())
    samples, timesteps, noise = drawn(objective, family.size)
    prompts = PROMPTS * 2
    conditions = objective.encode_prompts(prompts)
    with torch.no_grad():
        found = objective.negative_elbo(objective.module, samples, conditions, timesteps, noise)
        expected = family.loss(objective.pipeline, samples, prompts, timesteps, noise)
    assert found.shape == (4,)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # Conditions count.
    other = objective.encode_prompts(["a cat"] * 4)
    with torch.no_grad():
        assert not torch.allclose(objective.negative_elbo(objective.module, samples, other, timesteps, noise), found)


def test_images_become_samples_as_in_the_published_script(family):
    objective, vae = objective_for(family.build()), family.build().vae
    images = torch.rand(2, 3, family.size, family.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = family.latents(vae, images, torch.Generator().manual_seed(7))
    torch.testing.assert_close(objective.encode_images(images, 7), expected)


def test_sampling_and_decoding_are_the_pipeline_s_own(family):
    objective = objective_for(family.build())
    for guidance in (1.0, 3.0):
        settings = SamplingSettings(**{**objective.defaults, "num_inference_steps": 3, "guidance_scale": guidance,
                                       "resolution": family.size})  # fmt: skip
        pipeline = family.build()
        pipeline.scheduler = objective.make_sampler(settings.sampler, pipeline.scheduler)
        samples = objective.sample(PROMPTS, [0, 1], settings)
        assert samples.dtype == torch.float32
        assert samples.shape == objective.encode_images(torch.zeros(2, 3, family.size, family.size), 0).shape
        found = [np.asarray(picture) for picture in objective.decode(samples)]
        for picture, expected in zip(found, pictures(pipeline, family, guidance), strict=True):
            assert np.array_equal(picture, np.asarray(expected))


def test_the_device_is_what_the_module_says(family):
    objective = objective_for(family.build())
    for device in ("cpu", "meta"):
        objective.module.to(device)
        assert objective.device == objective.module.device == torch.device(device)


def with_few_timesteps(pipeline, count=10):
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, num_train_timesteps=count)
    return pipeline


def test_fisher_information_over_all_timesteps_is_that_of_autograd(family):
    pipeline = with_few_timesteps(family.build())
    objective = objective_for(pipeline)
    total = objective.num_train_timesteps
    assert total == 10
    images = torch.rand(2, 3, family.size, family.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = SampleSet(objective.encode_images(images, 0), PROMPTS, PROMPTS, [0, 1], {"base": "test"})
    found = FisherEstimator(objective, "full", batch_size=4).estimate(samples).values
    shares = torch.ones(total) if family.shares is None else family.shares(pipeline.scheduler)
    module = getattr(pipeline, family.part)
    module.requires_grad_(True)
    expected = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    for index, prompt in enumerate(PROMPTS):
        generator = generator_of("fisher", 0, index)
        sample = samples.samples[index : index + 1]
        module.zero_grad()
        for timestep in range(total):
            noise = torch.randn(sample.shape, generator=generator)
            loss = family.loss(pipeline, sample, [prompt], torch.tensor([timestep]), noise)
            (shares[timestep] * loss.sum()).backward()
        for name, value in module.named_parameters():
            if value.grad is not None:
                expected[name] += value.grad.square() / len(PROMPTS)
    assert found.keys() == expected.keys()
    largest = float(max(value.max() for value in expected.values()))
    assert largest > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=1e-6 * largest)


def test_two_steps_follow_eq_4_by_hand(family):
    """Gradient descent on the published scripts' losses and the penalty, by autograd; the second step is away from
    theta*, where the penalty has a gradient."""
    pipeline, rate = family.build(), 0.1
    objective = objective_for(pipeline)
    prompts = ["brad pitt", "a dog on grass"]
    images = torch.rand(4, 3, family.size, family.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoded = objective.encode_images(images, 0).split(2)
    surrogates, replay = (
        SampleSet(samples, [prompt] * 2, [prompt] * 2, [0, 1], {"base": "test"})
        for samples, prompt in zip(encoded, prompts, strict=True)
    )
    fisher = FisherEstimator(objective, "full", 2, batch_size=4).estimate(replay)
    largest = float(max(value.max() for value in fisher.values.values()))
    # Of where it is most, the penalty takes a third of the shift back in the second step.
    weight = 1 / (6 * rate * largest)
    config = SelectiveAmnesiaConfig(**{
        **BY_HAND, "max_train_steps": 2, "train_batch_size": 2, "target": "noise", "condition_dropout": 0.0,
        "replay_weight": 0.7, "ewc_weight": weight, "max_grad_norm": 1e9, "report_to": "none", "train_method": "full",
    })  # fmt: skip
    training = Training(objective, config, surrogates, replay, fisher)
    parameters = training.parameters
    before = {name: value.detach().clone() for name, value in parameters.items()}

    def by_hand(weight):
        for step in range(2):
            batch = training.batches().batch(step, slice(0, 2))
            texts = [prompt for prompt in prompts for _ in range(2)]
            losses = family.loss(pipeline, batch.samples, texts, batch.timesteps, batch.noise)
            total = losses[:2].mean() + 0.7 * losses[2:].mean()
            total += weight * sum((fisher.values[name] * (value - before[name]) ** 2).sum()
                                  for name, value in parameters.items())  # fmt: skip
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            with torch.no_grad():
                for value, gradient in zip(parameters.values(), gradients, strict=True):
                    value -= rate * (0 if gradient is None else gradient)
        return shifts()

    def shifts():
        """How far the weights are from theta*, to which they go back."""
        found = {name: value.detach() - before[name] for name, value in parameters.items()}
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(before[name])
        return found

    for value in parameters.values():
        value.requires_grad_(True)
    expected, without = by_hand(weight), by_hand(0.0)
    training._optimizer = lambda: torch.optim.SGD(list(parameters.values()), lr=rate)
    training.train()
    found = shifts()
    furthest = max(float(value.abs().max()) for value in expected.values())
    apart = max(float((value - without[name]).abs().max()) for name, value in expected.items())
    assert apart > 1e-2 * furthest
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3 * furthest, msg=name)


class KilledAfter:
    def __init__(self, step):
        self.step = step

    def after_step(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_to_the_same_bits(family, base, runs, kind):
    output = base.parent / f"killed-{kind}"
    settings = {"checkpointing_steps": 1, **KINDS[kind]}
    process = os.fork()
    if process == 0:
        try:
            trained(family, base, output, [KilledAfter(2)], **settings)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    assert list(output.glob("checkpoint-*"))
    assert not (output / "selective_amnesia.json").exists()
    trained(family, base, output, **settings)
    again, unbroken = (weights(folder, family.part) for folder in (output, runs[kind]))
    assert all(torch.equal(value, unbroken[name]) for name, value in again.items())
    history, whole = (json.loads((folder / "training_history.json").read_text()) for folder in (output, runs[kind]))
    assert history == whole


def test_accumulated_batches_are_one_large_batch(family, base, runs, kind):
    further = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    split = trained(family, base, base.parent / f"split-{kind}", **further, **KINDS[kind])
    assert_same_steps(family, base, split, runs[kind])


def assert_same_steps(family, base, one, other):
    first, second, before = (weights(folder, family.part) for folder in (one, other, base))
    apart = sum(int(((value - second[name]).abs() > 1e-3 * (value - before[name]).abs() + 1e-7).sum())
                for name, value in first.items())  # fmt: skip
    # Adam turns the rounding of a gradient that is zero into steps of its own.
    assert apart <= 0.01 * sum(value.numel() for value in first.values())
    history, whole = (json.loads((folder / "training_history.json").read_text()) for folder in (one, other))
    for name in ("surrogate_loss", "replay_loss", "ewc_penalty"):
        assert [row[name] for row in history] == pytest.approx([row[name] for row in whole], rel=1e-3), name


IN_TURN = """
import json, os, sys
from sa_diffusers import Erasure, SelectiveAmnesiaConfig

for settings in json.load(open(sys.argv[1])):
    print(settings["output_dir"], file=sys.stderr, flush=True)
    erasure = Erasure(SelectiveAmnesiaConfig(**settings))
    with erasure.holding():
        surrogates = erasure.surrogates()
        erasure.training_stage.run(surrogates, *erasure.products(surrogates))
    if os.environ["RANK"] == "0":
        with open(settings["output_dir"] + ".cost.json", "w") as file:
            made = erasure.output.made(erasure.training_stage.identity())
            json.dump(made["training"].to_dict(), file)
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Name of a family -> folder of its base and of runs in two processes: one pair makes all of them in turn, for
    two processes take seconds to find each other."""
    root = tmp_path_factory.mktemp("both")
    settings = []
    for name, family in FAMILIES.items():
        family.build().save_pretrained(root / name / "base")
        settings += [{**settings_of(family, root / name / "base", root / name / kind), "train_batch_size": 1, **given}
                     for kind, given in KINDS.items()]  # fmt: skip
    (root / "settings.json").write_text(json.dumps(settings))
    (root / "in_turn.py").write_text(IN_TURN)
    result = forked(str(root / "in_turn.py"), ["settings.json"], root, environment(root), 2)
    assert result.returncode == 0, result.stderr
    return {name: root / name for name in FAMILIES}


def test_two_processes_make_the_same_steps(family, runs, kind, both):
    (folder,) = [folder for name, folder in both.items() if FAMILIES[name] is family]
    assert_same_steps(family, folder / "base", folder / kind, runs[kind])
    alone = json.loads((runs[kind] / "report.json").read_text())["cost"]["training"]
    assert json.loads((folder / f"{kind}.cost.json").read_text()) == alone["made"]


def test_bf16_trains_to_finite_weights_of_float32(family, base, runs, kind):
    output = base.parent / f"bf16-{kind}"
    mixed = weights(trained(family, base, output, mixed_precision="bf16", **KINDS[kind]), family.part)
    plain, before = weights(runs[kind], family.part), weights(base, family.part)
    for value in mixed.values():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
    assert len(moved(before, mixed)) > 0.8 * len(moved(before, plain))
    assert any(not torch.equal(value, plain[name]) for name, value in mixed.items())


def test_weights_in_half_precision_are_trained_and_saved_so(family, base):
    """What is trained adds up in float32; the folder is as the base's weights were held, and loads as it is."""
    settings = {"weights_dtype": "bfloat16", "fisher_dtype": "bfloat16", "train_method": "xattn"}
    folder = erase(family, base, base.parent / "half", **settings)
    pipelines = [DiffusionPipeline.from_pretrained(place, dtype=torch.bfloat16) for place in (folder, base)]
    after, before = (getattr(pipeline, family.part).state_dict() for pipeline in pipelines)
    stored = load_file(next((folder / family.part).glob("*.safetensors")))
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.bfloat16}
    selected = objective_for(pipelines[1], weights_dtype="bfloat16").select("xattn")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and moved <= set(selected)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert np.isfinite(pictures(pipelines[0], family, output_type="np")).all()
    report = json.loads((folder / "report.json").read_text())
    assert report["mixed_precision"] == "bf16"


def test_text_encoders_read_each_prompt_once(family, monkeypatch):
    """What is said twice is the same twice, and each row that of a prompt alone, to rounding."""
    objective, read = objective_for(family.build()), []
    encode = objective.encode
    monkeypatch.setattr(objective, "encode", lambda prompts: read.extend(prompts) or encode(prompts))
    prompts = ["brad pitt", "", "a man", "", "brad pitt"]
    found = objective.encode_prompts(prompts)
    assert read == ["brad pitt", "", "a man"]
    for row, prompt in enumerate(prompts):
        for name, value in objective.encode_prompts([prompt]).items():
            torch.testing.assert_close(found[name][row], value[0], rtol=1e-3, atol=1e-4)


def test_attacks_reach_every_text_encoder(family):
    objective = objective_for(family.build())
    handles = objective.text_encoders()
    assert handles
    for handle in handles:
        handle.encoder.get_input_embeddings().weight.requires_grad_(True)
    conditions = objective.encode_prompts(["brad pitt"])
    sum(value.square().sum() for value in conditions.values()).backward()
    for handle in handles:
        assert handle.encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_an_attack_gives_back_what_it_changed(family, tmp_path):
    base, attacked = (objective_for(family.build()) for _ in range(2))
    settings = SamplingSettings(**{**base.defaults, "num_inference_steps": 2, "resolution": family.size})
    pairs = pair_concepts(["brad pitt"], ["a man"])
    subject = Subject(base, attacked, pairs, settings, 2, 100, tmp_path / "artifacts", Accelerator())
    attack = TextualInversion(AttackSettings(inversion=Inversion(2, 2, 2, 0.05, "man")))
    whole, plain = attacked.fingerprint(), attacked.sample(PROMPTS, [1, 2], settings)
    with attack.prepared(attacked, pairs[0], subject):
        assert attacked.fingerprint() != whole
        assert torch.isfinite(attacked.sample([INVERTED_TOKEN], [3], settings)).all()
        # The token is one that the model knows now, and what it says counts.
        assert not torch.equal(attacked.sample([INVERTED_TOKEN], [3], settings), base.sample(["man"], [3], settings))
    assert attacked.fingerprint() == whole
    assert torch.equal(attacked.sample(PROMPTS, [1, 2], settings), plain)


def test_the_probes_measure(family, base):
    settings = {"num_probe_images": 8, "num_neighbour_images": 8, "forget_target": None, "train_method": "xattn",
                "max_train_steps": 2}  # fmt: skip
    probed = trained(family, base, base.parent / "probed", **settings)
    history = json.loads((probed / "training_history.json").read_text())
    read = [row for row in history if "forgotten" in row]
    assert read
    assert all(np.isfinite(row["forgotten"]) and row["drift"] >= 0 for row in read)


def test_a_plan_says_what_the_run_then_counts(family, base):
    """With guidance, which FLUX need not have."""
    settings = settings_of(family, base, base.parent / "counted")
    settings |= {"artifacts_dir": str(base.parent / "counted samples"), "guidance_scale": 3.0, "max_train_steps": 1}
    erasure = Erasure(SelectiveAmnesiaConfig(**settings))
    plan = planned(erasure)
    found = figures(erasure.run().report.cost)
    for name, titles in STAGES.items():
        assert plan.get(name, (0, 0)) == summed(found, titles), name


def test_noise_is_a_surrogate_too(family, base):
    output = trained(family, base, base.parent / "noise", surrogate=["uniform_noise"], max_train_steps=1)
    assert all(torch.isfinite(value).all() for value in weights(output, family.part).values())


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    "check",
    [
        test_the_loss_is_that_of_the_published_script,
        test_sampling_and_decoding_are_the_pipeline_s_own,
        test_fisher_information_over_all_timesteps_is_that_of_autograd,
    ],
)
def test_a_variant_does_too(check, variant):
    check(variant)
