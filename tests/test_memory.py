"""What a training is said to take of memory, beside what it takes."""

from dataclasses import replace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile, record_function

from sa_diffusers import Erasure, SampleSet, SelectiveAmnesiaConfig, objective_for
from sa_diffusers.families.digests import fingerprint_module
from sa_diffusers.fisher import FisherEstimator, FisherInformation, fisher_identity
from sa_diffusers.footprint import fits_beside, free_on, peak_bytes, without_values
from sa_diffusers.quantization import lighten_, quantizable, quantize_, quantized_bytes
from sa_diffusers.training.memory import Memory, changes_for_less, memory_plan, training_memory
from sa_diffusers.training.training import Training

from .tiny_families import FAMILIES, SIZE

STEP = "a step is done"
CASES = [
    {},
    {"gradient_checkpointing": True, "train_method": "xattn"},
    {"learning_rate": 1e-4, "train_method": "noxattn", "gradient_accumulation_steps": 4},
    {"weights_dtype": "bfloat16", "fisher_dtype": "bfloat16"},
]
ADAPTERS = [
    {},
    {"weights_dtype": "bfloat16"},
    pytest.param({"base_quantization": "int8"}, marks=pytest.mark.quantized),
    pytest.param({"base_quantization": "fp8"}, marks=pytest.mark.quantized),
]


def config_of(**settings):
    return SelectiveAmnesiaConfig(
        **{"concept": ["brad pitt"], "surrogate": ["a middle aged man"], "resolution": SIZE, "max_train_steps": 2,
           "ewc_weight": 1.0, "num_probe_images": 0, "train_batch_size": 8, "report_to": "none",
           "condition_dropout": 0.0, **settings}
    )  # fmt: skip


def measured(train):
    """Bytes that a training holds at its peak, by what torch's own profiler records of the allocator.

    From the first step's end on, as prompts are embedded before, and by text encoders whose activations are not told.
    What convolutions rearrange for a while goes by the processor, and is left out.

    Args:
        train: Takes what is called after each step.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(mark_step)
    events = profiler.profiler.kineto_results.events()
    first = min(event.start_ns() for event in events if event.name() == STEP)
    turns = [(event.start_ns(), 0, event.nbytes()) for event in events if event.name() == "[memory]"]
    for event in events:
        if event.name() in {"aten::convolution", "aten::convolution_backward"}:
            turns += [(event.start_ns(), 1, 1), (event.start_ns() + event.duration_ns(), 1, -1)]
    now = peak = within = 0
    for when, turn, size in sorted(turns):
        if turn:
            within += size
        else:
            now += size
        if when >= first and not within:
            peak = max(peak, now)
    return peak


def mark_step(_):
    with record_function(STEP):
        pass


def in_type(pipeline, weights_dtype):
    if weights_dtype != "float32":
        pipeline.to(getattr(torch, weights_dtype))
    return pipeline


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_training_takes_what_was_said(family, settings):
    compare(family, config_of(**settings))


# What differs between families is the same in each.
@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
@pytest.mark.parametrize("name", ["stable diffusion", "FLUX"])
def test_a_training_of_an_adapter_does_too(name, settings):
    compare(FAMILIES[name], config_of(adapter="lora", lora_rank=4, **settings))


def compare(family, config):
    """Within a tenth, and three in bfloat16, where a CPU casts less than a GPU, which is what is counted."""
    AcceleratorState._reset_state(reset_partial_state=True)
    objective = objective_for(in_type(family.build(), config.weights_dtype), weights_dtype=config.weights_dtype)
    # Those of an adapter come while it is trained.
    before = sum(value.numel() * value.element_size() for value in objective.module.parameters())
    parameters = objective.select(config.train_method)
    shapes = {name: value.shape for name, value in parameters.items()}
    if config.base_quantization:
        layers = [objective.module.get_submodule(name) for name in quantizable(objective.module)]
        before -= sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
        before += sum(quantized_bytes(config.base_quantization, *layer.weight.shape) for layer in layers)
        quantize_(objective.module, config.base_quantization)
        lighten_(objective.module)
    told = training_memory(objective, config, prompt="brad pitt", on_cuda=False)
    fisher = FisherInformation(
        {name: torch.ones(shape) for name, shape in shapes.items()},
        fisher_identity(objective, fingerprint_module(objective.module), config.train_method),
    )
    images = torch.rand(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = SampleSet(objective.encode_images(images, 0), ["brad pitt"] * 16, ["a man"] * 16, list(range(16)), {})

    def train(done):
        Training(objective, config, samples, samples, fisher, callbacks=[done]).train()

    # It is there before it begins, unless it is held in another type.
    before += told.fisher if config.fisher_dtype == "float32" else 0
    took = measured(train)
    # An estimate of the Fisher information, which is given here, comes before.
    told = replace(told, estimating=0)
    assert (told.total - before) == pytest.approx(took, rel=0.1 if config.weights_dtype == "float32" else 0.3)


def test_what_is_kept_is_what_the_formulas_say():
    """Of each trained parameter: value, gradient, Prodigy's four, average, theta*, Fisher information."""
    objective = objective_for(FAMILIES["stable diffusion"].build())
    trained = sum(value.numel() for value in objective.select("xattn").values())
    whole = sum(value.numel() for value in objective.module.parameters())
    told = training_memory(objective, config_of(train_method="xattn"), prompt="brad pitt")
    assert told.kept == 4 * whole + 4 * (1 + 4 + 1 + 1 + 1) * trained
    half = config_of(train_method="xattn", weights_dtype="bfloat16", fisher_dtype="bfloat16", use_ema=False)
    told = training_memory(objective, half, prompt="brad pitt")
    # theta* is kept as it was loaded, which loses nothing.
    assert told.kept == 2 * (whole - trained) + (4 + 4 + 16 + 2 + 2) * trained


def test_fisher_information_on_the_cpu_takes_nothing_of_a_gpu():
    """While it is estimated, one weight's gradient; on a CPU it is no other place."""
    objective = objective_for(FAMILIES["stable diffusion"].build())
    sizes = [value.numel() for value in objective.select("xattn").values()]
    settings = {"train_method": "xattn", "fisher_on_cpu": True}
    plain, told = (training_memory(objective, config_of(**{**settings, "fisher_on_cpu": asked}), prompt="brad pitt")
                   for asked in (False, True))  # fmt: skip
    assert (told.fisher, told.estimating) == (0, 4 * max(sizes))
    assert (plain.fisher, plain.estimating) == (4 * sum(sizes), 4 * (2 * sum(sizes) + max(sizes)))
    assert plain.kept - told.kept == 4 * sum(sizes)
    assert training_memory(objective, config_of(**settings), prompt="brad pitt", on_cuda=False).fisher == plain.fisher
    assert {"fisher_on_cpu": True} in changes_for_less(config_of(), objective)
    assert {"fisher_on_cpu": True} not in changes_for_less(config_of(), objective, on_cuda=False)
    assert {"fisher_on_cpu": True} not in changes_for_less(config_of(ewc_weight=0.0), objective)
    # In rows and columns it takes next to nothing, and stays.
    factored = {"adapter": "lora", "lora_rank": 2, "fisher_form": "rows_by_columns"}
    assert training_memory(objective, config_of(**settings, **factored), prompt="brad pitt").fisher > 0


@pytest.mark.parametrize("batch", [10, 3], ids=["one pass", "several"])
def test_rows_by_columns_are_estimated_without_the_diagonal(batch):
    """What an estimate takes less than the diagonal's, measured and told; of several passes their sum is held."""
    objective = objective_for(FAMILIES["stable diffusion"].build())
    samples = SampleSet(torch.randn(1, 4, 4, 4), ["cat"], ["cat"], [0], {})
    told, took = {}, {}
    for form in ("diagonal", "rows_by_columns"):
        settings = {"adapter": "lora", "lora_rank": 2, "fisher_form": form, "fisher_batch_size": batch}
        told[form] = training_memory(objective, config_of(**settings), counts_activations=False).estimating
        estimator = FisherEstimator(objective, "full", 5, batch, form=form)

        def estimate(done, estimator=estimator):
            done(None)
            estimator.estimate(samples, {"trained_module": ""})

        took[form] = measured(estimate)
    selected = sum(value.numel() for value in objective.select("full").values())
    less = told["diagonal"] - told["rows_by_columns"]
    assert less > 4 * selected * (1.5 if batch == 10 else 0.5)
    assert took["diagonal"] - took["rows_by_columns"] == pytest.approx(less, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_an_estimate_recomputes_activations_as_the_training_does(family):
    """To the same numbers."""
    objective = objective_for(family.build())
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = SampleSet(objective.encode_images(images, 0), ["cat"], ["cat"], [0], {})
    called, found = {False: 0, True: 0}, {}
    for wanted in called:

        def count(*_, wanted=wanted):
            called[wanted] += 1

        handles = [part.register_forward_hook(count) for part in objective.module.modules()]
        estimator = FisherEstimator(objective, "xattn", 5, gradient_checkpointing=wanted)
        found[wanted] = estimator.estimate(samples, {"trained_module": ""}).values
        assert not objective.module.is_gradient_checkpointing
        for handle in handles:
            handle.remove()
    assert called[True] > called[False]
    for name, value in found[True].items():
        assert torch.equal(value, found[False][name]), name


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_s_estimate_goes_by_its_flag(tiny_settings, wanted):
    erasure, seen = Erasure(SelectiveAmnesiaConfig(**{**tiny_settings, "gradient_checkpointing": wanted})), set()
    module = erasure.objective.module
    module.register_forward_hook(lambda *_: seen.add((torch.is_grad_enabled(), module.is_gradient_checkpointing)))
    assert erasure.fisher() is not None
    assert {checkpointed for differentiated, checkpointed in seen if differentiated} == {wanted}


def test_of_an_adapter_its_matrices_are_kept_beside_the_weights():
    """Gradient, AdamW's two moments and the average are of its numbers; the teacher is no copy."""
    objective = objective_for(FAMILIES["stable diffusion"].build())
    whole = sum(value.numel() for value in objective.module.parameters())
    matrices = {name: value for name, value in objective.select("xattn").items() if value.dim() == 2}
    numbers = sum(2 * sum(value.shape) for value in matrices.values())
    settings = {"train_method": "xattn", "adapter": "lora", "lora_rank": 2, "learning_rate": 1e-4}
    told = training_memory(objective, config_of(**settings), prompt="brad pitt")
    fisher = sum(value.numel() for value in matrices.values())
    assert told.kept == 4 * whole + 4 * (1 + 1 + 2 + 1) * numbers + 4 * fisher
    told = training_memory(objective, config_of(**settings, weights_dtype="bfloat16"), prompt="brad pitt")
    assert told.kept == 2 * whole + 4 * (1 + 1 + 2 + 1) * numbers + 4 * fisher
    told = training_memory(objective, config_of(**settings, fisher_form="rows_by_columns"), prompt="brad pitt")
    assert told.fisher == 4 * sum(sum(value.shape) for value in matrices.values())


def test_a_model_of_real_size_is_counted_in_no_memory():
    before = psutil.Process().memory_info().rss
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    given = (torch.empty(2, 4, 64, 64, device="meta"), torch.zeros(2, device="meta"),
             torch.empty(2, 77, 768, device="meta"))  # fmt: skip
    assert 3.5e9 < peak_bytes(lambda: unet(*given).sample.mean().backward()) < 20e9
    assert psutil.Process().memory_info().rss - before < 1e9


def test_a_copy_without_values_leaves_the_model_alone():
    pipeline = FAMILIES["SD3"].build()
    weights = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    blank = without_values(pipeline.transformer, [pipeline.transformer])
    assert all(value.is_meta for value in blank.state_dict().values())
    assert blank.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.transformer.state_dict().items())


@pytest.fixture
def roomless(monkeypatch):
    """A machine with so many bytes free."""

    def leave(size):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": size}))

    return leave


def plan_of(config, objective=None):
    objective = objective or objective_for(FAMILIES["SD3"].build())
    return "\n".join(memory_plan(objective, config, "brad pitt", "no", 1, torch.device("cpu")))


def test_the_plan_says_what_would_make_it_fit(roomless):
    objective = objective_for(FAMILIES["SD3"].build())
    config = config_of(train_batch_size=16)
    whole = training_memory(objective, config, prompt="brad pitt", on_cuda=False)
    roomless(10**8)
    assert "warning" not in plan_of(config)
    roomless(whole.total - whole.weights - 10**4)
    told = plan_of(config)
    assert f"activations of {whole.rows} rows" in told
    assert "--train_batch_size 1 --gradient_accumulation_steps 32 would make it" in told
    small = training_memory(
        objective, config_of(train_batch_size=1, gradient_accumulation_steps=32), prompt="brad pitt", on_cuda=False
    )
    assert f"{small.total / 1e6:.1f} MB" in told
    roomless(1)
    assert "no flag makes it fit" in plan_of(config)


def test_what_would_take_less_goes_by_the_model():
    for name, t5 in (("SD3", True), ("FLUX", False), ("stable diffusion", False)):
        changes = list(changes_for_less(config_of(), objective_for(FAMILIES[name].build())))
        assert ({"no_t5": True} in changes) == t5, name
        for change in ({"gradient_checkpointing": True}, {"fisher_dtype": "bfloat16"}, {"weights_dtype": "bfloat16"},
                       {"train_method": "xattn"}):  # fmt: skip
            assert change in changes, name
    lean = config_of(no_t5=True, gradient_checkpointing=True, fisher_dtype="bfloat16", weights_dtype="bfloat16",
                     train_method="xattn", train_batch_size=1, fisher_on_cpu=True)  # fmt: skip
    objective = objective_for(FAMILIES["SD3"].build())
    first, *further = changes_for_less(lean, objective)
    assert first == {"adapter": "lora"}
    assert {"adapter": "lora", "fisher_form": "rows_by_columns", "base_quantization": "int8"} in further
    assert all(change["adapter"] == "lora" for change in further)
    adapted = lean.replace(adapter="lora", fisher_form="rows_by_columns", base_quantization="int8")
    assert not list(changes_for_less(adapted, objective))
    # On norms there is none.
    assert not list(changes_for_less(lean.replace(train_method=r"norm_q\."), objective))


def test_a_run_says_it_before_it_begins(tiny_settings, roomless):
    erasure = Erasure(SelectiveAmnesiaConfig(**tiny_settings))
    (line,) = [line for line in erasure.plan().splitlines() if line.startswith("memory")]
    assert "that are free (cpu)" in line
    roomless(10**8)
    assert "at the peak of training" in erasure.plan()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_is_planned(family, roomless):
    roomless(10**8)
    told = plan_of(config_of(resolution=family.size), objective_for(family.build()))
    assert "activations of 16 rows" in told
    assert "cannot be counted" not in told


def test_a_model_that_cannot_be_counted_is_planned_all_the_same(roomless):
    objective = objective_for(FAMILIES["SD3"].build())
    objective.negative_elbo = None
    roomless(10**7)
    assert "cannot be counted" in plan_of(config_of(), objective)


def test_the_network_makes_room_for_text_encoders_that_find_none():
    assert fits_beside(90, 100)
    assert not fits_beside(91, 100)
    assert free_on(torch.device("cpu")) is None
    objective = objective_for(FAMILIES["SD3"].build())
    told, values = objective.encode_prompts(["a dog"]), next(objective.module.parameters()).clone()
    with objective.waiting(), objective.reading():
        assert objective.device == torch.device("cpu")
        again = objective.encode_prompts(["a dog"])
    assert all(torch.equal(value, again[name]) for name, value in told.items())
    assert torch.equal(next(objective.module.parameters()), values)


def test_memory_adds_up():
    memory = Memory(1, 2, 3, 4, 5, 6, 70, 8, step=9, encoding=100, decoding=50)
    assert memory.kept == 21
    # Text encoders come before training, unless images are sampled on the way, and the weights make room for them.
    assert memory.total == 100
    assert replace(memory, encoding=0, decoding=0).total == 91
    assert replace(memory, draws=True).total == 120
    assert replace(memory, decoding=120).total == 121
    assert replace(memory, estimating=130).total == 131 + memory.activations // memory.rows
    assert replace(memory, estimating=0).before == 0
    assert memory.parts()["activations of 8 rows"] == 70
