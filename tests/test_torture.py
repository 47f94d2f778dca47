"""A handful of every attack of `benchmarks/torture.py`, and what they have found, each alone."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_diffusers.commands.erase import main
from sa_diffusers.data.generation import SampleGenerator, _part, _read_part, _write_part
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.environment import create_accelerator
from sa_diffusers.files import (
    finish_interrupted,
    new_folder,
    read_record,
    replacing_folder,
    write_bytes,
    write_json,
    write_record,
)
from sa_diffusers.fisher.estimator import _PartialSum
from sa_diffusers.identity import Identity
from sa_diffusers.output_folder import STATE_FOLDER, OutputFolder
from sa_diffusers.processes import Interrupted, watching
from sa_diffusers.training.settings import sampling_settings

from .conftest import REPOSITORY, as_flags, run_here


@pytest.fixture(scope="module")
def attacks(tmp_path_factory):
    """What became of a handful of each attack, by the attack's name."""
    report = tmp_path_factory.mktemp("torture") / "results.jsonl"
    program = str(REPOSITORY / "benchmarks" / "torture.py")
    command = [sys.executable, program, "--size", "short", "--results", str(report)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert report.is_file(), ended.stdout + ended.stderr
    results = [json.loads(line) for line in report.read_text().splitlines()]
    assert (ended.returncode == 0) == all(result["outcome"] not in ("wrong", "traceback") for result in results)
    for attack in {result["attack"] for result in results}:
        assert f"| {attack} | times |" in ended.stdout
    return results


@pytest.mark.long
@pytest.mark.parametrize(
    "attack", ["kills", "renames", "processes", "signals", "damage", "settings", "together", "disk"]
)
def test_nothing_goes_wrong(attacks, attack):
    mine = [result for result in attacks if result["attack"] == attack]
    assert mine
    assert [result for result in mine if result["outcome"] in ("wrong", "traceback")] == []


def test_attacks_that_have_ended_are_not_repeated(tmp_path, monkeypatch):
    """What became of each is written as it ends; the same attacks go on where one was stopped."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    torture = importlib.import_module("torture")
    lab = object.__new__(torture.Laboratory)
    lab.seed, lab.jobs, lab.results, lab.only = 0, 2, tmp_path / "results.jsonl", "a|b|c"
    lab.tell = lambda found: None

    def attack(name, number):
        with (tmp_path / name).open("a") as file:
            file.write("attacked\n")
        if name == "c" and not (tmp_path / "mended").exists():
            raise ValueError("the attack's own fault")
        return [torture.Result("kills", name, torture.SAME) for _ in range(number)]

    cases = {name: partial(attack, name, number) for number, name in enumerate("abc", 1)}
    with pytest.raises(SystemExit, match="an attack itself has failed"):
        lab.run(cases)
    (tmp_path / "mended").touch()
    # What the machine did not write to its end counts as not attacked.
    lab.results.write_text(lab.results.read_text() + '{"case": "seed 0: c", "att\n')
    assert [result.what for result in lab.run(cases)] == ["a", "b", "b", "c", "c", "c"]
    assert [(tmp_path / name).read_text().count("attacked") for name in "abc"] == [1, 1, 2]
    lab.seed, lab.only = 1, "^b$"
    assert [result.what for result in lab.run(cases)] == ["b", "b"]
    assert [(tmp_path / name).read_text().count("attacked") for name in "abc"] == [1, 2, 2]


def weights(folder):
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_part_counts_in_its_own_place_only(tmp_path):
    """A batch of another place, well-formed and finite, is not taken for this one."""
    mine, other = _part(tmp_path / ".part-replay-1", 0), _part(tmp_path / ".part-replay-1", 3)
    _write_part(mine, torch.ones(3, 4))
    assert torch.equal(_read_part(mine), torch.ones(3, 4))
    other.write_bytes(mine.read_bytes())
    assert _read_part(other) is None
    assert not other.exists()


def test_a_partial_sum_counts_in_its_own_place_only(tmp_path):
    values = {"a": torch.ones(2)}
    _PartialSum(tmp_path / ".part-fisher-1", 0, 1, 10).write(values, 2)
    assert _PartialSum(tmp_path / ".part-fisher-1", 0, 1, 10).read({"a": torch.zeros(2)}, 5) == 2
    (tmp_path / ".part-fisher-1").rename(tmp_path / ".part-fisher-2")
    assert _PartialSum(tmp_path / ".part-fisher-2", 0, 1, 10).read({"a": torch.zeros(2)}, 5) == 0


def test_a_kept_set_with_anothers_content_is_set_aside(tiny_objective, tiny_config, tmp_path, capsys):
    generator = SampleGenerator(tiny_objective, tmp_path, create_accelerator(tiny_config))
    settings = sampling_settings(tiny_config)
    cat = generator.drawn("replay", ["cat"], ["cat"], [1], settings)
    generator.drawn("replay", ["dog"], ["dog"], [2], settings)
    mine = generator.folder("replay", ["cat"], ["cat"], [1], settings)
    other = generator.folder("replay", ["dog"], ["dog"], [2], settings)
    mine.rename(tmp_path / "elsewhere")
    other.rename(mine)
    again = generator.drawn("replay", ["cat"], ["cat"], [1], settings)
    assert torch.equal(again.samples, cat.samples)
    assert "holds other samples than its name says" in capsys.readouterr().err
    assert SampleSet.load(f"{mine}.damaged-1").conditions == ["dog"]


def test_parts_that_a_dead_run_left_go_when_their_set_is_read(tiny_objective, tiny_config, tmp_path):
    generator = SampleGenerator(tiny_objective, tmp_path, create_accelerator(tiny_config))
    settings = sampling_settings(tiny_config)
    generator.drawn("replay", ["cat"], ["cat"], [1], settings)
    folder = generator.folder("replay", ["cat"], ["cat"], [1], settings)
    _write_part(_part(tmp_path / f".part-{folder.name}-5", 0), torch.ones(1))
    generator.drawn("replay", ["cat"], ["cat"], [1], settings)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_record_that_was_changed_is_none(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, 1, {"a": [1, 2]})
    assert read_record(path, 1)["a"] == [1, 2]
    assert read_record(path, 2) is None
    path.write_text(path.read_text().replace("2", "3"))
    assert read_record(path, 1) is None
    for content in ("", "[]", "{", "{}"):
        path.write_text(content)
        assert read_record(path, 1) is None


def test_what_is_hidden_moves_in_last(tmp_path, monkeypatch):
    """Another process takes the hidden record as the sign that the rest is there."""
    moved = []
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (moved.append(str(args[1])), original(*args))[1])
    with replacing_folder(tmp_path / "out") as staging:
        (staging / ".state").mkdir()
        (staging / ".state" / "finished").write_text("")
        (staging / "unet").mkdir()
        (staging / "unet" / "weights").write_text("")
        (staging / "zebra").write_text("")
        moved.clear()
    assert [path for path in moved if ".saved" not in path][-1].endswith("finished")
    assert (tmp_path / "out" / "zebra").is_file()


def test_unfinished_files_of_dead_processes_go(tmp_path, monkeypatch):
    """Also where a process of today has the number of the one that died, as in a container that starts again."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(os, "unlink", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            write_bytes(tmp_path / "a.json", b"{}")
    (left,) = tmp_path.iterdir()
    finish_interrupted(tmp_path)
    assert left.exists(), "its process lives"
    os.utime(left, (time.time() - 12 * 3600,) * 2)
    finish_interrupted(tmp_path)
    assert not left.exists()


def test_unfinished_checkpoints_of_dead_processes_go(tmp_path):
    folder = OutputFolder(tmp_path / "out")
    with contextlib.suppress(KeyboardInterrupt), new_folder(folder.path / "checkpoint-2") as staging:
        shutil.copytree(staging, tmp_path / "kept")
        name = staging.name
        raise KeyboardInterrupt
    left = folder.path / name
    (tmp_path / "kept").rename(left)
    # Before this process, whose number it has, began.
    os.utime(left, (time.time() - 12 * 3600,) * 2)
    folder.begin(Identity("training", {"seed": 1}), {"seed": 1})
    assert not left.exists()


def test_a_single_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write .*a.json .*What was there before is unchanged"):
        write_json(tmp_path / "file" / "a.json", {})


def test_a_damaged_record_of_the_run_loses_no_checkpoint(tmp_path):
    """Each checkpoint says itself whose it is; none is deleted for a record that cannot be read."""
    identity = Identity("training", {"seed": 1})
    folder = OutputFolder(tmp_path / "out")
    folder.begin(identity, {"seed": 1})
    (folder.path / "checkpoint-3").mkdir()
    (folder.state / "run.json").write_text("{")
    folder.begin(identity, {"seed": 1})
    assert (folder.path / "checkpoint-3").is_dir()
    assert folder.is_of(identity)
    folder.begin(Identity("training", {"seed": 2}), {"seed": 2})
    assert not (folder.path / "checkpoint-3").is_dir()


def test_what_a_report_consists_of_is_made_again_where_it_is_damaged(tiny_settings, tmp_path):
    arguments = as_flags(tiny_settings)
    output = tmp_path / "erased"
    assert run_here(main, arguments, tmp_path).returncode == 0
    whole = {name: (output / name).read_bytes() for name in ("before_after.png", "selective_amnesia.json")}
    trained = weights(output)
    (output / "before_after.png").write_bytes(b"")
    (output / "report.json").write_text((output / "report.json").read_text().replace("brad", "bred"))
    again = run_here(main, arguments, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "is not what was written: the report is made again" in again.stderr
    assert "forgetting" not in again.stderr
    assert "bred" not in (output / "report.json").read_text()
    (output / "report.html").unlink()
    # The card tells these: they are made again with the weights that they belong to.
    (output / "selective_amnesia.json").write_text("[]")
    again = run_here(main, arguments, tmp_path)
    assert again.returncode == 0, again.stderr
    assert {name: (output / name).read_bytes() for name in whole} == whole
    assert (output / "report.html").is_file()
    assert weights(output) == trained
    assert not list(output.glob(".s[!e]*"))


def test_fisher_information_of_another_run_under_this_ones_name_is_set_aside(tiny_settings, tmp_path):
    settings = {**tiny_settings, "artifacts_dir": "cache"}
    first = run_here(main, as_flags(settings), tmp_path)
    assert first.returncode == 0, first.stderr
    (mine,) = (tmp_path / "cache").glob("fisher-*")
    (tmp_path / "b").mkdir()
    other = {**settings, "seed": 1, "output_dir": "b"}
    assert run_here(main, as_flags(other), tmp_path / "b").returncode == 0
    (theirs,) = (tmp_path / "b" / "cache").glob("fisher-*")
    mine.rename(tmp_path / "elsewhere")
    theirs.rename(mine)
    trained = weights(tmp_path / "erased")
    again = run_here(main, as_flags({**settings, "resume_from_checkpoint": "no"}), tmp_path)
    assert again.returncode == 0, again.stderr
    assert "holds other Fisher information than its name says" in again.stderr
    assert weights(tmp_path / "erased") == trained


def test_an_error_that_a_signal_caused_is_the_signal():
    """Code that is interrupted may answer with an error of its own: an import of compiled code does."""
    with pytest.raises(Interrupted, match="SIGTERM"), watching():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            raise RuntimeError("initialization failed") from None
    with pytest.raises(RuntimeError, match="another"), watching():
        raise RuntimeError("another")


def test_checkpoints_beyond_the_limit_go_when_a_run_goes_on(tiny_settings, tmp_path):
    """The run has ended between a checkpoint's arrival and the removal of the oldest."""
    arguments = as_flags({**tiny_settings, "checkpointing_steps": 1, "checkpoints_total_limit": 3})
    output = tmp_path / "erased"
    assert run_here(main, arguments, tmp_path).returncode == 0
    (output / STATE_FOLDER / "finished.json").unlink()
    fewer = [*arguments, "--checkpoints_total_limit", "1"]
    again = run_here(main, fewer, tmp_path)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]


def test_validation_images_survive(tiny_settings, tmp_path):
    """A run that ends between a checkpoint and the images of its step makes them; damaged weights cost none."""
    changes = {
        "checkpointing_steps": 2,
        "validation_steps": 2,
        "validation_prompts": ["cat"],
        "num_validation_images": 1,
    }
    arguments = as_flags({**tiny_settings, **changes})
    output = tmp_path / "erased"
    assert run_here(main, arguments, tmp_path).returncode == 0
    pictures = {path.name: path.read_bytes() for path in (output / "validation").iterdir()}
    assert sorted(pictures) == ["step-000002.png", "step-000004.png"]
    (output / "validation" / "step-000002.png").unlink()
    path = output / "unet" / "diffusion_pytorch_model.safetensors"
    trained = weights(output)
    save_file({name: -value for name, value in load_file(path).items()}, path)
    for damaged in (None, "finished.json"):
        if damaged:
            (output / STATE_FOLDER / damaged).write_text("")
        again = run_here(main, arguments, tmp_path)
        assert again.returncode == 0, again.stderr
        assert {path.name: path.read_bytes() for path in (output / "validation").iterdir()} == pictures
        assert weights(output) == trained
        assert not (output / STATE_FOLDER / "validation").exists()


def test_validation_images_of_another_erasure_leave_with_it(tiny_settings, tmp_path):
    settings = {**tiny_settings, "validation_steps": 2, "validation_prompts": ["cat"], "num_validation_images": 1}
    assert run_here(main, as_flags(settings), tmp_path).returncode == 0
    output = tmp_path / "erased"
    assert (output / "validation" / "step-000002.png").is_file()
    other = [*as_flags({**tiny_settings, "seed": 1}), "--overwrite_output_dir"]
    replaced = run_here(main, other, tmp_path)
    assert replaced.returncode == 0, replaced.stderr
    assert not (output / "validation").exists()
