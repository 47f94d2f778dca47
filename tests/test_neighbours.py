"""What lies near a concept: found by what the first steps move, replayed more often, probed prompt by prompt."""

import copy
import shutil

import pytest
import torch
from accelerate import Accelerator

from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.erasure import Erasure
from sa_diffusers.processes import Interrupted
from sa_diffusers.training.batches import BatchPolicy
from sa_diffusers.training.neighbours import drifts, farthest
from sa_diffusers.training.probes import ProbeSet

from .test_probed_erasures import config_of, trained
from .test_probes import controlled, samples, weights


class Sampled:
    """Samples that a test has at hand, and what they were asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def replay(self, prompts) -> SampleSet | None:
        self.asked.append(list(prompts))
        return samples(4, list(prompts), list(prompts), 20) if prompts else None

    def probes(self, prompts) -> list[ProbeSet]:
        self.asked.append(list(prompts))
        return [ProbeSet(text, "neighbour", samples(2, [text], [text], 30).samples, [text] * 2, [text] * 2)
                for text in prompts]  # fmt: skip


def near(output_dir=None, **settings):
    training = controlled(output_dir, **settings)
    training._neighbours = Sampled()
    return training


def test_what_the_first_steps_move_most_is_found(tiny_objective):
    """As a plain loop over whole copies of the model says."""
    replay = samples(6, ["a cow", "a pig", ""], ["a cow", "a pig", ""], 11)
    module = tiny_objective.module.eval()
    moved = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if "attn2.to_k" in name:
                parameter.add_(0.5)
    found = drifts(tiny_objective, moved, module, replay.samples, replay.conditions, Accelerator(cpu=True))
    assert set(found) == {"a cow", "a pig"}
    generator = torch.Generator().manual_seed(0)
    timesteps = tiny_objective.path.strata(6, generator)
    noise = tiny_objective.draw_noise(replay.samples[:1].expand(6, *replay.samples.shape[1:]), generator)
    for prompt in found:
        values = []
        for row in (row for row, text in enumerate(replay.conditions) if text == prompt):
            for place, timestep in enumerate(timesteps):
                noised = tiny_objective.pipeline.scheduler.add_noise(
                    replay.samples[row][None], noise[place][None], timestep[None]
                )
                text = tiny_objective.encode_prompts([prompt])["encoder_hidden_states"]
                with torch.no_grad():
                    pair = [net(noised, timestep[None], encoder_hidden_states=text).sample for net in (moved, module)]
                values.append((pair[0] - pair[1]).square().mean().item())
        assert found[prompt] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert found["a cow"] != found["a pig"]
    assert farthest({"a": 1.0, "b": 3.0, "c": 2.0, **{f"{n}": 0.0 for n in range(5)}}) == ["b", "c"]
    # Of few prompts, as of classes, as many are told one by one as were asked for.
    assert farthest({"a": 1.0, "b": 3.0, "c": 2.0}, 5) == ["b", "c", "a"]


def test_near_samples_take_their_share_of_every_step(tiny_objective):
    replay = samples(50, ["a cow"], ["a cow"], 11)
    policy = BatchPolicy(tiny_objective, samples(8, ["cat"], ["dog"], 10), replay, 100)
    policy.replay_too(samples(2, ["a cow"], ["a cow"], 12), 0.3)
    rows = [row for step in range(20) for row in policy._draw(step).rows[1]]
    share = sum(row >= 50 for row in rows) / len(rows)
    assert 0.25 < share < 0.35
    assert set(rows) == set(range(52))
    again = BatchPolicy(tiny_objective, samples(8, ["cat"], ["dog"], 10), replay, 100)
    again.replay_too(samples(2, ["a cow"], ["a cow"], 12), 0.3)
    assert again._draw(7).rows == policy._draw(7).rows


def test_what_is_near_is_replayed_and_probed():
    training = near(max_train_steps=12)
    training.train()
    state = training.controller.state
    assert state.near and state.probed
    assert training._neighbours.asked == [state.near, state.probed]
    # The surrogate has samples of its own.
    assert "dog" not in state.near
    assert set(state.probed) <= set(training.controller.probes.remembered.prompts)
    assert "drift_neighbours" in state.readings[0]


def test_a_run_with_one_prompt_to_remember_has_no_neighbours_to_probe():
    training = near(max_train_steps=2)
    only = training.controller.probes.remembered
    only.prompts[:] = ["a cow"] * len(only)
    training.train()
    assert training.controller.state.probed == []
    assert training._neighbours.asked == [training.controller.state.near]


def test_a_run_that_has_the_surrogate_alone_to_remember_finds_nothing_near():
    """As of two classes, one of which becomes the other."""
    training = near(max_train_steps=2)
    training.replay.conditions[:] = ["dog"] * len(training.replay)
    training.train()
    assert training.controller.state.near == []


@pytest.mark.long
def test_a_resumed_run_replays_and_probes_the_same(tmp_path):
    whole = near(tmp_path / "whole", max_train_steps=20)
    whole.train()
    stopping = near(tmp_path / "broken", max_train_steps=20, checkpointing_steps=9)

    def interrupt(state):
        if state.step == 13:
            raise KeyboardInterrupt

    stopping.callbacks = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        stopping.train()
    again = near(tmp_path / "broken", max_train_steps=20, checkpointing_steps=9)
    again.train()
    assert again.controller.state == whole.controller.state
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


def test_a_run_goes_on_where_its_near_samples_are_gone(tiny_folder, tmp_path):
    """They are of the base model, whatever the weights of the checkpoint are."""
    settings = {"max_train_steps": 6, "checkpointing_steps": 3, "forget_target": None}
    whole = trained(Erasure(config_of(tiny_folder, tmp_path, "whole", **settings)))

    def stop(state):
        if state.step == 4:
            raise Interrupted("a test")

    broken = Erasure(config_of(tiny_folder, tmp_path, "broken", **settings), callbacks=[stop])
    with pytest.raises(Interrupted):
        trained(broken)
    kept = [folder for folder in (tmp_path / "artifacts").iterdir() if folder.name.startswith("neighbours-")]
    assert len(kept) == 1
    shutil.rmtree(kept[0])
    again = trained(Erasure(config_of(tiny_folder, tmp_path, "broken", **settings)))
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    assert kept[0].is_dir()


def test_without_further_images_neighbours_are_probed_all_the_same(tiny_folder, tmp_path):
    erasure = Erasure(config_of(tiny_folder, tmp_path, num_neighbour_images=0, forget_target=None))
    assert "further replay images" not in erasure.plan()
    training = trained(erasure)
    assert training.controller.state.probed
    assert not [folder for folder in (tmp_path / "artifacts").iterdir() if folder.name.startswith("neighbours-")]
