import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from sa_diffusers import (
    FisherEstimator,
    FisherInformation,
    SampleSet,
    SelectiveAmnesiaConfig,
    objective_for,
    select_parameters,
)
from sa_diffusers.environment import create_accelerator
from sa_diffusers.files import write_json
from sa_diffusers.output_folder import OutputFolder
from sa_diffusers.publish import build_model_card
from sa_diffusers.training.batches import BatchPolicy
from sa_diffusers.training.loop import Loop
from sa_diffusers.training.trainable import FullWeights
from sa_diffusers.training.training import Training

from .conftest import BY_HAND, build_tiny_pipeline

BASE = {
    "max_train_steps": 4,
    "train_batch_size": 2,
    **BY_HAND,
    "report_to": "none",
    "logging_steps": 1,
    "num_inference_steps": 2,
    "ewc_weight": 1e-3,
    "target": "noise",
}


def samples(count: int, conditions: list[str], sources: list[str], seed: int) -> SampleSet:
    generator = torch.Generator().manual_seed(seed)
    return SampleSet(
        torch.randn(count, 4, 8, 8, generator=generator),
        [conditions[i % len(conditions)] for i in range(count)],
        [sources[i % len(sources)] for i in range(count)],
        list(range(count)),
    )


def trainer_for(output_dir=None, prediction_type="epsilon", **settings) -> Training:
    config = SelectiveAmnesiaConfig(**{**BASE, **settings})
    objective = objective_for(
        build_tiny_pipeline(prediction_type), snr_gamma=config.snr_gamma, noise_offset=config.noise_offset
    )
    surrogates, replay = samples(5, ["cat"], ["dog"], 0), samples(7, ["cow", "pig"], ["cow", "pig"], 1)
    accelerator = create_accelerator(config)
    parameters = select_parameters(objective.module, config.train_method)
    fisher = FisherEstimator(objective, parameters, 3, accelerator=accelerator).estimate(replay)
    return Training(objective, config, surrogates, replay, fisher, accelerator, output_dir)


class Calls:
    """A callback of a function."""

    def __init__(self, function):
        self.after_step = function


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.objective.module.state_dict().items()}


def assert_equal(first, second):
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_different(first, second):
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["full", "xattn", "noxattn", r"\.attn1\."])
def test_what_is_selected_moves_and_nothing_else(method):
    trainer = trainer_for(train_method=method)
    before = weights(trainer)
    flags = [parameter.requires_grad for parameter in trainer.objective.module.parameters()]
    trainer.train()
    after = weights(trainer)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in trainer.parameters), name
    assert [parameter.requires_grad for parameter in trainer.objective.module.parameters()] == flags


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("target", ["noise", "frozen"])
def test_seeds_reproduce_a_run_bit_for_bit(prediction_type, target):
    first, second, other = (
        trainer_for(prediction_type=prediction_type, target=target, seed=seed) for seed in (3, 3, 4)
    )
    histories = [trainer.train() for trainer in (first, second, other)]
    assert_equal(weights(first), weights(second))
    assert histories[0] == histories[1]
    assert_different(weights(first), weights(other))


@pytest.mark.parametrize("settings", [{}, {"use_ema": True, "ema_decay": 0.5}, {"lr_scheduler": "cosine"}])
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path, settings):
    unbroken = trainer_for(tmp_path / "a", max_train_steps=4, checkpointing_steps=2, **settings)
    history = unbroken.train()
    resumed = trainer_for(
        tmp_path / "a", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest", **settings
    )
    assert resumed.train() == history
    assert_equal(weights(unbroken), weights(resumed))


def test_checkpoints_are_limited(tmp_path):
    trainer_for(tmp_path, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_resuming_from_nothing(tmp_path):
    with pytest.raises(ValueError, match='"checkpoint-9" is not a checkpoint folder'):
        trainer_for(tmp_path, resume_from_checkpoint="checkpoint-9").train()
    assert len(trainer_for(tmp_path, resume_from_checkpoint="latest").train()) == 4


def test_the_first_step_follows_eq_4():
    """One step of plain gradient descent on the explicit sum of the three terms, by autograd. At theta* the penalty has
    no gradient; `test_two_steps_follow_eq_4_by_hand` is for that."""
    settings = {"max_train_steps": 1, "replay_weight": 0.7, "max_grad_norm": 1e9, "ewc_weight": 3.0}
    trainer = trainer_for(**settings)
    objective, parameters = trainer.objective, trainer.parameters
    anchor = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses = trainer.batches().batch(0, slice(0, 2)).losses(objective, objective.module)
    penalty = sum((trainer.fisher.values[name] * (p - anchor[name]) ** 2).sum() for name, p in parameters.items())
    objective_value = losses[0] + 0.7 * losses[1] + 3.0 * penalty
    gradients = torch.autograd.grad(objective_value, list(parameters.values()), allow_unused=True)
    reference = {name: p.detach().clone() for name, p in parameters.items()}
    trainer._optimizer = lambda: torch.optim.SGD(list(parameters.values()), lr=0.1)
    trainer.train()
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(parameter, reference[name] - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_accumulation_equals_one_large_batch_of_the_same_draws():
    single = trainer_for(train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=2)
    history = single.train()
    first, second = (single_loss(single, micro) for micro in (0, 1))
    assert history[0]["surrogate_loss"] == pytest.approx((first + second) / 2, rel=1e-4)


def single_loss(trained, micro):
    fresh = trainer_for(train_batch_size=2, gradient_accumulation_steps=2)
    batch = fresh.batches().batch(0, slice(2 * micro, 2 * micro + 2))
    return batch.losses(fresh.objective, fresh.objective.module)[0].item()


def test_every_sample_is_seen_once_an_epoch():
    trainer = trainer_for(train_batch_size=2)
    batches = trainer.batches()
    seen = [row for step in range(6) for row in batches.order(6, step, "replay")]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_frozen_target_starts_with_no_pull_from_replay():
    """At theta* the model already predicts what it predicted: replay costs nothing, forgetting does."""
    history = trainer_for(target="frozen", max_train_steps=1).train()
    assert history[0]["replay_loss"] == pytest.approx(0, abs=1e-10)
    assert history[0]["surrogate_loss"] > 1e-6


def test_the_naive_objective_raises_the_loss_that_it_is_given():
    naive, surrogate = trainer_for(naive=True, max_train_steps=30), trainer_for(max_train_steps=30)
    down, up = naive.train(), surrogate.train()
    assert down[0]["surrogate_loss"] == pytest.approx(-up[0]["surrogate_loss"])
    # The same samples, noise and timesteps at the last step.
    assert -down[-1]["surrogate_loss"] > up[-1]["surrogate_loss"] + 0.1


def test_frozen_target_keeps_the_noise_where_no_prompt_drew_the_image():
    trainer = trainer_for(target="frozen", max_train_steps=1)
    trainer.surrogates = dataclasses.replace(trainer.surrogates, sources=[None] * len(trainer.surrogates))
    loss = trainer.train()[0]["surrogate_loss"]
    assert loss == pytest.approx(trainer_for(target="noise", max_train_steps=1).train()[0]["surrogate_loss"])


def test_condition_dropout_turns_surrogates_into_replay_of_the_empty_prompt_under_the_frozen_target_alone():
    """The frozen model's own prediction for the empty prompt costs nothing at the start; the noise's would."""
    settings = {"condition_dropout": 0.999999, "max_train_steps": 1}
    assert trainer_for(target="frozen", **settings).train()[0]["surrogate_loss"] == pytest.approx(0, abs=1e-10)
    dropped = trainer_for(**settings).train()[0]
    plain = trainer_for(max_train_steps=1).train()[0]
    assert dropped["surrogate_loss"] == pytest.approx(plain["surrogate_loss"])
    assert dropped["replay_loss"] != pytest.approx(plain["replay_loss"], rel=1e-6)


@pytest.mark.parametrize("target", ["noise", "frozen"])
def test_condition_dropout_teaches_the_empty_prompt_what_no_prompt_drew(target):
    """Guidance would push away from noise that the empty prompt does not know."""

    def loss(prompt, **settings):
        trainer = trainer_for(target=target, max_train_steps=1, **settings)
        count = len(trainer.surrogates)
        trainer.surrogates = dataclasses.replace(
            trainer.surrogates, conditions=[prompt] * count, sources=[None] * count
        )
        return trainer.train()[0]["surrogate_loss"]

    dropped = loss("cat", condition_dropout=0.999999)
    assert dropped == pytest.approx(loss(""), rel=1e-6)
    assert dropped != pytest.approx(loss("cat"), rel=1e-6)
    assert loss("cat", condition_dropout=0.999999, naive=True) == pytest.approx(-loss("cat"), rel=1e-6)


def test_a_strong_ewc_weight_holds_the_weights():
    def distance(weight):
        trainer = trainer_for(ewc_weight=weight, replay_weight=0, max_train_steps=30, learning_rate=1e-3)
        before = weights(trainer)
        trainer.train()
        fisher = trainer.fisher.values if trainer.fisher else None
        after = weights(trainer)
        return sum((before[name] - after[name]).square().sum() for name in before), fisher

    assert distance(1e3)[0] < distance(0)[0]


def test_ablations_need_no_replay_and_no_fisher():
    config = SelectiveAmnesiaConfig(**{**BASE, "ewc_weight": 0, "replay_weight": 0})
    trainer = Training(objective_for(build_tiny_pipeline()), config, samples(3, ["cat"], ["dog"], 0), None, None)
    history = trainer.train()
    assert {row["replay_loss"] for row in history} == {0.0} == {row["ewc_penalty"] for row in history}


def test_missing_parts_are_named():
    objective = objective_for(build_tiny_pipeline())
    surrogates = samples(3, ["cat"], ["dog"], 0)
    with pytest.raises(ValueError, match="needs Fisher information"):
        Training(objective, SelectiveAmnesiaConfig(**BASE), surrogates, surrogates, None)
    with pytest.raises(ValueError, match="needs replay samples"):
        Training(objective, SelectiveAmnesiaConfig(**BASE), surrogates, None, FisherInformation({}, {}))


def test_ema_keeps_the_average():
    plain, averaged = trainer_for(), trainer_for(use_ema=True, ema_decay=0.9)
    start = weights(plain)
    plain.train(), averaged.train()
    moved = sum((weights(plain)[name] - start[name]).abs().sum() for name in start)
    kept = sum((weights(averaged)[name] - start[name]).abs().sum() for name in start)
    assert 0 < kept < moved


def test_an_average_without_warm_up_is_continued_from_the_base_model():
    """The original's decay of .9999 acts from the first step on; with warm-up it never does in a run of ours."""
    plain, averaged = trainer_for(), trainer_for(use_ema=True, ema_decay=0.9, ema_warmup=False)
    start, steps = weights(plain), []
    plain.callbacks = [Calls(lambda state: steps.append({n: v.detach().clone() for n, v in state.parameters.items()}))]
    plain.train(), averaged.train()
    expected = dict(start)
    for step in steps:
        expected = {name: 0.9 * expected[name] + 0.1 * step[name] for name in step}
    for name, value in weights(averaged).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_fisher_information_of_another_model_is_refused():
    trainer = trainer_for()
    other = objective_for(build_tiny_pipeline())
    with torch.no_grad():
        next(other.module.parameters()).add_(1)
    config = SelectiveAmnesiaConfig(**BASE)
    with pytest.raises(ValueError, match="differs in the weights that it was computed from"):
        Training(other, config, trainer.surrogates, trainer.replay, trainer.fisher)


def test_a_second_training_of_the_same_trainer_is_refused():
    """Its anchor would be the erased weights."""
    trainer = trainer_for()
    trainer.train()
    before = weights(trainer)
    with pytest.raises(ValueError, match="has trained already"):
        trainer.train()
    assert_equal(before, weights(trainer))


def test_an_exception_leaves_the_module_as_it_was():
    trainer = trainer_for(gradient_checkpointing=True, learning_rate=1e30, max_train_steps=20)
    with pytest.raises(FloatingPointError):
        trainer.train()
    module = trainer.objective.module
    assert not module.training and not module.is_gradient_checkpointing
    assert not hasattr(module, "_original_forward")


def test_a_model_in_half_precision_is_refused():
    trainer = trainer_for()
    trainer.objective.module.half()
    with pytest.raises(ValueError, match="is torch.float16: load the model in float32"):
        Training(trainer.objective, trainer.config, trainer.surrogates, trainer.replay, trainer.fisher)


def test_a_gradient_that_is_not_finite_leaves_the_step_out(monkeypatch):
    """Weights, moments and average stay as they were; the others go on as without it."""
    trainer = trainer_for(max_train_steps=4, use_ema=True)
    backward, seen = Loop.backward, []

    def broken(*arguments):
        losses = backward(*arguments)
        seen.append(weights(trainer))
        if len(seen) == 2:
            next(iter(trainer.parameters.values())).grad.fill_(float("nan"))
        return losses

    monkeypatch.setattr(Loop, "backward", broken)
    trainer.train()
    assert trainer.skipped == 1
    assert_equal(seen[1], seen[2])
    assert_different(seen[0], seen[1])
    assert_different(seen[2], seen[3])


def test_memory_that_runs_out_halves_the_batch_and_keeps_the_steps(monkeypatch):
    plain, short = trainer_for(train_batch_size=4), trainer_for(train_batch_size=4)
    batch, sizes = BatchPolicy.batch, []

    def starved(policy, step, part, teacher):
        sizes.append(part.stop - part.start)
        if part.stop - part.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch(policy, step, part, teacher)

    first = plain.train()
    monkeypatch.setattr(BatchPolicy, "batch", starved)
    second = short.train()
    assert sizes[:3] == [4, 2, 1] and set(sizes[3:]) == {1}
    assert [row["surrogate_loss"] for row in first] == pytest.approx(
        [row["surrogate_loss"] for row in second], rel=1e-4
    )


@pytest.mark.parametrize("split", [(1, 4), (2, 2), (4, 1)])
def test_any_split_of_the_global_batch_takes_the_same_steps(split):
    batch, accumulation = split
    history = trainer_for(train_batch_size=batch, gradient_accumulation_steps=accumulation).train()
    whole = trainer_for(train_batch_size=4).train()
    for name in ("surrogate_loss", "replay_loss", "ewc_penalty"):
        assert [row[name] for row in history] == pytest.approx([row[name] for row in whole], rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"snr_gamma": 5.0},
        {"noise_offset": 0.1},
        {"adam_weight_decay": 0.1},
        {"lr_scheduler": "linear", "lr_warmup_steps": 2},
        {"scale_lr": True},
        {"max_grad_norm": 1e-3},
        {"adam_beta1": 0.1},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1.0},
        {"replay_weight": 5.0},
        {"condition_dropout": 0.9},
        {"mixed_precision": "bf16"},
    ],
)
def test_settings_change_the_outcome(settings):
    plain = trainer_for()
    plain.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    changed = trainer_for(**settings)
    changed.train()
    assert_different(weights(plain), weights(changed))


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, checkpointed = trainer_for(), trainer_for(gradient_checkpointing=True)
    plain.train(), checkpointed.train()
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, weights(checkpointed)[name], rtol=1e-4, atol=1e-5)
    assert not checkpointed.objective.module.is_gradient_checkpointing


@pytest.mark.parametrize("fits", [8, 1])
def test_validation_images_are_written_during_training(tmp_path, monkeypatch, fits):
    """Also where memory does not hold as many at once as before the training."""
    settings = {"validation_prompts": ["cat", "dog"], "validation_steps": 2, "num_validation_images": 2}
    trainer = trainer_for(tmp_path, **settings)
    batch = trainer.objective.sample_batch

    def starved(prompts, *more):
        if len(prompts) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch(prompts, *more)

    monkeypatch.setattr(trainer.objective, "sample_batch", starved)
    trainer.train()
    assert [path.name for path in sorted((tmp_path / "validation").iterdir())] == ["step-000002.png", "step-000004.png"]


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match="not finite at step"):
        trainer_for(learning_rate=1e30, max_train_steps=20).train()


def test_evaluations_of_earlier_weights_leave_with_them(tmp_path):
    """Until the new ones are evaluated, nothing is left that a card could take for a finding about them."""
    trainer = trainer_for(max_train_steps=1)
    trainer.train()
    trainer.save(tmp_path)
    found = {"rows": [{"name": "cat", "role": "concept", "images": 100, "recognised": {
        time: {"share": share, "interval": [share, share]} for time, share in (("before", 1.0), ("after", 0.0))}}],
        "erased_module": "that of earlier weights"}  # fmt: skip
    for name in ("evaluation-concept", "evaluation/celebrity", "evaluation-data/deep/down", "evaluation-seen"):
        write_json(tmp_path / name / "report.json", found)
        (tmp_path / name / "report.html").touch()
        with OutputFolder(tmp_path / name).lock:
            (tmp_path / name / ".selective_amnesia" / "lock").touch()
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "evaluation-seen").rename(elsewhere)
    (tmp_path / "evaluation-seen").symlink_to(elsewhere)
    assert "FORGOTTEN" in str(build_model_card(tmp_path))
    kept = ["evaluation-data/deep/down/notes.txt", "evaluation-data/photo.png", "evaluation-mine/report.html",
            "evaluation-mine/report.json", "evaluation-notes/mine.json"]  # fmt: skip
    for name in kept:
        write_json(tmp_path / name, {"mine": 1})
    trainer.save(tmp_path)
    assert "FORGOTTEN" not in str(build_model_card(tmp_path))
    left = [path for top in tmp_path.glob("evaluation*") for path in top.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in left) == kept
    assert not any((tmp_path / name).exists() for name in ("evaluation-concept", "evaluation", "evaluation-seen"))
    assert sorted(path.name for path in elsewhere.iterdir()) == [".selective_amnesia", "report.html", "report.json"]


def test_the_saved_pipeline_holds_the_trained_weights(tmp_path):
    trainer = trainer_for()
    trainer.train()
    trainer.save(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_equal(saved, weights(trainer))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refusals where there is no CUDA device")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed_precision": "fp16"}, "needs a CUDA device"),
        ({"allow_tf32": True}, "needs a CUDA device"),
    ],
)
def test_missing_hardware_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        create_accelerator(SelectiveAmnesiaConfig(**{**BASE, **settings}))


def test_missing_packages_are_named(tmp_path):
    with pytest.raises(ValueError, match='report_to="wandb" needs the package wandb: pip install wandb'):
        create_accelerator(SelectiveAmnesiaConfig(**{**BASE, "report_to": "wandb"}), tmp_path)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        create_accelerator(SelectiveAmnesiaConfig(**{**BASE, "use_8bit_adam": True}))


def test_callbacks_see_every_step_and_change_nothing(tmp_path):
    seen, plain, watched = [], trainer_for(logging_steps=2), trainer_for(tmp_path, logging_steps=2)
    watched.callbacks = [Calls(seen.append)]
    assert watched.train() == plain.train()
    assert_equal(weights(watched), weights(plain))
    assert [state.step for state in seen] == [1, 2, 3, 4]
    assert [state.surrogate_loss for state in seen[1::2]] == [row["surrogate_loss"] for row in plain.history]
    assert [state.replay_loss for state in seen[1::2]] == [row["replay_loss"] for row in plain.history]
    assert not any(state.left_out for state in seen)
    assert watched.identity.facts.keys() == plain._identity().facts.keys()


def test_a_callback_ends_the_training_after_its_step(tmp_path):
    def stop(state):
        state.stop = state.step == 2

    stopped = trainer_for(tmp_path, max_train_steps=10, checkpointing_steps=2)
    stopped.callbacks = [Calls(stop)]
    assert [row["step"] for row in stopped.train()] == [1, 2]
    short = trainer_for(max_train_steps=2)
    short.train()
    assert_equal(weights(stopped), weights(short))
    # What was stopped is not taken for the whole of a training with these settings.
    stopped.save(tmp_path)
    whole = trainer_for(max_train_steps=10)._identity()
    assert not OutputFolder(tmp_path).names_finished(whole)
    assert OutputFolder(tmp_path).names_finished(stopped.identity)


def condition(objective, prompt):
    return objective.encode_prompts([prompt])["encoder_hidden_states"][0]


def test_the_shift_is_from_where_the_weights_were_and_the_teacher_stays_there():
    objective = trainer_for().objective
    trainable = FullWeights(objective.module, objective.select("xattn"))
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), condition(objective, "cat")[None])
    before = trainable.teacher(*inputs).sample
    for parameter in trainable.parameters.values():
        parameter.data += 0.5
    for name in trainable.parameters:
        torch.testing.assert_close(trainable.shift(name), torch.full_like(trainable.parameters[name], 0.5))
    assert torch.equal(trainable.teacher(*inputs).sample, before)
    with torch.no_grad():
        assert not torch.allclose(objective.module(*inputs).sample, before)
