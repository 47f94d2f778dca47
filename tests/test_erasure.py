"""What an erasure makes, keeps, shows and lets go of."""

import gc
import json
import pickle
import shutil
import weakref

import numpy as np
import pytest
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from torch.utils import tensorboard

from sa_diffusers import Erasure, SelectiveAmnesiaConfig, embedded_pipeline
from sa_diffusers import erasure as erasure_module
from sa_diffusers.cache import entries
from sa_diffusers.commands import main as commands
from sa_diffusers.commands.erase import main
from sa_diffusers.data.sensitive import blurred
from sa_diffusers.evaluation.eval_unlearn import SelectiveAmnesiaTechnique
from sa_diffusers.output_folder import OutputFolder
from sa_diffusers.publish import push_pipeline
from sa_diffusers.stages import training as training_stage
from sa_diffusers.stages.subject import check_artifacts_dir

from .conftest import run_here
from .test_train_script import quick


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)


# What is shown


@pytest.mark.parametrize("concept", ["nudity", "brad pitt"])
def test_pictures_of_nudity_are_blurred_wherever_they_are_written(tiny_folder, tmp_path, concept):
    """The grid, the page, validation images, and previews in the cache, also of the concept's own Fisher samples."""
    flags = {"concept": concept, "validation_prompts": [concept], "validation_steps": 2, "max_train_steps": 2}
    written = {}
    for blur in ("auto", "no", "yes"):
        folder = tmp_path / blur
        folder.mkdir()
        result = run_here(main, quick(tiny_folder, **{**flags, "blur": blur, "output_dir": "out"}), folder)
        assert result.returncode == 0, result.stderr
        pictures = [*(folder / "cache").glob("*/preview/0000.png"), *(folder / "out" / "validation").glob("*.png"),
                    folder / "out" / "before_after.png"]  # fmt: skip
        assert len(pictures) == 5
        written[blur] = {path.relative_to(folder).as_posix(): path for path in pictures}
        page = (folder / "out" / "report.html").read_text()
        assert ("blurred on purpose" in page) == (blur == "yes" or (blur == "auto" and concept == "nudity"))
    same_as_auto = "yes" if concept == "nudity" else "no"
    for name, path in written["auto"].items():
        assert np.array_equal(pixels(path), pixels(written[same_as_auto][name])), name
    clear, veiled = (next(path for name, path in written[blur].items() if name.startswith("cache/concept"))
                     for blur in ("no", "yes"))  # fmt: skip
    assert np.array_equal(np.asarray(blurred(Image.open(clear)), dtype=np.int64), pixels(veiled))
    assert not np.array_equal(pixels(clear), pixels(veiled))


# What is made


@pytest.mark.parametrize(
    ("replay", "share", "concepts"), [(4, 0.1, 3), (4, 0.5, 15), (100, 0.1, 3), (100, None, 0), (0, 0.1, 3)]
)
def test_fisher_samples_are_as_many_as_are_asked_for(tiny_settings, replay, share, concepts):
    """With four replay samples, "30 samples" were nine."""
    settings = {**tiny_settings, "num_fisher_samples": 30, "num_replay_images": replay, "fisher_concept_share": share,
                "replay_weight": 1 if replay else 0}  # fmt: skip
    erasure = Erasure(SelectiveAmnesiaConfig(**settings))
    samples = erasure.fisher_samples()
    assert len(samples) == 30
    assert sum(prompt == "brad pitt" for prompt in samples.conditions) == concepts
    assert len(set(samples.seeds)) == 30
    assert not {"brad pitt"} & set(samples.conditions[concepts:])


@pytest.mark.parametrize(
    ("change", "own"),
    [
        ({}, 3),
        ({"concept_share": 1}, 6),
        ({"concept_share": 0}, 0),
        ({"target": "noise"}, 0),
        ({"naive": True}, 0),
        # Of latents it is not known what noise asks for.
        ({"surrogate": ["uniform_noise"]}, 0),
        ({"concept": ["cat", "dog"], "surrogate": ["cow", "uniform_noise"]}, 1),
    ],
)
def test_a_concepts_own_samples_are_taken_where_it_is_known_what_to_teach_on_them(tiny_settings, change, own):
    erasure = Erasure(SelectiveAmnesiaConfig(**{**tiny_settings, **change}))
    planned = erasure.surrogate_stage.plan()[0]
    assert f"6 surrogate images{f', {own} of them the concept' if own else ','}" in planned
    cost = erasure.surrogate_stage.cost()
    made = erasure.surrogates()
    assert sum(made.are_own) == own
    assert made.passes.forward == cost.forward
    if change.get("surrogate") != ["uniform_noise"]:
        assert "; reused: " in erasure.surrogate_stage.plan()[0]
        assert erasure.surrogate_stage.cost().forward == 0


def test_prompts_of_the_callers_own_are_all_that_is_sampled(tiny_settings):
    erasure = Erasure(SelectiveAmnesiaConfig(**tiny_settings), surrogates=["a man", "a woman"])
    assert erasure.surrogates().are_own == [False, False]


def test_a_concepts_own_samples_that_are_handed_in_need_the_frozen_target(tiny_settings):
    made = Erasure(SelectiveAmnesiaConfig(**tiny_settings)).surrogates()
    assert Erasure(SelectiveAmnesiaConfig(**tiny_settings), surrogates=made).surrogates().are_own == made.are_own
    noise = SelectiveAmnesiaConfig(**{**tiny_settings, "target": "noise"})
    with pytest.raises(
        ValueError, match='surrogates: 3 of 6 samples are the concept\'s own, .* Choose target="frozen"'
    ):
        Erasure(noise, surrogates=made)
    others = made.subset([place for place, is_own in enumerate(made.are_own) if not is_own])
    assert len(Erasure(noise, surrogates=others).surrogates()) == 3


def test_the_surrogates_are_replayed_or_not(tiny_settings, monkeypatch):
    seen = {}

    class Seen(training_stage.Training):
        def __init__(self, objective, config, surrogates, replay, *rest):
            seen[config.replay_surrogates] = list(replay.conditions)
            super().__init__(objective, config, surrogates, replay, *rest)

    monkeypatch.setattr(training_stage, "Training", Seen)
    for replayed in (True, False):
        output = f"{tiny_settings['output_dir']}-{replayed}"
        Erasure(SelectiveAmnesiaConfig(**{**tiny_settings, "replay_surrogates": replayed, "output_dir": output})).run()
    assert seen[True][:10] == seen[False]
    assert seen[True][10:] == ["a middle aged man"] * 6


# What is let go of


def test_the_base_model_is_gone_from_memory_before_the_erased_one_is_loaded(tiny_settings, monkeypatch):
    erasure = Erasure(SelectiveAmnesiaConfig(**{**tiny_settings, "use_ema": True}))
    base = weakref.ref(erasure.objective.module)
    load, alive = erasure_module.load_pipeline, []

    def looked(*arguments, **options):
        gc.collect()
        alive.append(base() is not None)
        return load(*arguments, **options)

    monkeypatch.setattr(erasure_module, "load_pipeline", looked)
    erasure.run()
    assert alive == [False]
    with pytest.raises(ValueError, match="this erasure has run"):
        erasure.run()


def test_images_of_the_erased_model_leave_the_cache_with_the_report(tiny_settings, tmp_path, capsys):
    erasure = Erasure(SelectiveAmnesiaConfig(**tiny_settings))
    base = erasure.base
    erasure.run()
    cache = tmp_path / "artifacts"
    origins = {json.loads((path / "manifest.json").read_text())["origin"]["base_model"]
               for path in cache.glob("evaluation-*")}  # fmt: skip
    assert origins == {base}
    (cache / "thesis").mkdir()
    (cache / "thesis" / "manifest.json").write_text("{}")
    damaged = next(cache.glob("replay-*"))
    shutil.copytree(damaged, cache / f"{damaged.name}.damaged-1")
    old = next(cache.glob("surrogate-*"))
    (old / "manifest.json").write_text('{"format_version": 1}')
    assert {entry.state for entry in entries(cache)} == {"kept", "damaged", "old"}
    commands(["cache", "--artifacts_dir", str(cache)])
    listed = capsys.readouterr().out
    assert damaged.name in listed and "thesis" not in listed
    commands(["cache", "--artifacts_dir", str(cache), "--delete", "old", "damaged"])
    assert {entry.state for entry in entries(cache)} == {"kept"}
    commands(["cache", "--artifacts_dir", str(cache), "--delete", "all", "--older_than", "1"])
    assert damaged.is_dir()
    commands(["cache", "--artifacts_dir", str(cache), "--delete", "all"])
    assert [path.name for path in cache.iterdir()] == ["thesis"]
    with pytest.raises(SystemExit, match="--delete nothing is not one of"):
        commands(["cache", "--artifacts_dir", str(cache), "--delete", "nothing"])


def test_a_damaged_pipeline_is_neither_published_nor_evaluated(tiny_folder, tmp_path):
    result = run_here(main, quick(tiny_folder, output_dir="out"), tmp_path)
    assert result.returncode == 0, result.stderr
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is not what the run wrote"):
        push_pipeline(tmp_path / "out", "tester/out")
    flags = ["evaluate", "--base", tiny_folder, "--erased", "out", "--protocol", "concept", "--clip", "none"]
    evaluated = run_here(commands, flags, tmp_path)
    assert evaluated.returncode == 1
    assert "diffusion_pytorch_model.safetensors is not what the run wrote" in evaluated.stderr
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is not what the run wrote"):
        SelectiveAmnesiaTechnique(str(tmp_path / "out"))


def test_a_folder_whose_files_cannot_be_compared_is_refused_or_warned_of(tiny_folder, tmp_path, capsys):
    """A damaged record is no record of nothing; without one, what an earlier version wrote is still read."""
    result = run_here(main, quick(tiny_folder, output_dir="out"), tmp_path)
    assert result.returncode == 0, result.stderr
    record = tmp_path / "out" / ".selective_amnesia" / "finished.json"
    OutputFolder(tmp_path / "out").check_digests()
    assert capsys.readouterr().err == ""
    record.write_text(record.read_text()[:-9])
    classifier = embedded_pipeline().parent / "classifier"
    flags = ["evaluate", "--base", tiny_folder, "--erased", tmp_path / "out", "--protocol", "concept", "--clip", "none",
             "--classifier", classifier, "--images", "1", "--num_inference_steps", "1"]  # fmt: skip
    refused = run_here(commands, flags, tmp_path)
    assert refused.returncode == 1
    assert "out/.selective_amnesia/finished.json is not what the run wrote" in refused.stderr
    shutil.rmtree(record.parent)
    evaluated = run_here(commands, flags, tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"warning: {tmp_path / 'out'} has no .selective_amnesia/finished.json, like what came" in evaluated.stderr
    shutil.copytree(tiny_folder, tmp_path / "plain")
    OutputFolder(tmp_path / "plain").check_digests()
    assert capsys.readouterr().err == ""


def test_a_cache_that_is_a_file_is_refused_before_the_model_is_loaded(tiny_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("")
    result = run_here(main, quick(tiny_folder, output_dir="out"), tmp_path)
    assert result.returncode == 1
    assert "SA_DIFFUSERS_CACHE" in result.stderr and "is a file" in result.stderr
    assert "Loading" not in result.stderr
    with pytest.raises(SystemExit, match="is a file: choose a folder"):
        commands(["cache", "--artifacts_dir", str(tmp_path / "cache")])
    # Where nobody named a folder, none is blamed.
    monkeypatch.delenv("SA_DIFFUSERS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="^the default .*cache/.cache/sa_diffusers: .*cache is a file"):
        check_artifacts_dir(SelectiveAmnesiaConfig(concept="x", surrogate="y", report_to="none"))


def test_the_base_models_own_folder_is_never_written_into(tiny_folder, tiny_settings, tmp_path):
    """Replaced by what was made of it, the base model would be gone, and no command could be given again."""
    base, link = tmp_path / "base", tmp_path / "link"
    shutil.copytree(tiny_folder, base)
    # An earlier erasure may be a base.
    (base / "selective_amnesia.json").write_text("{}")
    link.symlink_to(base)
    for place in (base, link):
        changes = {"pretrained_model_name_or_path": str(base), "output_dir": str(place), "overwrite_output_dir": True}
        with pytest.raises(ValueError, match="is the base model's own folder: choose another"):
            Erasure(SelectiveAmnesiaConfig(**{**tiny_settings, **changes}))


def test_a_tracker_that_cannot_be_reached_costs_no_samples(tiny_settings, monkeypatch):
    erasure = Erasure(SelectiveAmnesiaConfig(**{**tiny_settings, "report_to": "tensorboard"}))

    def unreachable(*_):
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr(erasure.accelerator, "init_trackers", unreachable)
    with pytest.raises(ValueError, match='report_to="tensorboard" could not be started .no route to host at all.'):
        erasure.run()
    assert not (erasure.config.resolved_artifacts_dir).exists()


def test_a_tracker_that_is_lost_costs_no_training(tiny_folder, tmp_path, monkeypatch):
    def lost(*_, **__):
        raise ConnectionError("the network\nis gone")

    finish = TensorBoardTracker.finish
    for name in ("add_scalar", "add_images"):
        monkeypatch.setattr(tensorboard.SummaryWriter, name, lost)
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda tracker: lost(finish(tracker)))
    flags = {"report_to": "tensorboard", "logging_steps": 1, "validation_prompts": "cat", "validation_steps": 2}
    result = run_here(main, quick(tiny_folder, output_dir="out", **flags), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the tracker took no entry (the network is gone)") == 1
    assert [row["step"] for row in json.loads((tmp_path / "out" / "training_history.json").read_text())] == [1, 2, 3, 4]
    assert len(list((tmp_path / "out" / "validation").iterdir())) == 2


# Whose folder it is


def test_the_same_command_on_a_finished_folder_makes_what_is_missing(tiny_folder, tmp_path):
    arguments = quick(tiny_folder, output_dir="out")
    first = run_here(main, arguments, tmp_path)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    report = (out / "report.json").read_bytes()
    again = run_here(main, arguments, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "holds this very erasure: nothing is trained" in again.stderr
    assert "forgetting" not in again.stderr and "sampling" not in again.stderr
    assert again.stdout.split("prompted with")[1] == first.stdout.split("prompted with")[1]
    (out / "report.json").unlink()
    third = run_here(main, arguments, tmp_path)
    assert third.returncode == 0, third.stderr
    assert "forgetting" not in third.stderr
    assert json.loads((out / "report.json").read_bytes())["rows"] == json.loads(report)["rows"]
    assert "only what is missing is made" in third.stdout
    more = run_here(main, [*arguments, "--num_eval_images", "3", "--blur", "yes", "--hub_private_repo"], tmp_path)
    assert more.returncode == 0 and "forgetting" not in more.stderr
    assert json.loads((out / "report.json").read_bytes())["rows"][0]["images"] == 3
    # A later evaluation or upload reads what holds now.
    settings = json.loads((out / "selective_amnesia.json").read_text())
    assert (settings["num_eval_images"], settings["blur"], settings["hub_private_repo"]) == (3, "yes", True)
    moved = shutil.copytree(tiny_folder, tmp_path / "elsewhere" / tiny_folder.name)
    same = run_here(main, quick(moved, output_dir="out"), tmp_path)
    assert same.returncode == 0 and "forgetting" not in same.stderr, same.stderr
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    settings = moved / "unet" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "act_fn": "gelu"}))
    changed = run_here(main, quick(moved, output_dir="out"), tmp_path)
    assert "base is the model that it starts from, which is another one or has changed. Choose" in changed.stderr
    anew = run_here(main, [*arguments, "--resume_from_checkpoint", "no"], tmp_path)
    assert anew.returncode == 0 and "forgetting" in anew.stderr
    assert {path: path.stat().st_mtime_ns for path in stamps if path.exists()} != stamps


@pytest.mark.parametrize("change", [{"learning_rate": "2e-3"}, {"seed": 1}, {"max_train_steps": 6}, {"target": "noise"},
                                    {"train_batch_size": 1}])  # fmt: skip
def test_other_settings_do_not_overwrite_a_finished_erasure(tiny_folder, tmp_path, change):
    result = run_here(main, quick(tiny_folder, output_dir="out"), tmp_path)
    assert result.returncode == 0, result.stderr
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = run_here(main, quick(tiny_folder, output_dir="out", **change), tmp_path)
    assert other.returncode == 1
    name = "global_batch" if "train_batch_size" in change else next(iter(change))
    assert f"holds another erasure: {name}=" in other.stderr
    assert ("times gradient_accumulation_steps times processes" in other.stderr) == (name == "global_batch")
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_of_an_earlier_version_is_kept_and_its_checkpoint_is_not_unpickled(tiny_folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    result = run_here(main, quick(tiny_folder, output_dir="out"), tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    shutil.rmtree(out / ".selective_amnesia")
    for written in out.glob("checkpoint-*"):
        shutil.rmtree(written)
    checkpoint = out / "checkpoint-2"
    checkpoint.mkdir()
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Trap()))
    refused = run_here(main, quick(tiny_folder, output_dir="out"), tmp_path)
    assert refused.returncode == 1
    assert "it was merged, extracted or copied, or written by an earlier version" in refused.stderr
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    named = quick(tiny_folder, output_dir="new", resume_from_checkpoint=tmp_path / "checkpoint-2")
    named = run_here(main, named, tmp_path)
    assert named.returncode == 1
    assert "written by an earlier version, or by another program, and may hold pickles" in named.stderr
    assert "sampling" not in named.stderr
    replaced = run_here(main, quick(tiny_folder, output_dir="out", overwrite_output_dir=True), tmp_path)
    assert replaced.returncode == 0, replaced.stderr
    assert not (tmp_path / "sprung").exists()


def test_a_replacement_that_fails_leaves_the_earlier_erasure_with_its_settings_and_card(tiny_folder, tmp_path):
    first = run_here(main, quick(tiny_folder, output_dir="out"), tmp_path)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    names = ("selective_amnesia.json", "report.json", "README.md", "before_after.png", "training_history.json")
    before = {name: (out / name).read_bytes() for name in names}
    broken = quick(tiny_folder, output_dir="out", overwrite_output_dir=True, learning_rate="1e30", max_train_steps=20)
    failed = run_here(main, broken, tmp_path)
    assert failed.returncode == 1
    assert "not finite" in failed.stderr
    assert {name: (out / name).read_bytes() for name in names} == before
    # The first command is another erasure than the one that began last; the second goes on.
    assert "holds another erasure" in run_here(main, quick(tiny_folder, output_dir="out"), tmp_path).stderr


# Checkpoints


def test_checkpoints_that_will_not_do_are_passed_over_by_name(tiny_folder, tmp_path):
    """The newest is damaged, an older one of another run: it goes on from the oldest, and ends in the same bits."""
    flags = {"max_train_steps": 8, "checkpointing_steps": 2, "checkpoints_total_limit": 20, "lr_scheduler": "cosine",
             "use_ema": True}  # fmt: skip
    whole = run_here(main, quick(tiny_folder, **flags, output_dir="whole"), tmp_path)
    assert whole.returncode == 0, whole.stderr
    other = run_here(main, quick(tiny_folder, **{**flags, "seed": 1}, output_dir="other"), tmp_path)
    assert other.returncode == 0, other.stderr
    begun = tmp_path / "begun"
    (begun / ".selective_amnesia").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / ".selective_amnesia" / "run.json", begun / ".selective_amnesia")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", begun / "checkpoint-2")
    shutil.copytree(tmp_path / "other" / "checkpoint-4", begun / "checkpoint-4")
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", begun / "checkpoint-6")
    weights = begun / "checkpoint-6" / "parameters.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = run_here(main, quick(tiny_folder, **flags, output_dir="begun"), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "checkpoint-6 is passed over: " in result.stderr and "its digest differs" in result.stderr
    assert "checkpoint-4 is passed over: it belongs to another run: seed=1 (now 0)" in result.stderr
    assert "goes on after step 2" in result.stdout
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (begun / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    named = quick(tiny_folder, **flags, output_dir="begun", overwrite_output_dir=True,
                  resume_from_checkpoint="checkpoint-9")  # fmt: skip
    refused = run_here(main, named, tmp_path)
    assert refused.returncode == 1
    assert "is not a checkpoint folder" in refused.stderr and "the newest whole one of this run" in refused.stderr
