import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sa_diffusers.files import check_writable, finish_interrupted, new_folder, read_json, replacing_folder, write_json
from sa_diffusers.processes import Lock

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


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_leads_to_where_a_folder_is_made(tmp_path, is_there):
    place, link = tmp_path / "other disk" / "out", tmp_path / "link"
    if is_there:
        place.mkdir(parents=True)
    link.symlink_to(place)
    with new_folder(link) as staging:
        (staging / "weights").write_text("new")
    assert (place / "weights").read_text() == "new"
    assert link.is_symlink()
    assert [path.name for path in place.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("shared", [True, False])
def test_what_another_run_has_made_meanwhile_passes_for_ones_own_only_where_it_is_the_same(tmp_path, shared):
    folder = tmp_path / "out"

    def make():
        with new_folder(folder, shared) as staging:
            (staging / "weights").write_text("mine")
            folder.mkdir()
            (folder / "weights").write_text("another's")

    if shared:
        make()
    else:
        with pytest.raises(OSError, match="could not write .*out"):
            make()
    assert (folder / "weights").read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def as_nobody(function):
    """What a function raises for a user whom permissions bind."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            function()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as told:
        return told.read()


def test_a_folder_that_one_may_only_read(tmp_path):
    """Whether a run is using it cannot be told, which does not hinder reading; that it cannot be written is told."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"output_dir=.*: nothing can be written into {tmp_path}/file: choose another"):
        check_writable(tmp_path / "file" / "a" / "b", "output_dir")
    check_writable(tmp_path / "a" / "b", "output_dir")
    # Others may not even look into the folders of a test.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        folder.mkdir()

        def lock():
            return Lock(folder / "lock", "it is in use")

        with lock():
            pass
        # Of a process that is no more.
        left = folder / f".report.json-writing-{socket.gethostname().replace('-', '_')}-4194305-abc"
        left.touch()
        for place, mode in ((folder / "lock", 0o444), (folder, 0o555), (folder.parent, 0o755)):
            place.chmod(mode)
        assert "Permission" in as_nobody(lambda: lock().__enter__())
        assert as_nobody(lambda: lock().check()) == ""
        assert as_nobody(lambda: finish_interrupted(folder)) == ""
        wanted = f"ValueError: output_dir={folder}/a/b: nothing can be written into {folder}: choose another folder"
        assert as_nobody(lambda: check_writable(folder / "a" / "b", "output_dir")) == wanted
        folder.chmod(0o755)
        finish_interrupted(folder)
        assert not left.exists()
