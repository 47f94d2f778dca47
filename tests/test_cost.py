"""What an erasure costs: planned from settings, counted by the run, shown in report and card."""

import contextlib
import gc
import json
import re
import weakref

import pytest
import torch

from sa_diffusers import Erasure, FisherInformation, SelectiveAmnesiaConfig, SelectiveAmnesiaTrainer, objective_for
from sa_diffusers.data import generation
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import SamplingSettings
from sa_diffusers.fisher import estimator as fisher_estimator
from sa_diffusers.passes import Passes, counted
from sa_diffusers.processes import Interrupted
from sa_diffusers.report.cost import cost_sentence
from sa_diffusers.report.view import view
from sa_diffusers.results import Report
from sa_diffusers.training import checkpoints, controller
from sa_diffusers.training.trainable import FullWeights

from .conftest import build_tiny_pipeline
from .test_class_models import tiny_diffusion, tiny_vae

STAGES = {"samples": ("surrogate samples", "replay samples"), "Fisher": ("fisher",), "training": ("training",),
          "evaluation": ("evaluation before", "evaluation after")}  # fmt: skip


def erasure_of(settings, **changes) -> Erasure:
    return Erasure(SelectiveAmnesiaConfig(**{**settings, **changes}))


def figures(cost) -> dict[str, tuple[int, int]]:
    """Stage -> forward and backward, of those that called the network."""
    return {title: (stage.forward, stage.backward) for title, stage in cost.items() if stage.forward}


def made(cost) -> dict[str, tuple[int, int] | None]:
    return {title: stage.made and (stage.made.forward, stage.made.backward) for title, stage in cost.items()}


def summed(found, titles) -> tuple[int, int]:
    return tuple(sum(found.get(title, (0, 0))[place] for title in titles) for place in (0, 1))


def planned(erasure) -> dict[str, tuple[int, int]]:
    return {name: (passes.forward, passes.backward) for name, passes in erasure.costs().items() if passes.forward}


@contextlib.contextmanager
def stopped_after(count, patch, owner, name):
    """The run is asked to stop where a function is called for the so many-th time."""
    whole, calls = getattr(owner, name), []

    def stops(*arguments, **named):
        calls.append(name)
        if len(calls) == count:
            raise Interrupted("SIGTERM")
        return whole(*arguments, **named)

    with patch.context() as inner:
        inner.setattr(owner, name, stops)
        with pytest.raises(Interrupted):
            yield
    assert len(calls) == count


# What is counted


def test_a_plan_says_what_the_run_then_counts(tiny_settings):
    """6 surrogate images and 10 replay images of two guided or unguided steps, by hand; and so on."""
    erasure = erasure_of(tiny_settings, surrogate_guidance_scale=1, validation_prompts=["cat"], validation_steps=3)
    plan, whole = planned(erasure), erasure.plan().splitlines()[-1]
    comparison = erasure.run()
    found = figures(comparison.report.cost)
    images = sum(row.images for row in comparison.report.rows)
    # Validation at steps 3 and 4, of four images each.
    assert found == {
        "surrogate samples": (6 * 2, 0),
        "replay samples": (10 * 2 * 2, 0),
        "fisher": (3 * 4 + 4, 3 * 4),
        "training": (4 * (2 + 2) * 2 + 2 * erasure.config.num_validation_images * 4, 4 * (2 + 2)),
        "evaluation before": (images * 4, 0),
        "evaluation after": (images * 4, 0),
    }
    assert plan == {name: summed(found, titles) for name, titles in STAGES.items()}
    forward, backward = summed(found, found)
    assert whole.startswith(f"cost      about {forward:,} forward and {backward:,} backward passes of the network")
    for name, (rows, returned) in plan.items():
        assert f"{name} {rows:,}" + (f" and {returned:,}" if returned else "") in whole
    assert made(comparison.report.cost) == {"saving": (0, 0), "scoring": (0, 0), **found}


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "noise"},
        {"replay_weight": 0},
        {"ewc_weight": 0, "sampler": "pndm"},
        {"guidance_scale": 1, "num_fisher_samples": 14, "fisher_concept_share": 0.3},
        # Two epochs of the surrogates, half of which have no teacher; within one, how many have is a matter of chance.
        {"concept": ["cat", "dog"], "surrogate": ["cow", "uniform_noise"], "gradient_accumulation_steps": 2,
         "max_train_steps": 3},
        {"naive": True},
        {"num_replay_images": 0, "replay_weight": 0, "train_method": "xattn"},
        {"gradient_checkpointing": True},
    ],
)  # fmt: skip
def test_other_settings_are_planned_as_they_are_counted(tiny_settings, changes):
    erasure = erasure_of(tiny_settings, **changes)
    plan = planned(erasure)
    found = figures(erasure.run().report.cost)
    for name, titles in STAGES.items():
        assert plan.get(name, (0, 0)) == summed(found, titles), name


PROBED = {
    "learning_rate": None, "ewc_weight": None, "replay_weight": None, "max_grad_norm": None, "num_probe_images": 8,
    "num_neighbour_images": 4, "num_eval_images": 1, "max_train_steps": 20, "drift_tolerance": 900,
    "forget_target": 0.5,
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"replay_weight": 0, "concept": ["cat", "dog"]}])
def test_a_training_that_measures_itself_is_planned_as_it_is_counted(tiny_settings, monkeypatch, changes):
    """About: what is read, looked at and found to lie near hangs on the run; the steps that are undone do not."""
    monkeypatch.setattr(controller, "_FIRST_LOOK", 10)
    monkeypatch.setattr(controller, "_PROBED_SHARE", 100.0)
    erasure = erasure_of(tiny_settings, **{**PROBED, **changes})
    plan = planned(erasure)
    found = figures(erasure.run().report.cost)
    assert plan["samples"] == summed(found, (*STAGES["samples"], "probe samples"))
    assert plan["training"][1] == found["training"][1]
    assert plan["training"][0] == pytest.approx(found["training"][0], rel=0.1)
    # What was made for it is told of the next one, which takes less.
    again = erasure_of(tiny_settings, **{**PROBED, **changes, "output_dir": tiny_settings["output_dir"] + "-again"})
    assert "samples" not in planned(again)
    report = again.run().report
    assert report.cost["probe samples"].forward == 0
    assert made(report.cost)["probe samples"] == found["probe samples"]
    assert "With what earlier runs had made for it" in cost_sentence(report)


def test_images_are_looked_at_again_where_there_are_half_as_many_steps_more():
    until = (119, 120, 179, 180, 269, 270, 2000)
    assert [controller.scheduled_looks(1, last) for last in until] == [0, 1, 1, 2, 2, 3, 7]
    assert controller.scheduled_looks(121, 2000) == 6


def test_a_count_within_a_count_ends_by_itself():
    pipeline = tiny_vae()
    objective, settings = objective_for(pipeline), SamplingSettings()
    with counted(objective.module) as outer:
        with counted(objective.module) as inner:
            objective.sample(["0"], [0], settings)
        objective.sample(["1"], [1], settings)
    objective.sample(["1"], [1], settings)
    assert (outer, inner) == (Passes(2), Passes(1))
    objective_for(tiny_vae()).sample(["1"], [1], settings)
    assert (outer, inner) == (Passes(2), Passes(1))


@pytest.mark.parametrize("build", [tiny_diffusion, tiny_vae])
@pytest.mark.parametrize("changes", [{"target": "frozen"}, {"target": "noise"}, {"naive": True}],
                         ids=["frozen", "noise", "naive"])  # fmt: skip
def test_models_of_classes_are_planned_as_they_are_counted(tiny_settings, tmp_path, build, changes):
    """A VAE samples with its decoder alone, and trains with its encoder too: a row counts once in either."""
    build().save_pretrained(tmp_path / "base")
    erasure = erasure_of(tiny_settings, pretrained_model_name_or_path=str(tmp_path / "base"), concept=["0"],
                         surrogate=["uniform_noise"], **changes)  # fmt: skip
    plan = planned(erasure)
    found = figures(erasure.run().report.cost)
    for name, titles in STAGES.items():
        assert plan.get(name, (0, 0)) == summed(found, titles), name
    assert found["training"][1] == 4 * (2 + 2)
    if build is tiny_vae:
        assert found["replay samples"] == (10, 0)
        assert found["fisher"] == (3 + 1, 3)


def test_the_vaes_last_layer_alone_has_backward_passes_too():
    objective = objective_for(tiny_vae())
    for name, parameter in objective.module.named_parameters():
        parameter.requires_grad_(name.startswith("pixels"))
    size = objective.module.config
    samples = torch.rand(3, size.in_channels, size.sample_size, size.sample_size)
    noise = torch.randn(3, size.latent_size)
    with counted(objective.module) as passes:
        objective.negative_elbo(objective.module, samples, objective.encode_prompts(["0"] * 3), torch.zeros(3), noise)
    assert passes == Passes(3, 3)


def test_guidance_of_a_model_of_classes_counts_twice():
    objective = objective_for(tiny_diffusion())
    for scale, rows in ((1.0, 1), (0.5, 2), (3.0, 2)):
        settings = SamplingSettings("ddim", 3, scale)
        with counted(objective.module) as passes:
            objective.sample(["0", "1"], [0, 1], settings)
        assert passes == Passes(2 * 3 * rows)
        assert objective.passes_of_sample(settings, objective.pipeline.scheduler) == 3 * rows


# What disturbs nothing


def test_a_count_leaves_nothing_behind_and_keeps_nothing_alive():
    module = build_tiny_pipeline().unet
    before = dict(module._forward_hooks)
    with contextlib.suppress(ZeroDivisionError), counted(module) as passes:
        assert module._forward_hooks
        raise ZeroDivisionError
    assert dict(module._forward_hooks) == before
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None and passes == Passes()


def test_the_frozen_teacher_counts_forward_only(tiny_objective):
    module = tiny_objective.module
    teacher = FullWeights(module, dict(module.named_parameters())).teacher
    words = tiny_objective.encode_prompts(["cat"] * 3)
    noisy, steps = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3])
    with counted(module) as passes:
        taught = tiny_objective.denoise(teacher, noisy, steps, words)
        trained = tiny_objective.denoise(module, noisy, steps, words)
    assert passes == Passes(6, 3)
    assert torch.equal(taught, trained.detach())


@pytest.mark.parametrize("whole", [True, False], ids=["fullgraph", "graphs"])
@pytest.mark.parametrize("in_place", [True, False], ids=["module.compile", "torch.compile"])
def test_a_compiled_module_is_counted_in_the_same_graphs(whole, in_place):
    graphs = []

    def backend(graph, _):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    module = tiny_vae().vae
    size = module.config
    images = torch.rand(2, size.in_channels, size.sample_size, size.sample_size)
    rows = (images, torch.tensor([0, 1]), torch.randn(2, size.latent_size))
    if in_place:
        module.compile(backend=backend, fullgraph=whole)
        compiled = module
    else:
        compiled = torch.compile(module, backend=backend, fullgraph=whole)
    expected = compiled(*rows)[0]
    alone = list(graphs)
    with counted(module) as passes:
        for _ in range(3):
            assert torch.equal(compiled(*rows)[0], expected)
    compiled(*rows)
    assert graphs == alone
    assert passes == Passes(6, 6)


# What is reused, and what goes on


def test_what_is_kept_costs_nothing_and_its_own_cost_stands_beside(tiny_settings):
    first = erasure_of(tiny_settings).run().report.cost
    second = erasure_of(tiny_settings, learning_rate=2e-3, output_dir=f"{tiny_settings['output_dir']}-2")
    plan = planned(second)
    report = second.run().report
    found = figures(report.cost)
    assert found == {name: figures(first)[name] for name in ("training", "evaluation after")}
    assert plan == {"training": found["training"], "evaluation": found["evaluation after"]}
    assert made(report.cost) == made(first)
    # With the weights there, only the images after are sampled again; what the weights took is on record.
    (second.output_dir / "report.json").unlink()
    third = erasure_of(tiny_settings, learning_rate=2e-3, output_dir=f"{tiny_settings['output_dir']}-2")
    assert planned(third) == {"evaluation": found["evaluation after"]}
    again = third.run().report
    assert figures(again.cost) == {"evaluation after": found["evaluation after"]}
    assert {**made(again.cost), "saving": (0, 0)} == made(first)
    fourth = erasure_of(tiny_settings, learning_rate=2e-3, output_dir=f"{tiny_settings['output_dir']}-2")
    assert fourth.plan().endswith("cost      no pass through the network: all is there")
    assert fourth.run().report.to_dict() == again.to_dict()


def test_a_training_that_goes_on_counts_on_from_its_checkpoint(tiny_settings):
    settings = {**tiny_settings, "checkpointing_steps": 2, "validation_prompts": ["cat"], "validation_steps": 4}
    whole = erasure_of(settings).run().report.cost
    erasure = erasure_of(settings, output_dir=f"{tiny_settings['output_dir']}-2")

    def kill(state):
        if state.step == 3:
            raise KeyboardInterrupt

    erasure.training_stage.callbacks = [kill]
    with pytest.raises(KeyboardInterrupt):
        erasure.run()
    gone_on = erasure_of(settings, output_dir=f"{tiny_settings['output_dir']}-2")
    step = gone_on.training_stage.choice().step
    # What is planned is what is still to do.
    assert 0 < step < 4
    assert gone_on.costs()["training"].backward == (4 - step) * 4
    report = gone_on.run().report
    assert figures(report.cost)["training"] == figures(whole)["training"]
    assert made(report.cost) == made(whole)


def test_a_checkpoint_that_tells_no_cost_is_gone_on_from_and_the_whole_is_unknown(tiny_settings, monkeypatch):
    settings = {**tiny_settings, "checkpointing_steps": 2}
    write = checkpoints.write_sealed

    def earlier(folder, name, version, values):
        write(folder, name, version, {key: value for key, value in values.items() if key != "passes"})

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_sealed", earlier)
        erasure_of(settings).run()
    output = erasure_of(settings).output_dir
    (output / ".selective_amnesia" / "finished.json").unlink()
    report = erasure_of(settings).run().report
    assert report.cost["training"].backward in (4, 8)
    assert report.cost["training"].made is None
    page = view(report).to_markdown()
    assert re.search(r"\| training \| \S+ \| \d+ \| [48] \| – \| – \|", page)
    assert re.search(r"\| in all \| \S+ \| \S+ \| \S+ \| – \| – \|", page)


def test_samples_and_fisher_information_that_were_stopped_say_what_the_whole_took(tiny_settings, monkeypatch):
    settings = {**tiny_settings, "sample_batch_size": 2}
    whole = erasure_of(settings, artifacts_dir=f"{tiny_settings['artifacts_dir']}-2").run().report
    folder = erasure_of(settings, output_dir=f"{tiny_settings['output_dir']}-2").output_dir
    with stopped_after(3, monkeypatch, generation.SampleGenerator, "_batch"):
        erasure_of(settings, output_dir=str(folder)).run()
    monkeypatch.setattr(fisher_estimator.Pace, "due", lambda _: True)
    with stopped_after(3, monkeypatch, fisher_estimator.FisherEstimator, "_gradient_that_fits"):
        erasure_of(settings, output_dir=str(folder)).run()
    report = erasure_of(settings, output_dir=str(folder)).run().report
    assert figures(report.cost)["fisher"] == (4, 4)
    assert made(report.cost) == made(whole.cost)


def test_nothing_depends_on_a_cost(tiny_settings, tmp_path):
    erasure = erasure_of(tiny_settings)
    erasure.run()
    (folder,) = (tmp_path / "artifacts").glob("replay-*")
    samples = SampleSet.load(folder)
    assert samples.passes == Passes(40)
    assert folder.name == f"replay-{samples.fingerprint}"
    samples.passes = None
    assert folder.name == f"replay-{samples.fingerprint}"
    (folder,) = (tmp_path / "artifacts").glob("fisher-*")
    information = FisherInformation.from_pretrained(folder)
    assert information.passes == Passes(16, 12)
    assert "passes" not in information.config
    # Without their costs they are those of an earlier version.
    settings = {**tiny_settings, "output_dir": str(tmp_path / "again")}
    given = erasure_of(settings, fisher=str(folder)).identity
    information.passes = None
    information.save_pretrained(tmp_path / "earlier")
    assert erasure_of(settings, fisher=str(tmp_path / "earlier")).identity.facts["fisher"] == given.facts["fisher"]


def test_an_evaluation_of_its_own_leaves_the_trainings_cost(tiny_settings, tiny_folder):
    """In Python the evaluation reads the samples that the training had made."""
    whole = erasure_of(tiny_settings, artifacts_dir=f"{tiny_settings['artifacts_dir']}-2").run().report
    settings = {**tiny_settings, "output_dir": f"{tiny_settings['output_dir']}-2"}
    trainer = SelectiveAmnesiaTrainer(str(tiny_folder), SelectiveAmnesiaConfig(**settings))
    trainer.train()
    report = trainer.evaluate()
    assert figures(report.cost) == figures(whole.cost)
    assert made(report.cost) == made(whole.cost)


# What is shown


def test_report_page_and_card_show_the_same_cost(tiny_settings):
    erasure = erasure_of(tiny_settings)
    report = erasure.run().report
    erasure.card_stage.run()
    folder = erasure.output_dir
    forward, backward = summed(figures(report.cost), report.cost)
    held = json.loads((folder / "report.json").read_text())
    assert held["schema_version"] == 3
    assert held["cost"]["training"] == {"forward": 32, "backward": 16, "made": {"forward": 32, "backward": 16}}
    assert Report.load(folder / "report.json").cost == report.cost
    for name in ("report.md", "README.md"):
        text = (folder / name).read_text()
        assert "## What it cost" in text
        assert f"| training | {report.seconds['training']:,.1f} | 32 | 16 |" in text
        assert re.search(rf"\| in all \| [\d.]+ \| {forward} \| {backward} \|", text)
        assert "when made" not in text
    assert f"{forward} forward and {backward} backward passes through the network" in (folder / "README.md").read_text()
    page = (folder / "report.html").read_text()
    assert '<h2 id="cost-title">What it cost</h2>' in page
    assert re.search(r'>training</th>\s*<td class="figure">[\d.]+</td>\s*<td class="figure">32</td>', page)


def test_a_report_of_earlier_runs_shows_its_seconds_alone():
    old = {"rows": [], "seconds": {"training": 61.25, "fisher": 9.0}}
    text = view(Report.from_dict(old)).to_markdown()
    assert "| stage | seconds |\n" in text and "| in all | 70.2 |\n" in text
    assert "network" not in text[text.index("## What it cost") :].split("##")[1]
    assert "What it cost" not in view(Report.from_dict({"rows": []})).to_markdown()
