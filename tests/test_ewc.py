import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sa_diffusers import ElasticWeightConsolidation


@pytest.fixture
def moved():
    """A module, random Fisher information, and the module moved away from theta*."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    parameters = dict(module.named_parameters())
    fisher = {name: torch.rand(p.shape, generator=generator) for name, p in parameters.items()}
    ewc = ElasticWeightConsolidation(parameters, fisher, weight=50.0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += torch.randn(parameter.shape, generator=generator)
    return module, parameters, fisher, ewc


def explicit_penalty(parameters, fisher, anchor, weight):
    return weight * sum((fisher[name] * (p - anchor[name]) ** 2).sum() for name, p in parameters.items())


def test_gradient_equals_autograd_and_adds_to_what_is_there(moved):
    module, parameters, fisher, ewc = moved
    module(torch.ones(5, 3)).sum().backward()
    before = {name: p.grad.clone() for name, p in parameters.items()}
    ewc.add_gradient_()
    expected = torch.autograd.grad(explicit_penalty(parameters, fisher, ewc.anchor, 50.0), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad - before[name], gradient, rtol=1e-5, atol=1e-5)


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU would: tensors of two devices in one operation. `meta` does not."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        places = {value.device for value in arguments if isinstance(value, torch.Tensor) and value.dim()}
        assert len(places) < 2, function
        return function(*arguments, **(named or {}))


def test_fisher_information_that_rests_on_the_cpu_comes_to_the_weights():
    parameters = dict(nn.Linear(3, 4, device="meta").named_parameters())
    fisher = {name: torch.ones(value.shape) for name, value in parameters.items()}
    ewc = ElasticWeightConsolidation(parameters, fisher, 50.0, on_cpu=True)
    assert all(values.data_ptr() == fisher[name].data_ptr() for name, values in ewc.fisher.items())
    with OneDevice():
        assert ewc.penalty().device.type == "meta"
        ewc.add_gradient_()
    assert {value.grad.device.type for value in parameters.values()} == {"meta"}


def test_gradient_is_made_where_there_was_none(moved):
    _, parameters, fisher, ewc = moved
    ewc.add_gradient_()
    expected = torch.autograd.grad(explicit_penalty(parameters, fisher, ewc.anchor, 50.0), list(parameters.values()))
    for parameter, gradient in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_weight_multiplies_the_whole_sum_without_a_half():
    """Moving one parameter by 1 where F is 1 costs exactly the weight: the authors' convention, half the paper's."""
    module = nn.Linear(1, 1, bias=False)
    ewc = ElasticWeightConsolidation(dict(module.named_parameters()), {"weight": torch.ones(1, 1)}, weight=50.0)
    with torch.no_grad():
        module.weight += 1
    assert ewc.penalty().item() == pytest.approx(50.0)


def test_penalty_is_zero_at_the_start_and_equals_the_sum_later(moved):
    _, parameters, fisher, ewc = moved
    torch.testing.assert_close(ewc.penalty(), explicit_penalty(parameters, fisher, ewc.anchor, 50.0).detach())
    fresh = ElasticWeightConsolidation(parameters, fisher, 50.0)
    assert fresh.penalty() == 0


def test_anchor_stays_when_the_parameters_move(moved):
    _, parameters, _, ewc = moved
    assert not any(torch.equal(ewc.anchor[name], p) for name, p in parameters.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fisher: fisher.pop("0.weight"), "no Fisher information for 0.weight"),
        (lambda fisher: fisher.update({"0.weight": torch.ones(1)}), "belongs to another model"),
    ],
)
def test_fisher_of_another_model_is_refused(moved, change, message):
    _, parameters, fisher, _ = moved
    change(fisher)
    with pytest.raises(ValueError, match=message):
        ElasticWeightConsolidation(parameters, fisher, 1.0)
