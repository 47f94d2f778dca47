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
