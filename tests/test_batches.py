"""Which samples, conditions and targets each step gets: the batch policy by itself."""

import dataclasses

import pytest
import torch

from sa_diffusers.training.batches import BatchPolicy
from sa_diffusers.training.trainable import FullWeights

from .test_trainer import condition, samples, trainer_for


def policy(replay=True, **settings):
    trainer = trainer_for()
    noise = samples(2, ["cat"], ["uniform_noise"], 2)
    strangers = dataclasses.replace(samples(2, ["cat"], ["dog"], 3), sources=[None, None])
    surrogates = samples(2, ["cat"], ["dog"], 0) + noise + strangers
    given = trainer.replay if replay else None
    return trainer.objective, BatchPolicy(trainer.objective, surrogates, given, 6, **settings)


def under(objective, batch):
    """The prompts that a batch's conditions are of."""
    known = {prompt: condition(objective, prompt) for prompt in ("", "cat", "dog", "cow", "pig")}
    found = batch.conditions["encoder_hidden_states"]
    return [next(name for name, value in known.items() if torch.allclose(value, row)) for row in found]


def test_of_so_many_drawn_timesteps_the_noisiest_is_taken():
    means = []
    for draws in (1, 2, 4):
        _, batches = policy(timestep_draws=draws)
        batches.size = 500
        drawn = batches._draw(0).timesteps
        means.append(torch.cat(drawn).float().mean().item())
        parts = [batches.batch(1, part).timesteps for part in (slice(0, 250), slice(250, 500))]
        whole = batches.batch(1, slice(0, 500)).timesteps
        assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    last = batches.objective.num_train_timesteps - 1
    # The mean of the largest of k uniform numbers is k / (k + 1).
    assert means == pytest.approx([last / 2, last * 2 / 3, last * 4 / 5], rel=0.04)


def test_batches_are_a_function_of_the_step_whatever_their_split():
    objective, batches = policy(condition_dropout=0.5)
    whole = batches.batch(3, slice(0, 6))
    batches.batch(4, slice(0, 6))
    parts = [batches.batch(3, slice(start, start + 2)) for start in (0, 2, 4)]
    assert [part.surrogates for part in parts] == [2, 2, 2]
    for name in ("samples", "noise", "timesteps"):
        first = torch.cat([getattr(part, name)[:2] for part in parts])
        last = torch.cat([getattr(part, name)[2:] for part in parts])
        assert torch.equal(torch.cat([first, last]), getattr(whole, name)), name


def test_a_teacher_teaches_what_a_prompt_drew_and_nothing_else():
    objective, batches = policy()
    teacher = FullWeights(objective.module, objective.select("full")).teacher
    batch = batches.batch(0, slice(0, 6), teacher)
    assert batches.batch(0, slice(0, 6)).target is None
    rows = batches.order(6, 0, "surrogate")
    prompts = ["dog" if row < 2 else None for row in rows] + under(objective, batch)[6:]
    for place, prompt in enumerate(prompts):
        if prompt is None:
            expected = batch.noise[place]
        else:
            words = {"encoder_hidden_states": condition(objective, prompt)[None]}
            one = slice(place, place + 1)
            with torch.no_grad():
                expected = objective.predict(
                    objective.module, batch.samples[one], words, batch.timesteps[one], batch.noise[one]
                )[0]
        torch.testing.assert_close(batch.target[place], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_dropped_conditions(taught, keeps):
    objective, batches = policy(condition_dropout=1.0, keeps_surrogates=keeps)
    teacher = FullWeights(objective.module, objective.select("full")).teacher if taught else None
    batch = batches.batch(0, slice(0, 6), teacher)
    prompts = under(objective, batch)
    assert prompts[6:] == [""] * 6
    for row, prompt in zip(batches.order(6, 0, "surrogate"), prompts, strict=False):
        drawn_by_prompt = row < 2
        dropped = not keeps and (taught or not drawn_by_prompt)
        assert prompt == ("" if dropped else "cat"), row


def own_policy(wanted, **settings):
    """A concept's own samples among the surrogates, which are to become a dog or noise."""
    trainer = trainer_for()
    mixed = dataclasses.replace(samples(6, ["cat"], ["dog"], 0), sources=[wanted] * 6, drawn=[wanted, "cat"] * 3)
    return trainer.objective, BatchPolicy(trainer.objective, mixed, trainer.replay, 6, **settings)


def test_what_the_surrogate_asks_for_is_taught_on_the_concepts_own_samples_too():
    objective, batches = own_policy("dog")
    teacher = FullWeights(objective.module, objective.select("full")).teacher
    batch = batches.batch(0, slice(0, 6), teacher)
    assert under(objective, batch)[:6] == ["cat"] * 6
    words = {"encoder_hidden_states": condition(objective, "dog").expand(6, -1, -1)}
    with torch.no_grad():
        expected = objective.predict(
            objective.module, batch.samples[:6], words, batch.timesteps[:6], batch.noise[:6]
        )  # fmt: skip
    torch.testing.assert_close(batch.target[:6], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["dog", "uniform_noise"])
def test_without_a_condition_a_concepts_own_sample_keeps_the_empty_prompts_answer(wanted):
    """Else the empty prompt learns that what looks like a cat is noise, and guidance pushes back to the cat."""
    objective, batches = own_policy(wanted, condition_dropout=1.0)
    teacher = FullWeights(objective.module, objective.select("full")).teacher
    batch = batches.batch(0, slice(0, 6), teacher)
    rows = batches.order(6, 0, "surrogate")
    words = {"encoder_hidden_states": condition(objective, "")[None]}
    for place, row in enumerate(rows):
        assert under(objective, batch)[place] == ""
        one = slice(place, place + 1)
        with torch.no_grad():
            answer = objective.predict(
                objective.module, batch.samples[one], words, batch.timesteps[one], batch.noise[one]
            )[0]
        is_taught = torch.allclose(batch.target[place], answer, rtol=1e-4, atol=1e-5)
        assert is_taught == (wanted == "dog" or row % 2 == 1), row
