"""Several processes of one run, and what a launcher or an environment may ask for and not get."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sa_diffusers import SelectiveAmnesiaConfig
from sa_diffusers.commands.parser import one_line_errors
from sa_diffusers.environment import create_accelerator
from sa_diffusers.processes import Interrupted, Lock, Pace, finishing, shrinking, wait_until, watching
from sa_diffusers.training.validation import Validation

from .conftest import REPOSITORY, as_flags
from .hub_server import HubServer
from .nursery import forked, forked_code
from .test_train_script import quick

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCRIPT = str(REPOSITORY / "examples" / "train_sa.py")
# A global batch of 6, whatever the number of processes; two steps of Adam, whose first moves every weight by the rate.
STEPS = {"max_train_steps": 3, "logging_steps": 1, "lr_scheduler": "cosine", "use_ema": True, "sample_batch_size": 2,
         "checkpointing_steps": 1, "num_replay_images": 12, "num_surrogate_images": 6,
         "num_fisher_samples": 4}  # fmt: skip


def environment(folder) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "SA_DIFFUSERS_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(REPOSITORY)}  # fmt: skip


def torchrun(count: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]


def launch(count: int, arguments, folder, launcher=None, script=SCRIPT, **more) -> subprocess.CompletedProcess:
    """The command in several processes, by a launcher if one is given, with further variables of the environment."""
    if launcher:
        command = [sys.executable, *launcher, SCRIPT, *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600
        )  # fmt: skip
    return forked(script, arguments, folder, environment(folder) | more, count)


def update(folder, base) -> dict[str, torch.Tensor]:
    after, before = load_file(folder / WEIGHTS), load_file(base / WEIGHTS)
    return {name: after[name] - before[name] for name in after}


def assert_same_update(first, second):
    """To rounding: Adam turns the rounding of a gradient that is zero into steps of its own, in a few elements."""
    pairs = [((first[name] - second[name]).abs(), first[name].abs()) for name in first]
    apart = sum(int((gap > 1e-3 * size + 1e-7).sum()) for gap, size in pairs)
    total = sum(gap.numel() for gap, _ in pairs)
    assert apart <= 1e-3 * total, (apart, total)


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """The whole command alone, in two processes and in three that a launcher starts, from start to report and card."""
    results = {}
    for count in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"processes-{count}")
        arguments = quick(tiny_folder, **STEPS, train_batch_size=6 // count, output_dir="out")
        results[count] = (folder, launch(count, arguments, folder, torchrun(3) if count == 3 else None))
    return results


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_steps_in_any_number_of_processes(runs, count, tiny_folder):
    for folder, result in (runs[1], runs[count]):
        assert result.returncode == 0, result.stderr
        for name in ("report.json", "before_after.png", "README.md", "report.html"):
            assert (folder / "out" / name).is_file(), name
    alone, together = runs[1][0] / "out", runs[count][0] / "out"
    assert_same_update(update(alone, tiny_folder), update(together, tiny_folder))
    first, second = (json.loads((folder / "training_history.json").read_text()) for folder in (alone, together))
    for name in ("surrogate_loss", "replay_loss", "ewc_penalty", "learning_rate"):
        assert [row[name] for row in first] == pytest.approx([row[name] for row in second], rel=1e-3), name
    assert runs[count][1].stdout.count("prompted with") == 1  # one process speaks


@pytest.mark.parametrize("count", [2, 3])
def test_all_processes_are_in_the_cost(runs, count):
    alone, together = (json.loads((runs[each][0] / "out" / "report.json").read_text())["cost"] for each in (1, count))
    assert alone["training"]["backward"] == 3 * (6 + 6)
    assert alone == together


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_samples_and_the_same_fisher_information(runs, count):
    def kept(folder):
        return {path.name: path for path in (folder / "cache").iterdir() if not path.name.startswith(".")}

    alone, together = kept(runs[1][0]), kept(runs[count][0])
    names = [name for name in alone if name.startswith(("surrogate", "replay", "concept", "fisher"))]
    assert len(names) == 4
    assert set(names) <= set(together)
    for name in names:
        file = "fisher.safetensors" if name.startswith("fisher") else "samples.safetensors"
        first, second = load_file(alone[name] / file), load_file(together[name] / file)
        for key, value in first.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(second[key], value, rtol=1e-3, atol=1e-5 * scale)


def test_several_processes_agree_on_what_is_finished(runs, tiny_folder):
    """The settings that changed are rewritten by one while the others look at the folder."""
    folder, _ = runs[2]
    arguments = quick(tiny_folder, **STEPS, train_batch_size=3, output_dir="out")
    weights = (folder / "out" / WEIGHTS).stat().st_mtime_ns
    changed = launch(2, [*arguments, "--num_eval_images", "3"], folder)
    again = launch(2, [*arguments, "--num_eval_images", "3"], folder)
    for result in (changed, again):
        assert result.returncode == 0, result.stderr
        assert "forgetting" not in result.stderr
        assert result.stderr.count("holds this very erasure") == 1
        assert result.stdout.count("prompted with") == 1
    assert (folder / "out" / WEIGHTS).stat().st_mtime_ns == weights
    assert "sampling" not in again.stderr


def test_one_process_finishes_an_interrupted_move_and_the_others_wait(tmp_path):
    """An evaluation begins with it, before its processes have joined."""
    folder = tmp_path / "erased"
    (folder / ".saved" / "unet").mkdir(parents=True)
    script = (
        "import os, time\nfrom pathlib import Path\n"
        "from sa_diffusers.files import folders\nfrom sa_diffusers.output_folder import check_written\n"
        "move_in = folders._move_in\n"
        "def slow(folder):\n    print(os.environ['RANK'], 'moves')\n    time.sleep(2)\n    move_in(folder)\n"
        "folders._move_in = slow\n"
        f"check_written({str(folder)!r})\n"
        f"print(os.environ['RANK'], 'sees', *sorted(os.listdir({str(folder)!r})))\n"
    )
    result = forked_code(script, tmp_path, environment(tmp_path), processes=3)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["0 moves", "0 sees unet", "1 sees unet", "2 sees unet"]


WHEN_THEY_PART = """
import torch
from sa_diffusers.commands.erase import main
from sa_diffusers.stages import PushStage, ReportStage

def told(run):
    def tell(stage, *inputs):
        print(stage.title, "joined" if torch.distributed.is_initialized() else "alone", flush=True)
        return run(stage, *inputs)
    return tell

for kind in (ReportStage, PushStage):
    kind.run = told(kind.run)
main()
"""


@pytest.mark.long
def test_one_process_scores_and_uploads_and_no_other_waits_for_it(runs, tiny_folder, tmp_path):
    """To leave the group is a collective of NCCL's too, which holds whoever comes first."""
    folder, _ = runs[2]
    (tmp_path / "told.py").write_text(WHEN_THEY_PART)
    flags = ["--num_eval_images", "4", "--push_to_hub", "--hub_model_id", "tester/two"]
    arguments = [*quick(tiny_folder, **STEPS, train_batch_size=3, output_dir="out"), *flags]
    with HubServer() as hub:
        there = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        results = [launch(2, arguments, folder, script=tmp_path / "told.py", **there) for _ in range(2)]
        pushed = hub.files["tester/two"]
    for result in results:
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("push alone") == 1
        assert "joined" not in result.stdout
        assert result.stdout.count(f"hub       {hub.address}/tester/two") == 1
    # The second has nothing left to score.
    assert [result.stdout.count("scoring alone") for result in results] == [1, 0]
    for name in ("model_index.json", "before_after.png", WEIGHTS):
        assert pushed[name] == (folder / "out" / name).read_bytes()
    assert json.loads(pushed["report.json"])["rows"][0]["images"] == 4


def test_three_processes_go_on_to_the_same_bits(runs, tiny_folder, tmp_path):
    """Buckets that are rebuilt after the first step sum in another order, which two processes cannot tell."""
    folder = shutil.copytree(runs[3][0], tmp_path / "copy")
    shutil.rmtree(folder / "out" / "checkpoint-2")
    (folder / "out" / ".selective_amnesia" / "finished.json").unlink()
    result = launch(3, quick(tiny_folder, **STEPS, train_batch_size=2, output_dir="out"), folder)
    assert result.returncode == 0, result.stderr
    assert "goes on after step 1" in result.stdout
    assert (folder / "out" / WEIGHTS).read_bytes() == (runs[3][0] / "out" / WEIGHTS).read_bytes()


def stopped_after_a_checkpoint(command: list[str], folder) -> str:
    """What two processes write that are asked to stop, once there is a checkpoint."""
    with subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:  # fmt: skip
        deadline = time.monotonic() + 300
        while not list((folder / "out").glob("checkpoint-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("stopped: SIGTERM after step") == 1
    return output


@pytest.mark.long
def test_a_run_goes_on_in_another_number_of_processes(runs, tiny_folder, tmp_path):
    """Two processes are asked to stop, with a checkpoint at the same step; one ends what they began."""
    settings = {**STEPS, "max_train_steps": 400, "lr_scheduler": "constant", "output_dir": "out"}
    further = quick(tiny_folder, **settings, train_batch_size=3)
    command = [sys.executable, *torchrun(2), SCRIPT, *further]
    output = stopped_after_a_checkpoint(command, tmp_path)
    assert "The same command goes on from there" in output
    newest = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "out").glob("checkpoint-*"))
    arguments = quick(tiny_folder, **{**settings, "max_train_steps": newest + 2}, train_batch_size=6)
    result = launch(1, arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"checkpoint-{newest} goes on with max_train_steps={newest + 2} (was 400)" in result.stderr
    steps = [row["step"] for row in json.loads((tmp_path / "out" / "training_history.json").read_text())]
    assert steps == list(range(1, newest + 3))


# A run that finds its settings in twenty steps and reads its probes after 10, 20 and 30: in the first two readings they
# are content with little, images say otherwise, and at the third it is at its limit.
PROBED = {
    "concept": "brad pitt", "surrogate": "a middle aged man", "num_surrogate_images": 12, "num_replay_images": 12,
    "num_inference_steps": 2, "sample_batch_size": 4, "num_fisher_samples": 2, "fisher_timesteps": 2,
    "num_eval_images": 2, "num_probe_images": 8, "num_neighbour_images": 6, "max_train_steps": 30,
    "logging_steps": 1, "checkpointing_steps": 10,
    "gradient_accumulation_steps": 1, "checkpoints_total_limit": 9, "output_dir": "out", "report_to": "none",
    "forget_target": 0.001, "drift_tolerance": 900,
}  # fmt: skip


def probed_flags(base, count: int) -> list[str]:
    return as_flags({**PROBED, "pretrained_model_name_or_path": str(base), "train_batch_size": 16 // count})


@pytest.fixture(scope="module")
def probed(tiny_folder, tmp_path_factory):
    """A command that measures itself, alone and in two processes."""
    folders = {}
    for count in (1, 2):
        folders[count] = tmp_path_factory.mktemp(f"probed-{count}")
        result = launch(count, probed_flags(tiny_folder, count), folders[count])
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("the probes: at the limit of 30 steps: 8 of 8 images still showed it") == 1
        assert result.stderr.count("after step 20 8 of 8 images still show the concept: on") == 1
    return folders


def controls(folder) -> dict[int, dict]:
    """What the controller goes on from, after its readings but the last."""
    return {step: json.loads((folder / "out" / f"checkpoint-{step}" / "state.json").read_text())["control"]
            for step in (10, 20)}  # fmt: skip


@pytest.mark.long
def test_a_run_measures_and_decides_the_same_in_two_processes(probed, tiny_folder):
    first, second = controls(probed[1]), controls(probed[2])
    assert first[20]["checks"] == [{"step": 20, "showing": 8, "images": 8}]
    for step, control in first.items():
        other = second[step]
        for name in ("rate", "calibrated", "ewc_scale", "balance", "pace", "target", "norms"):
            assert other[name] == pytest.approx(control[name], rel=1e-3), name
        for name in ("passes", "at_bound", "checks"):
            assert other[name] == control[name], name
        assert [reading["step"] for reading in other["readings"]] == list(range(10, step + 1, 10))
        for mine, theirs in zip(control["readings"], other["readings"], strict=True):
            assert theirs == pytest.approx(mine, rel=1e-2, abs=1e-4)
    assert_same_update(update(probed[1] / "out", tiny_folder), update(probed[2] / "out", tiny_folder))
    endings = [json.loads((probed[count] / "out" / "training_ending.json").read_text()) for count in probed]
    assert endings[0] == endings[1]


@pytest.mark.long
def test_two_processes_go_on_from_a_checkpoint_as_if_nothing_had_been(probed, tiny_folder, tmp_path):
    command = [sys.executable, *torchrun(2), SCRIPT, *probed_flags(tiny_folder, 2)]
    output = stopped_after_a_checkpoint(command, tmp_path)
    assert "goes on after step" not in output
    result = launch(2, probed_flags(tiny_folder, 2), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "goes on after step" in result.stdout
    assert_same_run(probed[2], tmp_path)


def assert_same_run(first, second):
    for name in ("training_history.json", "training_ending.json"):
        assert json.loads((second / "out" / name).read_text()) == json.loads((first / "out" / name).read_text()), name
    before, after = (load_file(folder / "out" / WEIGHTS) for folder in (first, second))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


ONE_IS_STOPPED = """
import os, signal
from sa_diffusers import objective_for
from sa_diffusers.commands.erase import main

def build(*arguments):
    objective = objective_for(*arguments)
    loss, steps = objective.negative_elbo, []

    def negative_elbo(*inputs):
        steps.extend([None] if objective.module.training else [])
        if len(steps) == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*inputs)

    objective.negative_elbo = negative_elbo
    return objective

main(build_objective=build)
"""


@pytest.mark.long
def test_a_signal_that_reaches_one_process_alone_stops_all_in_the_search_for_the_settings(
    probed, tiny_folder, tmp_path
):
    (tmp_path / "one_is_stopped.py").write_text(ONE_IS_STOPPED)
    launcher = [*torchrun(2), "one_is_stopped.py"]
    result = subprocess.run([sys.executable, *launcher, *probed_flags(tiny_folder, 2)], cwd=tmp_path,
                            env=environment(tmp_path), capture_output=True, text=True, timeout=600)  # fmt: skip
    assert result.returncode != 0
    # The main process was told by the other, not by the launcher that found that one dead.
    assert result.stderr.count("stopped: another process was asked to stop. The same command goes on") == 1
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    again = launch(2, probed_flags(tiny_folder, 2), tmp_path)
    assert again.returncode == 0, again.stderr
    assert_same_run(probed[2], tmp_path)


@pytest.mark.long
def test_a_configuration_of_gpus_joins_the_processes_of_a_machine_without(tiny_folder, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nnum_machines: 1\n"
        "mixed_precision: 'no'\nmachine_rank: 0\nmain_training_function: main\nuse_cpu: false\n"
    )
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "config.yaml"]
    arguments = quick(tiny_folder, output_dir="out")
    result = launch(2, arguments, tmp_path, launcher)
    assert result.returncode == 0, result.stderr
    assert "train     4 steps of 4 + 4 images" in result.stdout
    assert result.stdout.count("\nPlan\n") == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is in the environment, but no RANK"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x is in the environment, which is no whole number"),
        ({"MASTER_PORT": "1e4"}, "MASTER_PORT=1e4 is in the environment, which is no whole number"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR is in the environment.*no RANK"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP is asked for .*not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is asked for .*not supported"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "give --gradient_accumulation_steps 4, or unset"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_environment_asks_for_and_would_not_get_is_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        create_accelerator(SelectiveAmnesiaConfig(report_to="none"))


def test_an_accumulation_that_the_environment_repeats_is_divided_by_once(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = create_accelerator(SelectiveAmnesiaConfig(report_to="none", gradient_accumulation_steps=4))
    weight = torch.nn.Parameter(torch.ones(()))
    accelerator.backward(weight * 3)
    assert weight.grad == 3


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    script = (
        "import sys, time\nfrom sa_diffusers.processes import Lock\n"
        f"with Lock({str(tmp_path / 'lock')!r}, 'in use'):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    lock = Lock(tmp_path / "lock", "in use by another run")
    with subprocess.Popen([sys.executable, "-c", script], env=environment(tmp_path), stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="in use by another run"), lock:
            pass
        with pytest.raises(ValueError, match="in use by another run"):
            lock.check()
        holder.kill()
    with lock:
        pass


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_a_run_with_one_line_and_a_code_of_its_own(tiny_folder, tmp_path, name):
    command = [sys.executable, SCRIPT, *quick(tiny_folder, max_train_steps=400, output_dir="out")]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:  # fmt: skip
        deadline = time.monotonic() + 300
        output = ""
        while "forgetting" not in output:
            assert process.poll() is None and time.monotonic() < deadline
            output += process.stdout.read(64)
        process.send_signal(getattr(signal, name))
        output += process.stdout.read()
    assert process.returncode == 75, output
    assert output.count("stopped: ") == 1
    assert f"stopped: {name}" in output and "Traceback" not in output


@pytest.mark.long
def test_a_launcher_that_vanishes_takes_its_run_with_it(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", SCRIPT,
               *quick(tiny_folder, max_train_steps=2000, output_dir="out")]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stdout=file, stderr=file)
        deadline = time.monotonic() + 300
        while "forgetting" not in log.read_text():
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        launcher.kill()
        launcher.wait()
        while "stopped: " not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert "stopped: the launcher is gone after step" in log.read_text()
    assert list((tmp_path / "out").glob("checkpoint-*"))


def test_waiting_for_another_process_is_no_collective():
    answers = iter([False, False, True])
    wait_until(lambda: next(answers))
    with pytest.raises(StopIteration):
        next(answers)


def test_who_is_told_to_stop_waits_for_the_checkpoint_that_another_writes(tmp_path):
    writing = threading.Timer(0.3, (tmp_path / "state.json").touch)
    with pytest.raises(Interrupted, match="SIGTERM"), watching(), finishing():
        os.kill(os.getpid(), signal.SIGTERM)
        writing.start()
        wait_until((tmp_path / "state.json").is_file, patience=60)
        assert (tmp_path / "state.json").is_file()
        with pytest.raises(Interrupted):
            wait_until(lambda: False, patience=0.1)
        (tmp_path / "reached").touch()
    assert (tmp_path / "reached").is_file()


def test_who_is_told_to_stop_does_not_wait_for_images(tmp_path):
    """It meets the others in the next step, so that all write one checkpoint."""
    config = SelectiveAmnesiaConfig(validation_prompts=["cat"])
    validation = Validation(None, config, SimpleNamespace(is_main_process=False), tmp_path)
    with pytest.raises(Interrupted, match="SIGTERM"), watching(), finishing():
        os.kill(os.getpid(), signal.SIGTERM)
        validation.run(100)
        (tmp_path / "reached").touch()
    assert (tmp_path / "reached").is_file()


def test_memory_is_shared_out_until_it_suffices(capsys):
    tried = []

    def needs(size):
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return size

    assert shrinking(needs, 8, "sample_batch_size") == 2
    assert tried == [8, 4, 2]
    assert "going on with --sample_batch_size 4" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lower --train_batch_size .now 8."):
        shrinking(needs, 8, "train_batch_size", processes=2)
    with pytest.raises(RuntimeError, match="another reason"):
        shrinking(lambda _: (_ for _ in ()).throw(RuntimeError("another reason")), 8, "x")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_memory_that_runs_out_outside_of_batches_is_one_line(error):
    with pytest.raises(SystemExit, match="^error: memory ran out .*: give smaller batches"), one_line_errors():
        raise error


def test_the_pace_follows_the_cost():
    pace = Pace(share=0.5, cost=0.2)
    assert not pace.due()
    time.sleep(0.45)
    assert pace.due()
    began = time.monotonic()
    pace.done(began)
    assert pace.cost < 0.1
