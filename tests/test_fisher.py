import pytest
import torch
from diffusers import DDIMScheduler

from sa_diffusers import (
    FisherEstimator,
    FisherInformation,
    SampleSet,
    SamplingSettings,
    objective_for,
    select_parameters,
)
from sa_diffusers.fisher import fisher_identity
from sa_diffusers.seeds import generator_of

from .conftest import build_tiny_pipeline

TIMESTEPS = 20


@pytest.fixture(params=["epsilon", "v_prediction"])
def objective(request):
    """Few timesteps, so that the brute-force loop over all of them is quick."""
    pipeline = build_tiny_pipeline(request.param)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, num_train_timesteps=TIMESTEPS)
    return objective_for(pipeline)


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    return SampleSet(torch.randn(3, 4, 8, 8, generator=generator), ["cat", "dog", "cow"], ["cat", "dog", "cow"],
                     [0, 1, 2], {"base": "test"})  # fmt: skip


def test_samples_of_prompts_are_fewer_at_once_where_memory_holds_no_more(objective, monkeypatch):
    prompts = ["cat", "dog", "cow", "pig", "hen"]
    settings = SamplingSettings(num_inference_steps=2, batch_size=4)
    whole = FisherEstimator(objective, "xattn", 2).estimate(prompts, settings=settings)
    batch = objective.sample_batch

    def starved(texts, *more):
        if len(texts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch(texts, *more)

    monkeypatch.setattr(objective, "sample_batch", starved)
    found = FisherEstimator(objective, "xattn", 2).estimate(prompts, settings=settings)
    for name, value in whole.values.items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-2, atol=1e-3 * float(value.max()))


def brute_force(objective, parameters, samples, seed=0):
    """One timestep at a time, each backward by itself: the definition."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for index in range(len(samples)):
        generator = generator_of("fisher", seed, index)
        sample = samples.samples[index : index + 1]
        conditions = objective.encode_prompts([samples.conditions[index]])
        objective.module.zero_grad()
        for timestep in range(TIMESTEPS):
            noise = torch.randn(sample.shape, generator=generator)
            noisy = objective.noise_schedule.add_noise(sample, noise, torch.tensor([timestep]))
            prediction = objective.module(noisy, timestep, conditions["encoder_hidden_states"]).sample
            target = noise
            if objective.prediction_type == "v_prediction":
                target = objective.noise_schedule.get_velocity(sample, noise, torch.tensor([timestep]))
            torch.nn.functional.mse_loss(prediction, target).backward()
        for name, parameter in parameters.items():
            total[name] += parameter.grad**2
    objective.module.zero_grad()
    return {name: value / len(samples) for name, value in total.items()}


@pytest.mark.parametrize("batch_size", [1, 7, TIMESTEPS])
def test_exact_mode_equals_the_brute_force_loop(objective, samples, batch_size):
    parameters = select_parameters(objective.module, "full")
    expected = brute_force(objective, parameters, samples)
    found = FisherEstimator(objective, parameters, None, batch_size, kind="gradient").estimate(samples).values
    assert found.keys() == expected.keys()
    largest = max(value.max() for value in expected.values())
    for name, value in expected.items():
        # The gradient of attention's key biases is zero but for rounding: an absolute floor, far under the rest.
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=1e-6 * float(largest))


@pytest.mark.parametrize("batch_size", [10, 3], ids=["one pass", "several"])
@pytest.mark.parametrize("kind", ["gradient", "jacobian"])
def test_rows_by_columns_are_the_sums_of_the_diagonal(objective, samples, kind, batch_size, tmp_path):
    parameters = select_parameters(objective.module, "full")
    exact = FisherEstimator(objective, parameters, 5, kind=kind).estimate(samples).values
    estimator = FisherEstimator(objective, parameters, 5, batch_size, kind=kind, form="rows_by_columns")
    information = estimator.estimate(samples)
    assert set(information.values) == {name for name, value in parameters.items() if value.dim() > 1}
    for name, value in information.values.items():
        matrix = exact[name].flatten(1)
        expected = torch.cat([matrix.sum(1), matrix.sum(0)])
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    information.save_pretrained(tmp_path / "fisher")
    found = FisherInformation.from_pretrained(tmp_path / "fisher")
    assert "The sums over rows and over columns of the diagonal of the" in found.model_card("a/b")
    assert "--adapter lora --fisher_form rows_by_columns" in found.model_card("a/b")
    with pytest.raises(ValueError, match="rows by columns alone, which an adapter's run with"):
        found.check({}, found.values)
    found.check({"fisher_form": "rows_by_columns"}, found.values)
    with pytest.raises(ValueError, match='form="rows" is not one of "diagonal", "rows_by_columns"'):
        FisherEstimator(objective, parameters, form="rows")
    biases = {name: value for name, value in parameters.items() if value.dim() == 1}
    with pytest.raises(ValueError, match="nothing that is selected has rows and columns"):
        FisherEstimator(objective, biases, form="rows_by_columns")


@pytest.mark.parametrize("kind", ["gradient", "jacobian"])
def test_subset_of_timesteps_keeps_the_scale(objective, samples, kind):
    parameters = select_parameters(objective.module, "xattn")
    exact = FisherEstimator(objective, parameters, kind=kind).estimate(samples).values
    half = FisherEstimator(objective, parameters, TIMESTEPS // 2, kind=kind).estimate(samples).values
    ratio = sum(value.sum() for value in half.values()) / sum(value.sum() for value in exact.values())
    assert 0.5 < ratio < 3


def test_only_selected_parameters_and_nothing_left_behind(objective, samples):
    before = {name: (p.requires_grad, p.clone()) for name, p in objective.module.named_parameters()}
    parameters = select_parameters(objective.module, "xattn")
    information = FisherEstimator(objective, parameters, 2).estimate(samples)
    assert set(information.values) == set(parameters)
    for name, parameter in objective.module.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None


@pytest.mark.parametrize("kind", ["gradient", "jacobian"])
def test_one_gradient_at_a_time_is_held_and_those_before_stay(objective, samples, kind):
    parameters, held = select_parameters(objective.module, "full"), set()
    own = [torch.ones_like(value) for value in parameters.values()]
    for value, gradient in zip(parameters.values(), own, strict=True):
        value.grad = gradient
    handles = [
        value.register_post_accumulate_grad_hook(
            lambda _: held.add(sum(other.grad is not None for other in parameters.values()))
        )
        for value in parameters.values()
    ]
    FisherEstimator(objective, parameters, 2, 1, kind=kind).estimate(samples)
    for value, gradient, handle in zip(parameters.values(), own, handles, strict=True):
        assert value.grad is gradient
        assert torch.equal(gradient, torch.ones_like(gradient))
        value.grad = handle.remove()
    assert held == {1}


def test_saved_with_its_origin_and_loaded_alone(objective, samples, tmp_path):
    parameters = select_parameters(objective.module, "xattn")
    identity = {"base_model": "a/b", "revision": "abc", **fisher_identity(objective, "digest", "xattn")}
    made = FisherEstimator(objective, parameters, 3, seed=5).estimate(samples, identity)
    made.save_pretrained(tmp_path / "fisher")
    loaded = FisherInformation.from_pretrained(tmp_path / "fisher")
    assert loaded.values.keys() == made.values.keys()
    assert all(torch.equal(loaded.values[name], made.values[name]) for name in made.values)
    assert loaded.config == made.config
    for field in ("base_model", "revision", "train_method", "prediction_type", "reduction", "timesteps", "num_samples",
                  "seed", "samples", "trained_module"):  # fmt: skip
        assert field in loaded.config
    loaded.check(fisher_identity(objective, "digest", "xattn"), parameters)
    # What an earlier version published cannot be told from that of another text encoder or other betas.
    (tmp_path / "fisher" / "fisher_config.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="has format 1, which does not say all that it depends on"):
        FisherInformation.from_pretrained(tmp_path / "fisher")


def test_fisher_of_another_run_is_refused(objective, samples):
    parameters = select_parameters(objective.module, "xattn")
    identity = fisher_identity(objective, "digest", "xattn")
    information = FisherEstimator(objective, parameters, 2).estimate(samples, identity)
    with pytest.raises(ValueError, match="weights that it was computed from"):
        information.check({**identity, "trained_module": "another"}, parameters)
    with pytest.raises(ValueError, match="prediction type"):
        information.check({**identity, "prediction_type": "sample"}, parameters)
    with pytest.raises(ValueError, match="lacks"):
        information.check(identity, select_parameters(objective.module, "full"))


def test_bad_input(objective, samples, tmp_path):
    parameters = select_parameters(objective.module, "xattn")
    with pytest.raises(ValueError, match="^timesteps=21 must be between 1 and 20"):
        FisherEstimator(objective, parameters, 21)
    with pytest.raises(ValueError, match="at least one sample"):
        FisherEstimator(objective, parameters, 2).estimate(samples.subset([]))
    with pytest.raises(ValueError, match="holds no Fisher information"):
        FisherInformation.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor could it be had from the Hub"):
        FisherInformation.from_pretrained("nobody/nothing")
    broken = SampleSet(torch.full((1, 4, 8, 8), float("nan")), ["cat"], ["cat"], [0])
    with pytest.raises(FloatingPointError, match='sample 0 \\("cat"\\)'):
        FisherEstimator(objective, parameters, 2).estimate(broken)
