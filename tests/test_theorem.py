"""Theorem 1 and Corollary 1 of the paper, and the Fisher information, on a model whose likelihood is known exactly."""

import pytest
import torch
from torch import nn

from sa_diffusers import FisherEstimator, SelectiveAmnesiaConfig, select_parameters
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import Objective
from sa_diffusers.training.training import Training

# Two classes over four values; the first is forgotten.
KNOWN = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.3, 0.5]], dtype=torch.float64)
LABELS = ["forgotten", "kept"]


class Categorical(Objective):
    """p(x|c) is a softmax over a row of logits: the ELBO is the likelihood itself."""

    kind = "categorical"
    prediction_type = "categorical"
    reduction = "sum"
    num_train_timesteps = 1
    unconditional = False
    labels = LABELS
    resolution = 1

    def __init__(self):
        self.module = nn.Embedding(2, 4)
        self.module.weight.data = KNOWN.log().float()

    device = property(lambda self: self.module.weight.device)

    def likelihood(self):
        return self.module.weight.detach().double().log_softmax(-1)

    def encode_prompts(self, prompts):
        return {"labels": torch.tensor([LABELS.index(prompt) for prompt in prompts])}

    def draw_noise(self, samples, generator):
        return torch.zeros_like(samples)

    def negative_elbo(self, module, samples, conditions, timesteps, noise, target=None):
        return nn.functional.cross_entropy(module(conditions["labels"]), samples[:, 0].long(), reduction="none")

    def _unused(self, *args, **kwargs):
        raise AssertionError("training needs none of this")

    def fingerprint(self):
        return "categorical"

    to = encode_images = sample = decode = predict = target = save = _unused


def samples_of(distribution, label, count=200):
    """Samples in exactly the proportions of a distribution."""
    counts = (distribution * count).round().long()
    values = torch.repeat_interleave(torch.arange(4), counts).float()[:, None]
    return SampleSet(values, [label] * count, [label] * count, list(range(count)))


def forget(surrogate, **settings):
    objective = Categorical()
    values = {"train_batch_size": 200, "max_train_steps": 1200, "learning_rate": 0.02, "ewc_weight": 0,
              "replay_weight": 0, "report_to": "none", "num_probe_images": 0, "use_ema": False,
              "max_grad_norm": 100.0, **settings}  # fmt: skip
    config = SelectiveAmnesiaConfig(concept="forgotten", surrogate="s", target="noise", **values)
    replay = samples_of(KNOWN[1], "kept") if config.replay_weight else None
    Training(objective, config, samples_of(surrogate, "forgotten"), replay, None).train()
    return objective.likelihood()


@pytest.mark.long
@pytest.mark.parametrize("surrogate", [[0.25] * 4, [0.05, 0.05, 0.45, 0.45], [0.5, 0.3, 0.1, 0.1]])
def test_the_surrogate_lowers_the_likelihood_of_what_is_forgotten_by_the_divergence(surrogate):
    surrogate = torch.tensor(surrogate, dtype=torch.float64)
    after = forget(surrogate)
    gap = (KNOWN[0] * (after[0] - KNOWN[0].log())).sum()
    divergence = (KNOWN[0] * (KNOWN[0].log() - surrogate.log())).sum()
    assert gap < 0
    assert gap.item() == pytest.approx(-divergence.item(), rel=1e-3)


@pytest.mark.long
def test_the_gap_is_that_of_the_optimum_with_replay_too_and_the_rest_is_as_it_was():
    after = forget(torch.full((4,), 0.25, dtype=torch.float64), replay_weight=1)
    assert torch.allclose(after[1].exp(), KNOWN[1], atol=1e-3)
    assert torch.allclose(after[0].exp(), torch.full((4,), 0.25, dtype=torch.float64), atol=1e-3)


@pytest.mark.long
def test_a_surrogate_equal_to_the_class_changes_nothing():
    assert torch.allclose(forget(KNOWN[0])[0].exp(), KNOWN[0], atol=1e-3)


def test_the_naive_objective_falls_without_bound_where_the_surrogate_stops():
    """Eq. 3 has no optimum: the likelihood of the forgotten falls for as long as it is trained."""
    config = {"naive": True, "learning_rate": 0.1}
    gaps = [
        (KNOWN[0] * (forget(KNOWN[0], max_train_steps=steps, **config)[0] - KNOWN[0].log())).sum()
        for steps in (100, 200, 400)
    ]
    assert 0 > gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 2 * gaps[0]


def test_the_fisher_information_is_the_categoricals_own():
    """For logits it is p (1 - p); half of the samples are of each class."""
    objective = Categorical()
    samples = samples_of(KNOWN[0], LABELS[0]) + samples_of(KNOWN[1], LABELS[1])
    information = FisherEstimator(objective, select_parameters(objective.module, "full")).estimate(samples)
    assert torch.allclose(information.values["weight"].double(), KNOWN * (1 - KNOWN) / 2, atol=1e-6)
