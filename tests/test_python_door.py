"""What people call from Python: the trainer on a pipeline or a name, stages' products handed in, the estimator."""

import inspect
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sa_diffusers import (
    Erasure,
    FisherEstimator,
    FisherInformation,
    SampleSet,
    SelectiveAmnesiaConfig,
    SelectiveAmnesiaTrainer,
    embedded_pipeline,
    erase,
    objective_for,
)
from sa_diffusers.commands.evaluate import main as evaluation
from sa_diffusers.configuration import BASE_DEFAULTS_NAME, HISTORY_NAME
from sa_diffusers.files import read_json

from .conftest import build_tiny_pipeline, run_here
from .nursery import forked_code
from .test_unlearn import SMALL, same, weights


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SA_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**settings) -> SelectiveAmnesiaConfig:
    return SelectiveAmnesiaConfig(
        **{"concept": "cat", "surrogate": "dog", "output_dir": "out", "report_to": "none", **SMALL, **settings}
    )


def saved(folder):
    return weights(DiffusionPipeline.from_pretrained(folder).unet)


def picture(level: int) -> Image.Image:
    return Image.fromarray(np.full((40, 30, 3), level, dtype=np.uint8))


# The trainer


@pytest.mark.parametrize("form", ["pipeline", "name"])
def test_train_evaluate_save_make_what_the_command_makes(tiny_folder, place, form):
    expected = Erasure(config(pretrained_model_name_or_path=str(tiny_folder), output_dir="expected")).run().report
    model = DiffusionPipeline.from_pretrained(tiny_folder) if form == "pipeline" else str(tiny_folder)
    trainer = SelectiveAmnesiaTrainer(model, config())
    with pytest.raises(ValueError, match="out holds no pipeline of this erasure: call train first"):
        trainer.evaluate()
    history = trainer.train()
    assert history == trainer.history == read_json(place / "out" / HISTORY_NAME)
    if form == "pipeline":
        assert trainer.pipeline is model
    assert same(weights(trainer.pipeline.unet), saved("out"))
    assert same(saved("out"), saved("expected"))
    trained = weights(trainer.pipeline.unet)
    report = trainer.evaluate()
    # The base model's images are the base model's, although its weights in memory are the erased ones.
    assert [row.change for row in report.rows] == [row.change for row in expected.rows]
    assert report.verdict == expected.verdict
    assert same(weights(trainer.pipeline.unet), trained)
    for name in ("report.html", "report.json", "before_after.png", "README.md"):
        assert (place / "out" / name).is_file()
    trainer.save_model(place / "elsewhere")
    assert same(saved(place / "elsewhere"), trained)
    assert (place / "elsewhere" / "report.json").is_file()
    assert not list((place / "elsewhere").glob("checkpoint-*"))
    with pytest.raises(ValueError, match="has trained already"):
        trainer.train()
    assert len(trainer.pipeline("dog", num_inference_steps=1, output_type="np").images) == 1


def test_a_finished_folder_is_taken_up_by_a_new_trainer(tiny_folder, place, capsys):
    first = SelectiveAmnesiaTrainer(str(tiny_folder), config(checkpointing_steps=2))
    history = first.train()
    report = first.evaluate()
    again = SelectiveAmnesiaTrainer(DiffusionPipeline.from_pretrained(tiny_folder), config())
    # Before it has trained too.
    assert again.evaluate().rows == report.rows
    checkpoints = sorted((place / "out").glob("checkpoint-*"))
    anew = SelectiveAmnesiaTrainer(str(tiny_folder), config(resume_from_checkpoint="no"))
    assert anew.evaluate().rows == report.rows
    assert checkpoints == sorted((place / "out").glob("checkpoint-*")) != []
    assert again.train() == history
    assert "holds this very erasure: nothing is trained" in capsys.readouterr().err
    assert same(weights(again.pipeline.unet), weights(first.pipeline.unet))
    (place / "out" / "report.json").unlink()
    assert [row.change for row in again.evaluate().rows] == [row.change for row in report.rows]
    with pytest.raises(ValueError, match="holds another erasure: learning_rate=0.001 .now 0.002."):
        SelectiveAmnesiaTrainer(str(tiny_folder), config(learning_rate=2e-3))


def test_what_is_sampled_after_training_is_the_base_models(tiny_folder, place):
    """The evaluation samples anew what has gone from the cache, with weights that are no longer in the model."""
    trainer = SelectiveAmnesiaTrainer(str(tiny_folder), config())
    trainer.train()
    first = trainer.evaluate()
    shutil.rmtree(place / "cache")
    (place / "out" / "report.json").unlink()
    again = trainer.evaluate()
    assert [row.change for row in again.rows] == [row.change for row in first.rows]
    assert any(row.change for row in first.rows)


def test_a_callback_ends_the_training_and_the_report_is_of_what_it_left(tiny_folder, place):
    seen = []

    class Stop:
        def after_step(self, state):
            state.stop = state.step == 2

    settings = config(max_train_steps=9, logging_steps=1)
    for wrong, said in ((3, "an? int is no function"), (Stop, "Stop is a class: give an object of it")):
        with pytest.raises(ValueError, match=said):
            SelectiveAmnesiaTrainer(str(tiny_folder), settings, callbacks=[wrong])
    trainer = SelectiveAmnesiaTrainer(
        str(tiny_folder), settings, callbacks=[Stop(), lambda state: seen.append(state.step)]
    )
    assert [entry["step"] for entry in trainer.train()] == seen == [1, 2]
    report = trainer.evaluate()
    assert report is not None and (place / "out" / "report.json").is_file()
    # It can be measured again; the whole training is another, and goes on.
    whole = SelectiveAmnesiaTrainer(str(tiny_folder), settings)
    assert whole.evaluate().rows == report.rows
    assert [entry["step"] for entry in whole.train()][-1] == 9
    assert whole.evaluate().stopped_after_step is None


def test_the_bases_own_settings_hold_unless_they_are_written(place):
    base = str(embedded_pipeline())
    settings = {"concept": "sneaker", "surrogate": "dress", "output_dir": "out"}
    by_default = SelectiveAmnesiaTrainer(base, SelectiveAmnesiaConfig(**settings)).config
    assert (by_default.train_batch_size, by_default.num_inference_steps) == (16, 10)
    # 4 is the general default, and written all the same.
    written = SelectiveAmnesiaTrainer(base, SelectiveAmnesiaConfig(**settings, train_batch_size=4)).config
    assert (written.train_batch_size, written.num_inference_steps) == (4, 10)
    assert SelectiveAmnesiaConfig(**settings, train_batch_size=4).written.keys() == {*settings, "train_batch_size"}
    later = SelectiveAmnesiaConfig(**settings)
    later.num_eval_images = 7
    assert SelectiveAmnesiaTrainer(base, later).config.num_eval_images == 7


def test_the_bases_own_settings_survive_in_the_erased_folder(tiny_folder, place):
    base = shutil.copytree(tiny_folder, place / "models" / "base")
    (place / "models" / "prompts.txt").write_text("a coat\na bag\n")
    own = {"num_inference_steps": 3, "replay_prompts": "../prompts.txt"}
    (base / BASE_DEFAULTS_NAME).write_text(json.dumps(own))
    settings = {name: value for name, value in SMALL.items() if name not in own}
    first = SelectiveAmnesiaConfig(concept="cat", surrogate="dog", output_dir="out", report_to="none", **settings)
    SelectiveAmnesiaTrainer(str(base), first).train()
    second = SelectiveAmnesiaConfig(concept="cow", surrogate="dog", output_dir="again", report_to="none", **settings)
    trainer = SelectiveAmnesiaTrainer("out", second)
    assert trainer.config.num_inference_steps == 3
    assert trainer.config.replay_prompts == str(place / "models" / "prompts.txt")


def test_mistakes_are_told_in_a_sentence_before_anything_is_sampled(tiny_folder, place):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    for make in (lambda model: SelectiveAmnesiaTrainer(model, config()), FisherEstimator,
                 lambda model: erase(model, "cat", "dog", **SMALL)):  # fmt: skip
        with pytest.raises(ValueError, match="a UNet2DConditionModel is not a pipeline: give a DiffusionPipeline"):
            make(pipeline.unet)
        with pytest.raises(ValueError, match="weights in float16: load it with dtype=torch.float32"):
            make(DiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float16))
    with pytest.raises(ValueError, match='pretrained_model_name_or_path="x": leave the setting out'):
        SelectiveAmnesiaTrainer(pipeline, config(pretrained_model_name_or_path="x"))
    assert not (place / "cache").exists()


def test_the_old_call_form_works_and_says_what_is_new(tiny_folder, place):
    objective = objective_for(build_tiny_pipeline())
    samples = SampleSet(torch.randn(2, 4, 4, 4), ["cat"] * 2, ["dog"] * 2, [0, 1])
    settings = config(replay_weight=0, ewc_weight=0, output_dir=None)
    with pytest.warns(DeprecationWarning, match="takes a pipeline or its name"):
        trainer = SelectiveAmnesiaTrainer(objective, settings, samples, None, None)
    assert trainer.train()
    with pytest.warns(DeprecationWarning, match="the argument parameters is now selection"):
        FisherEstimator(objective, parameters=objective.select("xattn"))


# Products that are handed in


def test_samples_handed_in_are_those_that_are_trained_on(tiny_folder, place):
    """The same samples, handed in, end in the same weights; others do not."""
    made = Erasure(config(pretrained_model_name_or_path=str(tiny_folder), output_dir="expected"))
    products = {"surrogates": made.surrogates(), "replay": made.replay(), "fisher": made.fisher()}
    made.run()
    SelectiveAmnesiaTrainer(str(tiny_folder), config(), **products).train()
    assert same(saved("out"), saved("expected"))
    kept = list((place / "cache").glob("*"))
    other = {**products, "surrogates": SampleSet(products["surrogates"].samples + 1, ["cat"] * 4, ["dog"] * 4, [0] * 4)}
    with pytest.raises(ValueError, match="holds another erasure: surrogates="):
        SelectiveAmnesiaTrainer(str(tiny_folder), config(), **other)
    SelectiveAmnesiaTrainer(str(tiny_folder), config(output_dir="other"), **other).train()
    assert not same(saved("out"), saved("other"))
    assert list((place / "cache").glob("*")) == kept


def test_prompts_handed_in_are_sampled_from_the_frozen_model(tiny_folder, place):
    trainer = SelectiveAmnesiaTrainer(
        str(tiny_folder), config(), surrogates=["a dog", "a wolf", "a fox"], replay=["a cow", "a hen"]
    )
    surrogates, replay = trainer._erasure.surrogates(), trainer._erasure.replay()
    assert (surrogates.conditions, surrogates.sources) == (["cat"] * 3, ["a dog", "a wolf", "a fox"])
    assert replay.conditions == replay.sources == ["a cow", "a hen"]
    assert "2 replay images of 2 prompts (given)" in trainer.plan()
    trainer.train()
    rows = trainer.evaluate().rows
    assert {"a cow", "a hen"} <= {row.name for row in rows}
    with pytest.raises(ValueError, match='1 of 2 replay prompts name the concept "cat"'):
        SelectiveAmnesiaTrainer(str(tiny_folder), config(output_dir="b"), replay=["a cow", "a cat"])


def test_images_handed_in_are_encoded(tiny_folder, place):
    objective = objective_for(DiffusionPipeline.from_pretrained(tiny_folder))
    size = objective.resolution
    tensor = torch.full((2, 3, size, size), 0.5)
    forms = {
        "pictures": [picture(127), picture(128)],
        "tensor": tensor,
        "rows": [{"image": picture(127), "text": "cat"}, {"image": picture(128), "text": "cat"}],
    }
    means = {}
    for name, given in forms.items():
        trainer = SelectiveAmnesiaTrainer(str(tiny_folder), config(output_dir=name), surrogates=given)
        samples = trainer._erasure.surrogates()
        assert (samples.conditions, samples.sources) == (["cat"] * 2, [None] * 2)
        means[name] = samples.samples.mean()
        assert "2 surrogate images are given" in trainer.plan()
    assert means["pictures"] == means["rows"]
    assert torch.isclose(means["pictures"], means["tensor"], atol=1e-2)
    remembered = SelectiveAmnesiaTrainer(
        str(tiny_folder), config(output_dir="r"), replay=[{"image": picture(9), "text": "a cow"}] * 3
    )
    assert remembered._erasure.replay().conditions == ["a cow"] * 3
    bare = SelectiveAmnesiaTrainer(str(tiny_folder), config(output_dir="e"), replay=[picture(9)])
    assert bare._erasure.replay().conditions == [""]
    assert bare.train()
    latents = SelectiveAmnesiaTrainer(
        str(tiny_folder), config(output_dir="l"), surrogates=trainer._erasure.surrogates().samples
    )
    assert torch.equal(latents._erasure.surrogates().samples, trainer._erasure.surrogates().samples)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "surrogates is empty"),
        ("a dog", 'surrogates="a dog" is a text: give a list of prompts'),
        (3, "of type int is none of the forms allowed"),
        ([3], "surrogates: int will not do: give a SampleSet"),
        (["a dog", 3], "surrogates: int and str are not of one kind"),
        (torch.zeros(3, 8, 8), "holds no images"),
        (torch.full((1, 3, 16, 16), 200.0), "images as a tensor are in .0, 1., and these are in .200, 200.: divide"),
        (torch.full((1, 3, 16, 16), float("nan")), "images that are not finite"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "these are of torch.uint8: divide by 255"),
        ([{"image": picture(3)}], 'surrogates: dict will not do: give an "image" .PIL. and a "text" in each'),
        (["a small cat"], 'surrogates: "a small cat" names the concept, which would turn into itself'),
        ([{"image": picture(3), "text": "a cow"}], 'the text "a cow" of an image names no concept'),
        (SampleSet(torch.zeros(1, 4, 4, 7), ["cat"], [None], [0]), "do not fit the model"),
        (SampleSet(torch.zeros(1, 4, 8, 8), [3], [None], [0]), "conditions and sources of a SampleSet are texts"),
        (SampleSet(torch.zeros(1, 4, 8, 8), ["cat"], [None], [0], {"from": {3}}), "are plain data"),
        (torch.zeros(1, 3, 5, 5), "images of 5x5 pixels, but the model works on 16x16"),
        (SampleSet(torch.zeros(1, 7, 8, 8), ["cat"], [None], [0]), "do not fit the model"),
        (SampleSet(torch.full((1, 4, 8, 8), float("inf")), ["cat"], [None], [0]), "samples are not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_samples_is_refused(tiny_folder, place, given, said):
    with pytest.raises(ValueError, match=said):
        SelectiveAmnesiaTrainer(str(tiny_folder), config(), surrogates=given)
    assert not (place / "cache").exists()


def test_of_several_concepts_bare_images_belong_to_none(tiny_folder, place):
    several = {"concept": ["cat", "cow"], "surrogate": ["dog", "horse"]}
    with pytest.raises(ValueError, match="which of the concepts do the images belong to"):
        SelectiveAmnesiaTrainer(str(tiny_folder), config(**several), surrogates=[picture(1)] * 2)
    with pytest.raises(ValueError, match="say in the setting surrogate what they are"):
        SelectiveAmnesiaTrainer(str(tiny_folder), config(surrogate=[]), surrogates=[picture(1)])


# What must not be mistaken for something else


def test_a_pipeline_that_was_changed_meanwhile_is_refused(tiny_folder, place):
    """A second trainer on one pipeline began at the first one's weights, and its samples stayed in the cache."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    first = SelectiveAmnesiaTrainer(pipeline, config())
    second = SelectiveAmnesiaTrainer(pipeline, config(output_dir="second", concept="cow"))
    first.train()
    kept = sorted((place / "cache").iterdir())
    with pytest.raises(ValueError, match="the pipeline was changed after it was handed in"):
        second.train()
    assert sorted((place / "cache").iterdir()) == kept
    with torch.no_grad():
        next(pipeline.vae.parameters()).mul_(1.5)
    trained = weights(pipeline.unet)
    with pytest.raises(ValueError, match="the pipeline was changed after it was handed in"):
        first.evaluate()
    assert same(weights(pipeline.unet), trained)


def test_what_is_made_of_an_erased_pipeline_is_not_said_to_be_made_of_the_base(tiny_folder, place, clip_folder):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    SelectiveAmnesiaTrainer(pipeline, config()).train()
    again = SelectiveAmnesiaTrainer(pipeline, config(output_dir="second", concept="cow"))
    again.train()
    assert again.evaluate().base_model == str(place / "out")
    assert "folder `out`" in (place / "second" / "README.md").read_text()
    # Against the first base the later erasure would answer for the earlier one too.
    compared = ["--erased", "second", "--protocol", "concept", "--clip", clip_folder, "--images", "2",
                "--unrelated", "dog",
                "--neighbours", "hen"]  # fmt: skip
    for base, warned in ((tiny_folder, True), ("out", False)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = run_here(evaluation, ["--base", str(base), *compared], place)
        assert result.returncode == 0, result.stderr
        said = [str(each.message) for each in told]
        assert any("second was made from other weights than those of" in text for text in said) == warned


def test_settings_that_change_after_they_were_read_are_refused(tiny_folder, place):
    given = config()
    trainer = SelectiveAmnesiaTrainer(str(tiny_folder), given)
    given.learning_rate = 1.0
    assert trainer.config.learning_rate == 1e-3
    trainer.config.learning_rate = 1.0
    with pytest.raises(ValueError, match="the settings were changed after they were read"):
        trainer.train()
    pictures = SampleSet(torch.randn(2, 4, 8, 8), ["cat"] * 2, [None] * 2, [0, 1])
    trainer = SelectiveAmnesiaTrainer(str(tiny_folder), config(output_dir="b"), surrogates=pictures)
    before = pictures.samples.clone()
    pictures.samples.zero_()
    assert torch.equal(trainer._erasure.surrogates().samples, before)


def test_report_and_card_tell_what_was_handed_in_and_where_the_training_ended(tiny_folder, place):
    settings, given = config(max_train_steps=9), {"surrogates": ["a wolf", "a fox"]}
    stop = [lambda state: setattr(state, "stop", True)]
    trainer = SelectiveAmnesiaTrainer(str(tiny_folder), settings, **given, callbacks=stop)
    # The last step is on record, although it is no tenth.
    assert [entry["step"] for entry in trainer.train()] == [1]
    report = trainer.evaluate()
    assert report.handed_in == {"surrogates": "2 prompts to sample with"}
    assert report.stopped_after_step == 1
    card = (place / "out" / "README.md").read_text()
    told = "from Python were surrogates (2 prompts to sample with), and a callback ended the training after step 1"
    for text in (card, (place / "out" / "report.md").read_text()):
        assert told in text
        assert "train_sa.py --config" not in text
    assert "what the base model draws for that prompt" not in card
    # Another process takes it up as it is.
    later = SelectiveAmnesiaTrainer(str(tiny_folder), settings, **given)
    assert later.evaluate().rows == report.rows
    later.save_model("elsewhere")
    assert same(saved("elsewhere"), saved("out"))


def test_fisher_information_counts_by_its_values(tiny_folder, place):
    information = FisherEstimator(str(tiny_folder), timesteps=2).estimate(["a dog"])
    SelectiveAmnesiaTrainer(str(tiny_folder), config(), fisher=information).train()
    name = next(iter(information.values))
    information.values[name] = information.values[name] + 1
    with pytest.raises(ValueError, match="holds another erasure: fisher="):
        SelectiveAmnesiaTrainer(str(tiny_folder), config(), fisher=information)
    for wrong in (float("nan"), -1.0):
        information.values[name] = torch.full_like(information.values[name], wrong)
        with pytest.raises(ValueError, match="negative or not finite"):
            SelectiveAmnesiaTrainer(str(tiny_folder), config(output_dir="b"), fisher=information)
    with pytest.raises(ValueError, match="fisher: what is of type dict will not do"):
        SelectiveAmnesiaTrainer(str(tiny_folder), config(output_dir="b"), fisher={})


def test_a_training_without_a_step_is_no_erasure(tiny_folder, place, monkeypatch):
    objective = type(objective_for(build_tiny_pipeline()))
    original = objective.negative_elbo
    monkeypatch.setattr(objective, "negative_elbo", lambda *rest, **more: original(*rest, **more) * float("nan"))
    trainer = SelectiveAmnesiaTrainer(str(tiny_folder), config(ewc_weight=0))
    with pytest.raises(FloatingPointError, match="not finite in any of 3 steps, and nothing was trained"):
        trainer.train()
    assert not (place / "out" / "unet").exists()


def test_a_copy_replaces_an_earlier_copy_and_nothing_else(tiny_folder, place):
    trainer = SelectiveAmnesiaTrainer(str(tiny_folder), config())
    trainer.train()
    trainer.evaluate()
    trainer.save_model("copy")
    other = SelectiveAmnesiaTrainer(str(tiny_folder), config(output_dir="second", concept="cow"))
    other.train()
    # Without a report of its own, none of the other's is left.
    other.save_model("copy")
    assert same(saved("copy"), saved("second"))
    assert json.loads((place / "copy" / "selective_amnesia.json").read_text())["concept"] == ["cow"]
    assert not any((place / "copy" / name).exists() for name in ("report.json", "report.html", "README.md"))
    base = shutil.copytree(tiny_folder, place / "base")
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("all of it")
    (place / "file").write_text("")
    refused = {
        "out": "is the output folder of another erasure",
        str(base): "already holds something else",
        "mine": "already holds something else",
        "file": "is a file",
        "": 'the folder is named ""',
        "second/unet": "is inside of second or around it",
        str(place): "is inside of",
        "/": "is inside of",
    }
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for folder, said in refused.items():
        with pytest.raises(ValueError, match=said):
            other.save_model(folder)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_a_models_folder_does_not_have_other_files_read(tiny_folder, place):
    base = shutil.copytree(tiny_folder, place / "models" / "base")
    (place / "secret.txt").write_text("a secret\n")
    for source in (str(place / "secret.txt"), "../../secret.txt", "/etc/passwd"):
        (base / BASE_DEFAULTS_NAME).write_text(json.dumps({"replay_prompts": source}))
        with pytest.raises(ValueError, match="is a file elsewhere on this machine"):
            SelectiveAmnesiaTrainer(str(base), config())
    for name, value in {"blur": "no", "naive": True, "drop_naming_prompts": True, "validation_prompts": ["x"]}.items():
        (base / BASE_DEFAULTS_NAME).write_text(json.dumps({name: value}))
        with pytest.raises(ValueError, match=f"{name} is for the user to say"):
            SelectiveAmnesiaTrainer(str(base), config())


def test_other_settings_of_an_erasure_leave_the_bases_own_open():
    given = SelectiveAmnesiaConfig(concept="sneaker", surrogate="dress", learning_rate=1e-5)
    changed = given.replace(seed=3)
    assert (changed.seed, changed.written.keys()) == (3, {"concept", "surrogate", "learning_rate", "seed"})


def test_help_shows_what_is_to_be_given():
    assert list(inspect.signature(SelectiveAmnesiaTrainer).parameters) == [
        "model", "config", "surrogates", "replay", "fisher", "callbacks"
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [{"concept": "cat"}, "settings.yaml", None])
def test_what_is_no_configuration_is_refused(tiny_folder, wrong):
    with pytest.raises(ValueError, match="is no configuration: give a SelectiveAmnesiaConfig"):
        SelectiveAmnesiaTrainer(str(tiny_folder), wrong)


@pytest.mark.long
def test_processes_that_were_given_different_samples_are_refused(tiny_folder, place):
    """They trained on a mixture, and then one waited for ever for what the other would not write."""
    script = (
        "import os, sys, torch\n"
        "from sa_diffusers import SampleSet, SelectiveAmnesiaConfig, SelectiveAmnesiaTrainer\n"
        "from tests.test_python_door import config\n"
        "samples = torch.full((2, 4, 8, 8), float(os.environ['RANK']))\n"
        "given = SampleSet(samples, ['cat'] * 2, [None] * 2, [0, 1])\n"
        "try:\n"
        f"    SelectiveAmnesiaTrainer({str(tiny_folder)!r}, config(), surrogates=given)\n"
        "except ValueError as error:\n"
        "    sys.exit(f'refused: {error}')\n"
    )
    result = forked_code(script, place, {**os.environ, "OMP_NUM_THREADS": "1"}, processes=2)
    assert result.returncode == 1
    assert "refused: the processes of this run were given different settings, samples" in result.stderr
    assert not (place / "cache").exists()


# The estimator


@pytest.mark.parametrize("form", ["pipeline", "name"])
def test_what_the_estimator_records_is_accepted_by_a_run(tiny_folder, place, form):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.unet.train()
    pipeline.text_encoder.train()
    model = pipeline if form == "pipeline" else str(tiny_folder)
    estimator = FisherEstimator(model, "xattn", timesteps=2)
    information = estimator.estimate(["a dog", "a cow"])
    assert pipeline.unet.training and pipeline.text_encoder.training
    information.save_pretrained("fisher")
    recorded = FisherInformation.from_pretrained("fisher").config
    assert (recorded["base_model"], recorded["train_method"]) == (str(tiny_folder), "xattn")
    for given in ("fisher", information):
        folder = f"out-{type(given).__name__}"
        settings = config(train_method="xattn", output_dir=folder)
        trainer = SelectiveAmnesiaTrainer(str(tiny_folder), settings, fisher=given)
        assert trainer.train()
    assert same(saved("out-str"), saved("out-FisherInformation"))
    assert not list((place / "cache").glob("fisher-*"))
    with pytest.raises(ValueError, match="was computed for the selection 'xattn' and lacks"):
        SelectiveAmnesiaTrainer(str(tiny_folder), config(output_dir="full"), fisher=information)


def test_the_estimator_takes_samples_in_any_form(tiny_folder, place):
    estimator = FisherEstimator(str(tiny_folder), "xattn", timesteps=2)
    by_prompts = estimator.estimate(["a dog", "a cow"])
    objective = estimator.objective
    from sa_diffusers import SamplingSettings

    settings = SamplingSettings(guidance_scale=1.0)
    seeds = [20_000_000, 20_000_001]
    samples = SampleSet(objective.sample(["a dog", "a cow"], seeds, settings), ["a dog", "a cow"], ["a dog", "a cow"],
                        seeds)  # fmt: skip
    by_samples = estimator.estimate(samples)
    assert all(torch.equal(by_prompts.values[name], by_samples.values[name]) for name in by_samples.values)
    assert by_prompts.config["num_samples"] == 2
    by_pictures = estimator.estimate([{"image": picture(9), "text": "a dog"}])
    assert max(value.max() for value in by_pictures.values.values()) > 0
    with pytest.raises(ValueError, match="samples is empty"):
        estimator.estimate([])
