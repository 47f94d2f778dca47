"""Erasures that measure themselves: every kind of surrogate and precision, runs that stop where they find their
settings, and how they say that they ended."""

import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sa_diffusers import SelectiveAmnesiaConfig, embedded_pipeline, objective_for
from sa_diffusers.commands.erase import main as erase
from sa_diffusers.commands.evaluate import main as evaluate
from sa_diffusers.erasure import Erasure
from sa_diffusers.passes import counted
from sa_diffusers.processes import Interrupted, watching
from sa_diffusers.results.figures import significant
from sa_diffusers.training import controller

from .conftest import as_flags, run_here
from .test_class_models import tiny_diffusion
from .test_probes import controlled, weights

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PROBED = {
    "concept": ["brad pitt"], "surrogate": ["a middle aged man"], "num_surrogate_images": 6, "num_replay_images": 8,
    "num_inference_steps": 2, "sample_batch_size": 8, "num_fisher_samples": 2, "fisher_timesteps": 2,
    "max_train_steps": 10, "train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
    "num_eval_images": 2, "num_probe_images": 8, "num_neighbour_images": 4, "report_to": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("surrogate") / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def config_of(base, folder, output="erased", **changes) -> SelectiveAmnesiaConfig:
    places = {"pretrained_model_name_or_path": str(base), "output_dir": str(folder / output),
              "artifacts_dir": str(folder / "artifacts")}  # fmt: skip
    return SelectiveAmnesiaConfig(**{**PROBED, **places, **changes})


def trained(erasure: Erasure):
    """Everything up to the erased pipeline in its folder."""
    with erasure.holding():
        surrogates = erasure.timed(erasure.surrogate_stage)
        return erasure.training_stage.run(surrogates, *erasure.products(surrogates))


def dying(after: int):
    """A builder of objectives that end the process's work in the middle of a training step."""

    def build(*arguments):
        objective = objective_for(*arguments)
        loss, steps = objective.negative_elbo, []

        def negative_elbo(*inputs):
            steps.extend([None] if objective.module.training else [])
            if len(steps) > after:
                raise KeyboardInterrupt
            return loss(*inputs)

        objective.negative_elbo = negative_elbo
        return objective

    return build


CASES = {
    "bf16": {"mixed_precision": "bf16"},
    "noise as target": {"target": "noise"},
    "two concepts": {"concept": ["brad pitt", "tom cruise"], "surrogate": ["a middle aged man", "a woman"]},
    "uniform noise": {"surrogate": ["uniform_noise"]},
    "a prompt and images": {"concept": ["brad pitt", "tom cruise"], "surrogate": ["a middle aged man", "IMAGES"]},
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_what_a_run_decides_is_the_same_where_it_died_in_the_search_for_its_settings(
    tiny_folder, tmp_path, images, case
):
    changes = dict(CASES[case])
    changes["surrogate"] = [str(images) if value == "IMAGES" else value
                            for value in changes.get("surrogate", PROBED["surrogate"])]  # fmt: skip
    whole = trained(Erasure(config_of(tiny_folder, tmp_path, "whole", **changes)))
    state = whole.controller.state
    assert state.rate > 0 and state.calibrated > 0
    assert [reading["step"] for reading in state.readings] == [10]
    (figures,) = state.readings
    assert {"forgotten", "drift", "drift_p90", "drift_neighbours", "drift_empty"} <= set(figures)
    assert all(math.isfinite(value) for value in figures.values())
    reading = whole.controller.probes.read(whole.objective.module)
    of_each = {**reading.forgotten_surrogate, **reading.forgotten}
    assert set(of_each) == set(changes.get("concept", PROBED["concept"]))
    assert reading.worst_forgotten == min([value for value in of_each.values() if not math.isnan(value)], default=1.0)
    assert whole.ending.how == "limit"
    with pytest.raises(KeyboardInterrupt):
        trained(Erasure(config_of(tiny_folder, tmp_path, "broken", **changes), dying(after=7)))
    again = trained(Erasure(config_of(tiny_folder, tmp_path, "broken", **changes)))
    assert again.controller.state == state
    assert again.history == whole.history
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def probes_of(erasure: Erasure):
    probes, check, _ = erasure.probe_stage.run(erasure.surrogates())
    probes.prepare(erasure.objective.module)
    return probes, check


def test_training_probes_and_report_share_neither_prompts_nor_seeds(tiny_folder, tmp_path, monkeypatch):
    erasure = Erasure(config_of(tiny_folder, tmp_path, num_replay_images=40, num_eval_images=4))
    sample, asked = erasure.objective.sample, {"training": [], "probes": [], "report": []}

    def told(prompts, seeds, settings):
        asked[stage].extend(zip(prompts, seeds, strict=True))
        return sample(prompts, seeds, settings)

    monkeypatch.setattr(erasure.objective, "sample", told)
    stage = "training"
    surrogates = erasure.surrogates()
    erasure.replay()
    erasure.fisher_samples()
    stage = "probes"
    probes, check, near = erasure.probe_stage.run(surrogates)
    neighbours = probes.remembered.prompts[:5]
    near.probes(neighbours)
    check(0)
    stage = "training"
    near.replay([prompt for prompt in erasure.replay_prompts if prompt][:5])
    stage = "report"
    erasure.image_stage.run(erasure.objective, erasure.base)
    prompts, seeds = ({name: {row[place] for row in rows} for name, rows in asked.items()} for place in (0, 1))
    assert min(map(len, seeds.values())) > 10
    for first, second in (("training", "probes"), ("training", "report"), ("probes", "report")):
        assert not seeds[first] & seeds[second], (first, second)
    assert not prompts["probes"] & (prompts["training"] | prompts["report"])
    held_out = {text for group in erasure.image_stage.groups if group.phrasing == "held-out" for text in group.prompts}
    assert held_out and not held_out & (prompts["training"] | prompts["probes"])


def test_noise_is_asked_for_on_the_concepts_own_samples_where_its_answer_is_known(tiny_folder, tmp_path, capsys):
    tiny_diffusion().save_pretrained(tmp_path / "pixels")
    pixels = config_of(tmp_path / "pixels", tmp_path, concept=["cat"], surrogate=["uniform_noise"])
    probes, _ = probes_of(Erasure(pixels))
    assert [part.role for part in probes.sets if part.name == "cat"] == ["surrogate", "concept"]
    assert "cannot be told" not in capsys.readouterr().err
    # In latents it is not: a model that had forgotten all would be told that it has forgotten nothing.
    probes, _ = probes_of(Erasure(config_of(tiny_folder, tmp_path, surrogate=["uniform_noise"])))
    assert [part.role for part in probes.sets if part.name == "brad pitt"] == ["surrogate"]
    assert all(text is None for part in probes.sets if part.role == "surrogate" for text in part.wanted)


def test_images_in_a_concepts_place_are_measured_by_what_the_model_errs_on_them(tmp_path, images):
    config = config_of(
        embedded_pipeline(), tmp_path, concept=["sneaker"], surrogate=[str(images)], replay_prompts="garments",
        classifier=None, reference_features=None,
    )  # fmt: skip
    erasure = Erasure(config)
    probes, check = probes_of(erasure)
    reading = probes.read(erasure.objective.module)
    assert reading.forgotten == {}
    assert reading.worst_forgotten == pytest.approx(0, abs=1e-5)
    # Nothing is forgotten: every image is like what the base model samples at its seed.
    assert check(0) == (8, 8)


def test_each_concept_is_probed_with_the_images_in_its_own_place(tiny_folder, tmp_path):
    folders = [tmp_path / name for name in ("dark", "light")]
    for folder, grey in zip(folders, (0, 255), strict=True):
        folder.mkdir()
        for number in range(4):
            Image.new("RGB", (16, 16), (grey,) * 3).save(folder / f"{number}.png")
    concepts = ["brad pitt", "tom cruise"]
    changes = {"concept": concepts, "surrogate": [str(folder) for folder in folders], "num_surrogate_images": 8}
    erasure = Erasure(config_of(tiny_folder, tmp_path, **changes))
    surrogates = erasure.surrogates()
    probes, check, _ = erasure.probe_stage.run(surrogates)
    own = [surrogates.samples[number::2] for number in range(2)]
    assert not torch.allclose(*(samples[0] for samples in own), atol=0.1)
    probed = {part.name: part for part in probes.sets if part.role == "surrogate"}
    for concept, samples, part in zip(concepts, own, check.parts, strict=True):
        assert torch.equal(probed[concept].samples, samples), concept
        assert torch.equal(part.shown, samples), concept


def test_a_plan_counts_the_images_that_are_looked_at(tiny_folder, tmp_path):
    erasure = Erasure(config_of(tiny_folder, tmp_path, max_train_steps=2000))
    _, check, _ = erasure.probe_stage.run(erasure.surrogates())
    with counted(erasure.objective.module) as passes:
        # After 120, 180, 270, 405, 608, 912 and 1,368 steps.
        for turn in range(7):
            check(turn)
    whole, unasked = (Erasure(config_of(tiny_folder, tmp_path, max_train_steps=2000, **settings)).costs()["training"]
                      for settings in ({}, {"forget_target": None}))  # fmt: skip
    assert whole.forward - unasked.forward == passes.forward == 7 * 8 * 2 * 2
    # What a checkpoint is gone on from has been looked at.
    looks = erasure.probe_stage.looks
    assert looks(range(120, 2000)).forward == 6 * 8 * 2 * 2
    assert looks(range(2000, 2000)).forward == 0


def test_a_plan_counts_further_replay_images_at_the_guidance_of_the_replayed(tiny_folder, tmp_path):
    few, many = (Erasure(config_of(tiny_folder, tmp_path, num_neighbour_images=count, replay_guidance_scale=1))
                 for count in (4, 104))  # fmt: skip
    assert many.costs()["training"].forward - few.costs()["training"].forward == 100 * 2


def test_nothing_to_measure_is_told_before_anything_is_made_but_the_surrogates(tiny_folder, tmp_path, monkeypatch):
    """Samples to replay and Fisher information take hours of a large model; it was told after them."""
    erasure = Erasure(config_of(tiny_folder, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(controller, "_NOTHING_TO_MEASURE", 1e9)
        with pytest.raises(ValueError, match="nothing to measure"):
            erasure.run()
    made = {title: passes.forward for title, passes in erasure.subject.passes.items() if passes.forward}
    assert set(made) == {"surrogate samples", "probe samples"}
    # What is asked then is in the plan, and in the report of one that goes on.
    again = Erasure(config_of(tiny_folder, tmp_path))
    planned = again.costs()["probes"]
    report = again.run().report
    assert report.cost["probes"].forward == planned.forward > 0
    assert report.cost["probes"].made.forward == report.cost["probes"].forward
    # Where they are there already, the training is soon enough.
    third = Erasure(config_of(tiny_folder, tmp_path, "third"))
    assert not third.costs()["probes"].forward
    assert "probes" not in third.run().report.cost


# How it ended


@pytest.fixture(scope="module")
def limited(tiny_folder, tmp_path_factory):
    """The whole command, up to its limit of steps."""
    folder = tmp_path_factory.mktemp("limited")
    arguments = as_flags(
        {**PROBED, "report_to": "tensorboard", "pretrained_model_name_or_path": str(tiny_folder), "output_dir": "out"}
    )
    result = run_here(erase, arguments, folder)
    assert result.returncode == 0, result.stderr
    return folder, arguments, result


def told(folder: Path) -> list[str]:
    """What of an ending a reader finds in page and Markdown of a report."""
    return [(folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")]


def test_a_run_that_reached_its_limit_says_so_in_report_and_card(limited):
    folder, _, result = limited
    ending = json.loads((folder / "out" / "training_ending.json").read_text())
    assert (ending["how"], ending["step"]) == ("limit", 10)
    assert ending["sentence"].startswith("at the limit of 10 steps: forgotten is")
    assert f"the probes: {ending['sentence']}" in result.stderr
    assert f"training  stopped at its limit: {ending['sentence']}" in result.stdout
    assert json.loads((folder / "out" / "report.json").read_text())["ending"] == ending
    for text in (*told(folder / "out"), (folder / "out" / "README.md").read_text()):
        assert "TRAINING STOPPED AT ITS LIMIT:" in text
        assert "at the limit of 10 steps: forgotten is" in text


def test_readings_are_in_progress_bar_tracker_history_and_report(limited):
    folder, _, result = limited
    assert re.search(r"forgotten=-?\d\.\d\d", result.stderr) and re.search(r"drift=\d\.\d{3}", result.stderr)
    figures = json.loads((folder / "out" / "training_history.json").read_text())[-1]
    names = {"forgotten", "forgotten_root", "forgotten_surrogate", "forgotten_unguided", "drift", "drift_p90",
             "drift_unguided", "drift_empty", "drift_surrogate", "drift_neighbours"}  # fmt: skip
    assert names <= set(figures)
    page = told(folder / "out")[0]
    for title, name in (("forgotten, of the concept's samples", "forgotten"),
                        ("drift of remembered prompts, the 90th percentile", "drift_p90"),
                        ("drift of the neighbour that drifted farthest", "drift_neighbours")):  # fmt: skip
        assert f'aria-label="Curve. {title}: {significant(figures[name])} at step 10' in page, name
    events = EventAccumulator(str(next((folder / "out" / "logs").rglob("events.*")).parent)).Reload()
    for name in names:
        (entry,) = events.Scalars(name)
        assert (entry.step, entry.value) == (10, pytest.approx(figures[name], rel=1e-5)), name


def test_what_a_finished_run_said_is_kept_for_later_evaluations(limited, clip_folder, tiny_folder):
    folder, arguments, _ = limited
    (folder / "out" / "report.json").unlink()
    again = run_here(erase, arguments, folder)
    assert again.returncode == 0, again.stderr
    assert "nothing is trained" in again.stderr
    assert "training  stopped at its limit: at the limit of 10 steps" in again.stdout
    assert "TRAINING STOPPED AT ITS LIMIT:" in told(folder / "out")[1]
    flags = ["--base", tiny_folder, "--erased", "out", "--protocol", "concept", "--clip", clip_folder, "--images", 2,
             "--neighbours", "a dog", "--unrelated", "a cat", "--batch_size", 4]  # fmt: skip
    result = run_here(evaluate, flags, folder)
    assert result.returncode == 0, result.stderr
    later = folder / "out" / "evaluation-concept"
    assert json.loads((later / "report.json").read_text())["ending"]["how"] == "limit"
    assert all("TRAINING STOPPED AT ITS LIMIT:" in text for text in told(later))
    assert (folder / "out" / "README.md").read_text().count("TRAINING STOPPED AT ITS LIMIT:") == 1


def test_a_run_without_probes_is_silent_and_leaves_no_ending_of_an_earlier_one(limited):
    folder, arguments, _ = limited
    by_hand = ["--num_probe_images", "0", "--learning_rate", "1e-3", "--ewc_weight", "1", "--max_train_steps", "2"]
    result = run_here(erase, [*arguments, *by_hand, "--overwrite_output_dir"], folder)
    assert result.returncode == 0, result.stderr
    assert "training  " not in result.stdout
    assert not (folder / "out" / "training_ending.json").exists()
    assert "ending" not in json.loads((folder / "out" / "report.json").read_text())
    assert "TRAINING" not in "".join([*told(folder / "out"), (folder / "out" / "README.md").read_text()])


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "how"),
    [({"max_train_steps": 4}, "limit"), ({"forget_target": 0.01, "drift_tolerance": 900.0}, "done")],
)
def test_a_run_that_is_stopped_right_at_its_end_takes_no_further_step(tmp_path, settings, how):
    settings = {"max_train_steps": 400, "learning_rate": 1e-3, "ewc": 0, "logging_steps": 7, **settings}
    whole = controlled(tmp_path / "whole", **settings)
    steps = whole.train()[-1]["step"]
    assert (whole.ending.how, whole.ending.step) == (how, steps)
    stopping = controlled(tmp_path / "broken", **settings)
    seen = []

    def stop(state):
        seen.append((state.surrogate_loss, state.replay_loss))
        if state.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping.callbacks = [stop]
    with pytest.raises(Interrupted, match=f"SIGTERM after step {steps}"), watching():
        stopping.train()
    again = controlled(tmp_path / "broken", **settings)
    again.train()
    assert again.ending == whole.ending
    # The last step's losses are on record, although it is no seventh.
    assert steps % 7 and again.history == whole.history
    assert tuple(whole.history[-1][name] for name in ("surrogate_loss", "replay_loss")) == seen[-1]
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    if how == "limit":
        # With a later one it goes on, and says how that ends.
        further = controlled(tmp_path / "broken", **{**settings, "max_train_steps": 6})
        further.train()
        assert further.ending.sentence.startswith("at the limit of 6 steps")


def test_a_plan_says_that_a_training_had_ended_before_its_weights_were_written(tiny_folder, tmp_path, monkeypatch):
    def after(self, step, module, penalty, last):
        self.verdict = controller.Verdict(True, f"after step {step}")
        return True

    def stop(state):
        if state.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(controller.Controller, "after", after)
    monkeypatch.setattr(controller.Controller, "every", 20)
    settings = {"max_train_steps": 400, "learning_rate": 1e-3, "ewc": 0}
    stopped = Erasure(config_of(tiny_folder, tmp_path, **settings))
    stopped.training_stage.callbacks = [stop]
    assert stopped.costs()["training"].backward >= 400
    with pytest.raises(Interrupted, match="SIGTERM after step 20"), watching():
        trained(stopped)
    again = Erasure(config_of(tiny_folder, tmp_path, **settings))
    plan = again.plan()
    assert "had ended after step 20" in plan and "goes on after" not in plan
    assert again.costs()["training"].backward == 0
    assert "where the training stops after" not in plan
    assert trained(again).ending.sentence == "after step 20"
