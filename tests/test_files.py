import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from sa_diffusers.files import new_folder, read_json, replacing_folder, write_json

from .conftest import REPOSITORY


def test_entries_are_replaced_and_others_stay(tmp_path):
    folder = tmp_path / "out"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "old").write_text("old")
    (folder / "other").write_text("kept")
    with replacing_folder(folder) as staging:
        (staging / "unet").mkdir()
        (staging / "unet" / "new").write_text("new")
    assert sorted(path.name for path in folder.rglob("*")) == ["new", "other", "unet"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
@pytest.mark.parametrize("writing", [new_folder, replacing_folder])
def test_others_may_read_what_the_umask_lets_them(tmp_path, writing, mask, file_mode, folder_mode):
    before = os.umask(mask)
    try:
        with writing(tmp_path / "out") as staging:
            (staging / "unet").mkdir()
            save_file({"a": torch.zeros(2)}, staging / "unet" / "weights.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "unet" / "weights.safetensors").stat().st_mode & 0o777 == file_mode
    assert (tmp_path / "out" / "unet").stat().st_mode & 0o777 == folder_mode


def test_an_error_leaves_the_old_files_and_nothing_else(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(RuntimeError), replacing_folder(folder) as staging:
        (staging / "old").write_text("new")
        raise RuntimeError
    assert (folder / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_saved_pipeline_whole(tmp_path, tiny_folder):
    """The operating system refuses to write more than 20 kB into a file, as a full disk would."""
    script = textwrap.dedent(
        f"""
        import resource, signal, sys
        from pathlib import Path
        import torch
        from tests.conftest import build_tiny_pipeline
        from sa_diffusers import SampleSet, SelectiveAmnesiaConfig, objective_for
        from sa_diffusers.training.training import Training
        config = SelectiveAmnesiaConfig(replay_weight=0, ewc_weight=0, report_to="none")
        samples = SampleSet(torch.zeros(1, 4, 8, 8), ["cat"], ["dog"], [0])
        trainer = Training(objective_for(build_tiny_pipeline()), config, samples, None, None)
        trainer.save({str(tmp_path / "out")!r})
        before = {{path: path.read_bytes() for path in Path({str(tmp_path / "out")!r}).rglob("*") if path.is_file()}}
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with torch.no_grad():
            for parameter in trainer.objective.module.parameters():
                parameter.zero_()
        try:
            trainer.save({str(tmp_path / "out")!r})
        except OSError as error:
            assert "What was there before is unchanged" in str(error), error
            assert "Free some space" in str(error), error
        else:
            sys.exit("the second save did not fail")
        after = {{path: path.read_bytes() for path in Path({str(tmp_path / "out")!r}).rglob("*") if path.is_file()}}
        assert before == after and len(before) > 5
        assert [path.name for path in Path({str(tmp_path)!r}).iterdir()] == ["out"]
        """
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    path.write_text("{")
    with pytest.raises(ValueError, match="a.json is not valid JSON"):
        read_json(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
