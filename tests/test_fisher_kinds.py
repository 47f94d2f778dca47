"""The Jacobian's Fisher information against the whole Jacobian, and what both kinds have in common."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from sa_diffusers import FisherEstimator, FisherInformation, SampleSet, SelectiveAmnesiaConfig, objective_for
from sa_diffusers.erasure import Erasure
from sa_diffusers.families import DiffusionObjective
from sa_diffusers.fisher import estimator as estimators
from sa_diffusers.processes import Interrupted

from .conftest import build_tiny_pipeline
from .nursery import forked_code
from .test_class_models import tiny_diffusion, tiny_vae
from .test_processes import environment
from .test_theorem import Categorical

TIMESTEPS = 4
PROMPTS = ["cat", "dog", "cow", "hen", "pig"]


class Small(DiffusionObjective):
    """Predicts four numbers by thirty parameters. Its noise is the same in every draw: the signs alone are random."""

    kind = "small"
    reduction = "mean"
    unconditional = False
    resolution = 1
    device = torch.device("cpu")

    def __init__(self, **settings):
        super().__init__(DDPMScheduler(num_train_timesteps=TIMESTEPS, beta_end=0.5), **settings)
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 4, bias=False))

    def encode_prompts(self, prompts):
        return {"word": torch.tensor([[float(PROMPTS.index(prompt))] for prompt in prompts])}

    def draw_noise(self, samples, generator):
        return samples.flip(1).cos()

    def denoise(self, module, noisy, timesteps, conditions):
        return module(torch.cat([noisy, timesteps[:, None] / TIMESTEPS, conditions["word"]], dim=1))

    def _unused(self, *args, **kwargs):
        raise AssertionError("Fisher information needs none of this")

    def fingerprint(self):
        return "small"

    to = encode_images = sample_batch = decode = save = _unused


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    return SampleSet(torch.randn(5, 4, generator=generator), PROMPTS, PROMPTS, list(range(5)))


def exact(objective, samples):
    """Every output's gradient by itself, at every sample and timestep: the diagonal by its definition."""
    parameters = dict(objective.module.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for index, prompt in enumerate(samples.conditions):
        sample, condition = samples.samples[index : index + 1], objective.encode_prompts([prompt])
        for step in torch.arange(TIMESTEPS):
            kept = objective.noise_schedule.alphas_cumprod[step]
            noisy = kept.sqrt() * sample + (1 - kept).sqrt() * objective.draw_noise(sample, None)
            snr = kept / (1 - kept)
            weight = 1.0 if objective.snr_gamma is None else min(snr, objective.snr_gamma) / snr
            outputs = objective.denoise(objective.module, noisy, step[None], condition)[0]
            for output in outputs:
                gradients = torch.autograd.grad(output, list(parameters.values()), retain_graph=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    share = 1 / len(outputs) if objective.reduction == "mean" else 1.0
                    total[name] += weight * share * gradient**2
    return {name: value / (len(samples) * TIMESTEPS) for name, value in total.items()}


@pytest.mark.parametrize(("reduction", "snr_gamma"), [("mean", None), ("sum", 0.7)])
def test_the_estimate_is_the_jacobians_diagonal_on_average(samples, reduction, snr_gamma):
    """Squares hold eight signed outputs of two samples each, and of one at the end."""
    objective = Small(snr_gamma=snr_gamma)
    objective.reduction = reduction
    wanted, draws = exact(objective, samples), 600
    parameters = dict(objective.module.named_parameters())
    found = [
        FisherEstimator(objective, parameters, seed=seed, kind="jacobian").estimate(samples) for seed in range(draws)
    ]
    for name, value in wanted.items():
        drawn = torch.stack([one.values[name] for one in found]).double()
        error = drawn.std(0) / math.sqrt(draws)
        assert (drawn.std(0) > 0.05 * value).all()
        # Some thirty numbers: four standard errors are as good as never reached by chance.
        assert ((drawn.mean(0) - value).abs() < 4 * error).all(), name
        assert (error < 0.1 * value).all(), "the test sees deviations of some ten per cent"


@pytest.mark.parametrize("timesteps", [None, 1, 3])
def test_how_timesteps_are_batched_changes_rounding_only(samples, timesteps):
    objective = Small()
    parameters = dict(objective.module.named_parameters())
    first, *others = (
        FisherEstimator(objective, parameters, timesteps, size, kind="jacobian").estimate(samples).values
        for size in (1, 3, 8, 100)
    )
    for other in others:
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-9)


OBJECTIVES = {
    "Stable Diffusion": lambda: objective_for(build_tiny_pipeline()),
    "v-prediction, min-SNR": lambda: objective_for(build_tiny_pipeline("v_prediction"), snr_gamma=5.0),
    "classes": lambda: objective_for(tiny_diffusion()),
    "VAE": lambda: objective_for(tiny_vae()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_small_change_of_a_prediction_weighs_what_the_probes_measure(name):
    objective = OBJECTIVES[name]()
    generator = torch.Generator().manual_seed(0)
    size = objective.resolution
    samples = objective.encode_images(torch.rand(3, 3, size, size, generator=generator) * 2 - 1, 0)
    timesteps = objective.path.strata(min(3, objective.num_train_timesteps), generator).expand(3)
    noise = objective.draw_noise(samples, generator)
    prompts = objective.labels[:3] if objective.labels else ["cat", "dog", ""]
    with torch.no_grad():
        prediction = objective.predict(objective.module, samples, objective.encode_prompts(prompts), timesteps, noise)
    change = 0.01 * torch.randn(prediction.shape, generator=generator)
    wanted = objective.deviation(prediction + change, prediction, timesteps)
    found = (objective.root_weights(prediction, timesteps) * change).square().flatten(1).sum(1)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_predicts_what_noise_on_the_weights_adds_to_the_loss(name):
    """Independent noise on all weights: only the diagonal counts, on average."""
    objective = OBJECTIVES[name]()
    generator = torch.Generator().manual_seed(0)
    size, count = objective.resolution, 12
    prompts = [(objective.labels or ["cat", "dog", "cow"])[number % 3] for number in range(count)]
    images = objective.encode_images(torch.rand(count, 3, size, size, generator=generator) * 2 - 1, 0)
    samples = SampleSet(images, prompts, prompts, list(range(count)))
    parameters = objective.select("full")
    values = FisherEstimator(objective, parameters, min(4, objective.num_train_timesteps), kind="jacobian").estimate(
        samples
    ).values  # fmt: skip
    before = {name: value.detach().clone() for name, value in parameters.items()}
    timesteps = objective.path.strata(min(count, objective.num_train_timesteps), generator).expand(count)
    noise, conditions = objective.draw_noise(images, generator), objective.encode_prompts(prompts)
    rises = []
    with torch.no_grad():
        frozen = objective.predict(objective.module, images, conditions, timesteps, noise)
        for _ in range(30):
            for key, value in parameters.items():
                value.copy_(before[key] + 1e-3 * torch.randn(value.shape, generator=generator))
            moved = objective.predict(objective.module, images, conditions, timesteps, noise)
            rises.append(objective.deviation(moved, frozen, timesteps).mean())
    penalty = 1e-6 * sum(value.sum() for value in values.values())
    assert torch.stack(rises).mean().item() == pytest.approx(penalty.item(), rel=0.3)


@pytest.mark.parametrize("form", ["diagonal", "rows_by_columns"])
@pytest.mark.parametrize("kind", ["gradient", "jacobian"])
def test_an_estimate_that_was_stopped_goes_on_to_the_same_bits(samples, kind, form, tmp_path, monkeypatch):
    objective = Small()

    def estimate():
        estimator = FisherEstimator(objective, "full", 4, 3, kind=kind, form=form)
        return estimator, lambda: estimator.estimate(samples, partial_dir=tmp_path / kind)

    whole = FisherEstimator(objective, "full", 4, 3, kind=kind, form=form).estimate(samples)
    monkeypatch.setattr(estimators.Pace, "due", lambda _: True)
    estimator, run = estimate()
    steps = iter([1, 2])

    def stops(*arguments):
        if next(steps, None) is None:
            raise Interrupted("SIGTERM")
        return FisherEstimator._summed_gradient(estimator, *arguments)

    monkeypatch.setattr(estimator, "_summed_gradient", stops)
    with pytest.raises(Interrupted):
        run()
    estimator, run = estimate()
    again = run()
    assert all(torch.equal(again.values[name], value) for name, value in whole.values.items())
    assert again.passes == whole.passes
    assert whole.passes.backward == 5 * 4


ESTIMATE = """
import os, sys
from sa_diffusers import FisherEstimator, SampleSet

model, folder, *kinds = sys.argv[1:]
for kind in kinds:
    for count in (2, 5):
        samples = SampleSet.load(f"{folder}/samples").subset(list(range(count)))
        information = FisherEstimator(model, "xattn", 4, 3, kind=kind.split("-")[0], form=kind.split("-")[1]).estimate(
            samples
        )
        if os.environ.get("RANK", "0") == "0":
            information.save_pretrained(f"{folder}/{os.environ.get('WORLD_SIZE', '1')}-{kind}-{count}")
"""


def test_processes_share_the_squares_also_where_there_are_fewer(tiny_folder, tmp_path):
    """Of two samples the Jacobian's timesteps have one square in common: two of three processes have nothing to do."""
    generator = torch.Generator().manual_seed(2)
    SampleSet(torch.randn(5, 4, 8, 8, generator=generator), PROMPTS, PROMPTS, list(range(5))).save(tmp_path / "samples")
    kinds = ["gradient-diagonal", "jacobian-diagonal", "gradient-rows_by_columns"]
    arguments = [tiny_folder, tmp_path, *kinds]
    for count in (1, 3):
        result = forked_code(ESTIMATE, tmp_path, environment(tmp_path), *arguments, processes=count)
        assert result.returncode == 0, result.stderr
    for name in [f"{kind}-{count}" for kind in kinds for count in (2, 5)]:
        alone, together = (FisherInformation.from_pretrained(tmp_path / f"{count}-{name}") for count in (1, 3))
        assert alone.passes == together.passes
        assert alone.passes.backward == 4 * int(name[-1])
        for key, value in alone.values.items():
            torch.testing.assert_close(together.values[key], value, rtol=1e-4, atol=1e-6 * float(value.max()))


def test_the_kind_is_on_record_and_another_is_refused(tiny_settings, tmp_path):
    def erasure(fisher=None, **changes):
        return Erasure(SelectiveAmnesiaConfig(**{**tiny_settings, **changes}), fisher=fisher)

    kinds = ("gradient", "jacobian")
    made = {kind: erasure(fisher_kind=kind).fisher() for kind in kinds}
    assert [made[kind].config["fisher_kind"] for kind in kinds] == list(kinds)
    assert "| `fisher_kind` | `jacobian` |" in made["jacobian"].model_card("fisher")
    assert erasure().fisher_stage.folder == erasure(fisher_kind="gradient").fisher_stage.folder
    assert "3 samples x 4 timesteps, jacobian; reused: " in erasure(fisher_kind="jacobian").plan()
    for kind, other in (kinds, kinds[::-1]):
        made[kind].save_pretrained(tmp_path / kind)
        assert erasure(str(tmp_path / kind), fisher_kind=kind).fisher().config == made[kind].config
        with pytest.raises(ValueError, match=rf"the kind of Fisher .*fisher_kind: '{kind}', this run: '{other}'"):
            erasure(str(tmp_path / kind), fisher_kind=other)
    # What was made before there were two kinds does not say.
    recorded = {name: value for name, value in made["gradient"].config.items() if name != "fisher_kind"}
    earlier = FisherInformation(made["gradient"].values, recorded)
    assert erasure(earlier).fisher() is earlier
    with pytest.raises(ValueError, match="the kind of Fisher information"):
        erasure(earlier, fisher_kind="jacobian")


def test_a_loss_that_is_no_squared_error_has_no_jacobian_unless_its_family_says_more():
    with pytest.raises(ValueError, match='fisher_kind="jacobian": the loss of this model is no squared error'):
        FisherEstimator(Categorical(), "full", kind="jacobian")
    assert FisherEstimator(tiny_vae(), "full", kind="jacobian").kind == "jacobian"
    with pytest.raises(ValueError, match='kind="hessian" is not one of "gradient", "jacobian"'):
        FisherEstimator(Categorical(), "full", kind="hessian")
