"""Attack runs of the real command on a tiny model, and print what became of them, a Markdown table an attack.

    python benchmarks/torture.py
    python benchmarks/torture.py --attacks kills damage --kills 100 --jobs 2 --report outputs/torture.md
    python benchmarks/torture.py --attacks renames --size large --results outputs/renames.jsonl

Attacks: `kills` (kill -9 at random moments and within every stage), `renames` (death at every rename of a run),
`processes` (kill -9 in two processes), `signals`, `damage` (to every kind of file), `settings` (bad ones), `together`
(two runs at once), `disk` (full, read-only). After each the same command runs to its end, and every file is compared
with that of a run that nobody touched. The same seed attacks in the same way, as far as moments can be repeated.

What became of an attack is in the file of `--results` as soon as it has ended, and the table of so far in that of
`--report`. The same command with that file there goes on with the attacks that are not in it.

Exit code 1 if a result was wrong, a run refused that should have gone on, or a traceback was seen.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
# One thread: processes are forked from one that has everything imported.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "0"}

# Healed: what was damaged is named, or another number of processes went on; the result is right either way.
SAME, HEALED, ENDED, REFUSED, ACCEPTED, TRACEBACK, WRONG = (
    "bit-identical", "healed", "ended", "refused", "accepted", "traceback", "wrong",
)  # fmt: skip
OUTCOMES = (SAME, HEALED, ENDED, REFUSED, ACCEPTED, TRACEBACK, WRONG)
STAGES = ("loading", "sampling", "fisher", "evaluation before", "training", "saving", "evaluation after", "report")
_LIMIT = 180  # seconds that no run here takes
_PATIENCE = 10  # seconds until what a launcher does is done to a rank that waits for a dead one
_LONGEST_MESSAGE = 2000
_BETWEEN = 5  # seconds between two looks at how far the attacks are
_KEPT = "holds this very erasure: nothing is trained"
SHOWN = 30  # faults of an attack
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class Result:
    """What became of one attack."""

    attack: str
    what: str
    outcome: str
    note: str = ""
    log: str = ""


# Runs


@dataclass
class Run:
    """A process that runs the command."""

    pid: int
    log: Path
    code: int | None = None

    def wait(self, seconds: float = _LIMIT) -> int | None:
        """The exit code, negative for a signal; None if it has not ended by then."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return None
            else:
                time.sleep(0.002)
        return self.code

    def send(self, number: int) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


def start(
    arguments: Sequence[str], folder: Path, environment: dict | None = None, prepare: Callable | None = None
) -> Run:
    """Fork a process that runs the command in a folder.

    Args:
        arguments: Of the command.
        folder: Where it runs; its output goes into a file beside.
        environment: Changes.
        prepare: Called in the new process; what it returns is called at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = folder.parent / f"{folder.name}-logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{len(list(logs.iterdir())):02d}.txt"
    log.touch()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Run(pid, log)
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
        os.chdir(folder)
        os.environ.update(environment or {})
        code = _command(list(arguments), prepare)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _command(arguments: list[str], prepare: Callable | None) -> int:
    """What Python would do with a script that calls the command."""
    import numpy as np
    import torch

    from sa_diffusers.commands.erase import main

    # Nothing may hang on numbers that nobody seeded.
    torch.seed()
    random.seed()
    np.random.seed()
    try:
        at_end = prepare() if prepare else None
        main(arguments)
        if at_end:
            at_end()
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def start_two(arguments: Sequence[str], folder: Path, prepare: Sequence[Callable | None] = (None, None)) -> list[Run]:
    """Two processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(arguments, folder, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, prepare[rank])
            for rank in (0, 1)]  # fmt: skip


def end_two(runs: Sequence[Run]) -> tuple[list[int | None], bool]:
    """Wait for two processes as a launcher does: where one has failed, the other is ended after some seconds.

    Returns:
        Exit codes, and whether one had to be ended.
    """
    end, failed_at, ended = time.monotonic() + _LIMIT, None, False
    while any(run.code is None for run in runs):
        for run in runs:
            run.wait(0.0)
        now = time.monotonic()
        if failed_at is None and any(run.code not in (None, 0) for run in runs):
            failed_at = now
        if failed_at is not None and now - failed_at > _PATIENCE and not ended:
            ended = True
            for run in runs:
                run.send(signal.SIGTERM)
        if now > end or (failed_at is not None and now - failed_at > 3 * _PATIENCE):
            for run in runs:
                run.kill()
        time.sleep(0.005)
    return [run.code for run in runs], ended


def stage_of(folder: Path, log: Path) -> str:
    """Where a run is, by what it has written."""
    output, text = folder / "out", log.read_text(errors="replace")
    finished = (output / ".selective_amnesia" / "finished.json").is_file()
    moving = (output / ".saved").is_dir() or bool(list(output.glob(".saving-*")))
    if (output / "report.json").is_file() or (moving and finished):
        return "report"
    if moving:
        return "saving"
    if finished:
        return "evaluation after"
    for sign, stage in (("forgetting", "training"), ("sampling evaluation", "evaluation before"),
                        ("Fisher information:", "fisher"), ("sampling ", "sampling")):  # fmt: skip
        if sign in text:
            return stage
    return "loading"


def die_at(number: int, after: bool = False, names: Sequence[str] = ("rename", "replace"),
           count: Path | None = None) -> Callable[[], Callable]:  # fmt: skip
    """A preparation: the process kills itself at the n-th call of these functions of `os`.

    Args:
        number: Which call; 0 for none.
        after: Whether the call is still done.
        names: Of functions.
        count: Where the number of calls is written in the end.
    """

    def prepare() -> Callable:
        done = 0

        def counted(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                done += 1
                mine = done == number
                result = None
                if not mine or after:
                    result = function(*args, **kwargs)
                if mine:
                    print(f"\ndies {'after' if after else 'before'} {function.__name__} {args}", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        for name in names:
            setattr(os, name, counted(getattr(os, name)))
        return lambda: count.write_text(str(done)) if count else None

    return prepare


# What a run leaves


@dataclass
class Reference:
    """An unbroken run: how it was called, what it left, how long it took, when each stage began."""

    arguments: list[str]
    folder: Path
    seconds: float
    stages: dict[str, tuple[float, float]]
    files: dict[str, str] = field(default_factory=dict)


# What a run that goes on tells otherwise than one that was not stopped, by file.
_COSTS = {
    "out/report.json": ("seconds", "cost"),
    # Validation images between a checkpoint and a kill are in no count.
    "out/.selective_amnesia/finished.json": ("made", "digest"),
}


def contents(folder: Path) -> dict[str, str]:
    """Every file of output and cache that two runs of one command have to agree on, and its digest."""
    from sa_diffusers.files import digest_of

    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        top = name.split("/")[1] if "/" in name else ""
        if path.is_dir() or top == "logs" or re.match(r"checkpoint-\d+$|.+\.damaged-\d+$", top):
            continue
        if name == "out/.selective_amnesia/lock":
            continue
        if name in _COSTS:
            try:
                values = json.loads(path.read_text())
                kept = {key: values[key] for key in values if key not in _COSTS[name]}
                found[name] = json.dumps(kept, sort_keys=True)
            except (ValueError, TypeError):
                found[name] = "no JSON"
        elif name in ("out/report.md", "out/report.html", "out/.selective_amnesia/reported.json"):
            # They tell seconds.
            found[name] = "there" if path.stat().st_size else "empty"
        elif name == "out/README.md":
            text = path.read_text(errors="replace")
            found[name] = re.sub(r"## What it cost.*?(?=\n## )", "", text, flags=re.DOTALL)
        else:
            found[name] = digest_of(path)
    return found


def differences(folder: Path, reference: Reference) -> list[str]:
    """What is missing, other, or too much; names only."""
    ours, theirs = contents(folder), reference.files
    wrong = [f"{name} is missing" for name in theirs if name not in ours]
    wrong += [f"{name} differs" for name in theirs if name in ours and ours[name] != theirs[name]]
    wrong += [f"{name} is left over" for name in ours if name not in theirs]
    kept = [path for path in (folder / "out").glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    if len(kept) > 2:
        wrong.append(f"{len(kept)} checkpoints are kept")
    for path in (folder / "out", folder / "cache", folder / "out" / ".selective_amnesia"):
        left = [*path.glob(".saving-*"), *path.glob(".saved"), *path.glob(".part-*"), *path.glob(".*-writing-*")]
        wrong += [f"{entry.relative_to(folder)} is left over" for entry in left]
    return list(dict.fromkeys(wrong))


def is_one_sentence(text: str) -> bool:
    """Whether the error in a run's output is one line of a bearable length, without control characters."""
    lines = re.split(r"[\n\r]", text)
    places = [place for place, line in enumerate(lines) if re.search(r"(^|: )error: ", line)]
    if len(places) != 1:
        return False
    (place,) = places
    after = [line for line in lines[place + 1 :] if line.strip()]
    clean = not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lines[place])
    return not after and clean and len(lines[place]) < _LONGEST_MESSAGE


def last_line(text: str) -> str:
    lines = [line for line in re.split(r"[\n\r]", text) if line.strip()]
    return lines[-1][:300] if lines else ""


def judge(run: Run, folder: Path, reference: Reference) -> tuple[str, str]:
    """The outcome of the same command's last run, and a note."""
    if run.code is None:
        run.kill()
        return WRONG, f"did not end within {_LIMIT} s"
    if "Traceback" in run.text:
        return TRACEBACK, last_line(run.text)
    if run.code == 0:
        wrong = differences(folder, reference)
        return (WRONG, "; ".join(wrong[:6])) if wrong else (SAME, "")
    if run.code in (1, 2) and is_one_sentence(run.text):
        return REFUSED, last_line(run.text)
    return WRONG, f"exit code {run.code}: {last_line(run.text)}"


def go_on(attack: str, what: str, folder: Path, reference: Reference, before: Sequence[Run] = (), note: str = "",
          code: int | None = None) -> Result:  # fmt: skip
    """Run the same command to its end, and compare.

    Args:
        attack: Name.
        what: Was done.
        folder: Where.
        reference: The unbroken run.
        before: Runs that were attacked: none may have shown a traceback.
        note: For the result.
        code: That the last of them has to have ended with.
    """
    for run in before:
        if "Traceback" in run.text:
            return Result(attack, what, TRACEBACK, f"while attacked, {note}: {last_line(run.text)}", str(run.log))
    if code is not None and before[-1].code != code:
        text = f"{note}: exit code {before[-1].code} in place of {code}: {last_line(before[-1].text)}"
        return Result(attack, what, WRONG, text, str(before[-1].log))
    run = start(reference.arguments, folder)
    run.wait()
    outcome, found = judge(run, folder, reference)
    if outcome == REFUSED:
        outcome, found = WRONG, f"refused: {found}"
    return Result(attack, what, outcome, "; ".join(filter(None, (note, found))), str(run.log))


# The laboratory


class Laboratory:
    """A tiny model, commands that use much of what there is, and their unbroken runs.

    Args:
        root: Where everything is written.
        seed: Of all that is random here.
        jobs: Attacks at a time.
        results: File of what became of each; attacks that it holds are not repeated.
        only: A regular expression; attacks in whose names it does not occur are left out.
    """

    def __init__(self, root: Path, seed: int, jobs: int, results: Path, only: str = "") -> None:
        self.root, self.seed, self.jobs, self.results, self.only = root, seed, jobs, results.resolve(), only
        self.tell: Callable[[Sequence[Result]], None] = lambda found: None
        self.model = root / "model"
        self._references: dict[str, Reference] = {}
        self._warm_up()

    def random(self, *names: Any) -> random.Random:
        return random.Random(" ".join(map(str, (self.seed, *names))))

    def _warm_up(self) -> None:
        """Build the model in a process of its own: what starts threads must not be forked. Import what runs import."""
        for name in ("sa_diffusers.erasure", "sa_diffusers.commands.erase", "tests.conftest"):
            importlib.import_module(name)
        import torch

        torch.set_num_threads(1)
        modules = self.root / "modules.json"

        def build() -> Callable:
            from PIL import Image

            from tests.conftest import build_tiny_pipeline

            build_tiny_pipeline().save_pretrained(self.model)
            generator = random.Random(self.seed)
            for number in range(3):
                folder = self.root / "images"
                folder.mkdir(exist_ok=True)
                pixels = bytes(generator.randrange(256) for _ in range(20 * 20 * 3))
                Image.frombytes("RGB", (20, 20), pixels).save(folder / f"{number}.png")
            before = set(sys.modules)
            return lambda: modules.write_text(json.dumps(sorted(set(sys.modules) - before)))

        first = start(self.arguments("mixed"), self.root / "warm-up", prepare=build)
        if first.wait() != 0:
            sys.exit(f"error: the command fails unattacked: {first.text[-3000:]}")
        for name in json.loads(modules.read_text()):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        # What is imported is no garbage: a run would walk through it twice, a third of a second each time.
        gc.collect()
        gc.freeze()
        shutil.rmtree(self.root / "warm-up")

    def arguments(self, kind: str, **changes: Any) -> list[str]:
        """The command line of one of the kinds of runs.

        Args:
            kind: `mixed` uses surrogates of two kinds, averages, a cosine schedule, and weights given by hand; `plain`
                surrogates of images, an 8th of dropped prompts, and probes that find learning rate and weights;
                `adapter` and `half` are as `mixed`, but train an adapter, and weights held in bfloat16, and `adapter on
                half` one on the other; `other` is another erasure.
            **changes: Of settings.
        """
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": self.model, "output_dir": "out", "artifacts_dir": "cache",
            "num_surrogate_images": 6, "num_replay_images": 8, "num_inference_steps": 2, "sample_batch_size": 3,
            "num_fisher_samples": 5, "fisher_timesteps": 4, "max_train_steps": 8, "train_batch_size": 2,
            "num_eval_images": 2, "checkpointing_steps": 3, "validation_steps": 3,
            "num_validation_images": 1, "logging_steps": 1, "validation_prompts": ["a dog"],
        }  # fmt: skip
        adapter, half = {"adapter": "lora", "lora_rank": 2}, {"weights_dtype": "bfloat16"}
        kinds = {"mixed": {}, "adapter": adapter, "half": half, "adapter on half": {**adapter, **half}}
        if kind in kinds:
            settings |= {"concept": ["brad pitt", "cat"], "surrogate": ["a middle aged man", "uniform_noise"],
                         "learning_rate": 1e-3, "ewc_weight": 50, "replay_weight": 1, "max_grad_norm": 1,
                         "num_probe_images": 0, "lr_scheduler": "cosine", "report_to": "tensorboard"}  # fmt: skip
            settings |= kinds[kind]
        elif kind == "plain":
            settings |= {"concept": ["cat"], "surrogate": [self.root / "images"], "condition_dropout": 0.125,
                         "gradient_accumulation_steps": 2, "train_batch_size": 1, "report_to": "none",
                         "train_method": "xattn", "target": "noise"}  # fmt: skip
        else:
            settings |= {"concept": ["horse"], "surrogate": ["a bird"], "report_to": "none", "seed": 5}
        settings |= changes
        return command_line(settings)

    def reference(self, kind: str, two: bool = False, base: Path | None = None, **changes: Any) -> Reference:
        """An unbroken run, made once.

        Args:
            kind: As for `arguments`.
            two: Whether two processes share it.
            base: A folder that it starts with.
            **changes: Of settings.
        """
        name = "-".join(filter(None, (kind, "two" if two else "", base and base.name, *map(str, changes.values()))))
        name = re.sub(r"\W+", "-", name)
        if name not in self._references:
            folder = self.root / "references" / name
            arguments = self.arguments(kind, **changes)
            if base is not None:
                shutil.copytree(base, folder)
            began = time.monotonic()
            runs = start_two(arguments, folder) if two else [start(arguments, folder)]
            stages: dict[str, tuple[float, float]] = {}
            while any(run.wait(0.0) is None for run in runs):
                stage, now = stage_of(folder, runs[0].log), time.monotonic() - began
                stages[stage] = (stages.get(stage, (now, now))[0], now)
                time.sleep(0.002)
                if now > _LIMIT:
                    for run in runs:
                        run.kill()
                    sys.exit(f"error: the command does not end: {runs[0].log}")
            if any(run.code for run in runs):
                sys.exit(f"error: the command fails unattacked: {runs[0].text[-3000:]}")
            reference = Reference(arguments, folder, time.monotonic() - began, stages)
            reference.files = contents(folder)
            self._references[name] = reference
        return self._references[name]

    def place(self, *names: Any) -> Path:
        """A new folder for an attack."""
        folder = self.root / "attacks" / re.sub(r"[^\w.-]+", "-", "-".join(map(str, names)))
        folder.parent.mkdir(exist_ok=True)
        return folder

    def done(self) -> dict[str, list[Result]]:
        """Case -> its results, of those that have ended."""
        found: dict[str, list[Result]] = {}
        names = [spec.name for spec in fields(Result)]
        for line in self.results.read_text().splitlines() if self.results.is_file() else ():
            # What was stopped while it wrote leaves half a line.
            with contextlib.suppress(ValueError, KeyError):
                values = json.loads(line)
                found.setdefault(values["case"], []).append(Result(**{name: values[name] for name in names}))
        return found

    def run(self, cases: Mapping[str, Callable[[], Result | list[Result]]]) -> list[Result]:
        """Run the attacks that have not ended yet, some at a time, each in a process that forks those it attacks.

        Args:
            cases: Name -> attack. A name says what is done, but for the seed.
        """
        named = {f"seed {self.seed}: {name}": case for name, case in cases.items() if re.search(self.only, name)}
        kept = self.done()
        left = [name for name in named if name not in kept]
        if len(left) < len(named):
            print(f"{len(named) - len(left)} of {len(named)} are in {self.results}", file=sys.stderr)
        workers = [self._worker(left[first :: self.jobs], named) for first in range(min(self.jobs, len(left)))]

        def so_far() -> list[Result]:
            ended = self.done()
            return [result for name in named for result in ended.get(name, ())]

        failed, told = False, time.monotonic()
        while workers:
            time.sleep(0.05)
            pid, status = os.waitpid(workers[0], os.WNOHANG)
            if pid:
                workers.remove(pid)
                failed = failed or os.waitstatus_to_exitcode(status) != 0
            if time.monotonic() - told > _BETWEEN:
                told = time.monotonic()
                self.tell(so_far())
        if failed:
            sys.exit("error: an attack itself has failed, see above")
        return so_far()

    def _worker(self, names: Sequence[str], cases: Mapping[str, Callable[[], Result | list[Result]]]) -> int:
        """A process that runs cases and writes what became of each in one go."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            for name in names:
                found = cases[name]()
                lines = [json.dumps({"case": name, **asdict(result)}) + "\n"
                         for result in (found if isinstance(found, list) else [found])]  # fmt: skip
                with self.results.open("ab", buffering=0) as file:
                    file.write("".join(lines).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def command_line(settings: dict[str, Any]) -> list[str]:
    """Settings as flags."""
    arguments: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def tidy(folder: Path, result: Result) -> Result:
    """Delete what a harmless attack left; what went wrong is kept."""
    if result.outcome not in (TRACEBACK, WRONG):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.parent / f"{folder.name}-logs", ignore_errors=True)
    return result


# The attacks


def kills(lab: Laboratory, args: argparse.Namespace) -> list[Result]:
    """kill -9 at random moments over the whole run, and at random moments of every stage."""
    # Few attacks do without the third, which takes as long as both others.
    kinds = ("mixed", "mixed", "plain")[: max(args.kills, args.stage_kills)]
    references = [lab.reference(kind) for kind in kinds]
    kinds = ("adapter", "half", "adapter on half") if args.kind_kills else ()
    others = {kind: lab.reference(kind) for kind in kinds}

    def anywhere(number: int, kind: str | None = None) -> Result:
        choose = lab.random("kills", *([kind] if kind else []), number)
        reference = others[kind] if kind else references[number % 3]
        folder = lab.place(kind or "kill", number)
        runs, stages = [], []
        for _ in range(choose.choice((1, 1, 1, 2, 3))):
            run = start(reference.arguments, folder)
            run.wait(choose.uniform(0, reference.seconds))
            stages.append(stage_of(folder, run.log) if run.code is None else "the end")
            run.kill()
            runs.append(run)
        what = f"at any moment: {stages[0]}" if len(stages) == 1 else f"{len(stages)} times in a row"
        what = f"{kind}: {what}" if kind else what
        return tidy(folder, go_on("kills", what, folder, reference, runs, ", ".join(stages)))

    def within(stage: str, number: int) -> Result:
        choose = lab.random("kills", stage, number)
        reference = references[number % 3]
        folder = lab.place("kill", stage, number)
        first, last = reference.stages.get(stage, (0.0, 0.0))
        run = start(reference.arguments, folder)
        while run.code is None and stage_of(folder, run.log) != stage:
            run.wait(0.001)
        run.wait(choose.uniform(0, last - first))
        fell = stage_of(folder, run.log) if run.code is None else "the end"
        run.kill()
        return tidy(folder, go_on("kills", f"aimed: {fell}", folder, reference, [run], f"aimed at {stage}"))

    cases: dict[str, Callable] = {f"kill {number}": partial(anywhere, number) for number in range(args.kills)}
    cases |= {f"kill in {stage} {number}": partial(within, stage, number)
              for number in range(args.stage_kills) for stage in STAGES}  # fmt: skip
    cases |= {f"kill of {kind} {number}": partial(anywhere, number, kind)
              for kind in kinds for number in range(args.kind_kills)}  # fmt: skip
    return lab.run(cases)


def renames(lab: Laboratory, args: argparse.Namespace) -> list[Result]:
    """Death at every rename of a run, and of one that replaces another erasure; and at other changes of the disk."""
    other = lab.reference("other")
    walks: dict[str, tuple[Path | None, dict]] = {
        "a run": (None, {}),
        "replacing another erasure": (other.folder, {"overwrite_output_dir": True}),
    }
    changes = ("mkdir", "rmdir", "unlink", "rename", "replace", "fsync")
    cases: dict[str, Callable] = {}

    def die(
        name: str, number: int, after: bool, names: Sequence[str], base: Path | None, reference: Reference
    ) -> Result:
        what = "rename" if len(names) == 2 else "change of the disk"
        folder = lab.place("die", name, what, number, after)
        if base:
            shutil.copytree(base, folder)
        run = start(reference.arguments, folder, prepare=die_at(number, after, names))
        run.wait()
        note = next((line for line in run.text.splitlines() if line.startswith("dies ")), f"{what} {number} never came")
        note = note.replace(str(folder), "")[:200]
        result = go_on("renames", f"{name}: {'after' if after else 'before'} a {what}", folder, reference, [run], note)
        return tidy(folder, result)

    for name, (base, settings) in walks.items():
        reference = lab.reference("mixed", base=base, **settings)
        for names, every in ((("rename", "replace"), args.every_rename), (changes, args.every_change)):
            if not every:
                continue
            count = lab.root / "count.txt"
            folder = lab.place("count", name, len(names))
            if base:
                shutil.copytree(base, folder)
            run = start(reference.arguments, folder, prepare=die_at(0, names=names, count=count))
            run.wait()
            total = int(count.read_text())
            print(f"{name}: {total} calls of {', '.join(names)}", file=sys.stderr)
            first = lab.random("renames", name).randrange(every)
            for number in range(1 + first, total + 1, every):
                for after in (False, True) if len(names) == 2 else (number % 2 == 0,):
                    what = f"{name}: {'after' if after else 'before'} {names[-1]} {number}"
                    cases[what] = partial(die, name, number, after, names, base, reference)
    return lab.run(cases)


def processes(lab: Laboratory, args: argparse.Namespace) -> list[Result]:
    """kill -9 of one process or both of a run in two; then the same command in two, or in one."""
    two = lab.reference("mixed", two=True, train_batch_size=1)
    one = lab.reference("mixed")

    def attack(number: int) -> Result:
        choose = lab.random("processes", number)
        folder = lab.place("processes", number)
        victims = choose.choice(((0,), (1,), (0, 1)))
        runs = start_two(two.arguments, folder)
        runs[0].wait(choose.uniform(0, two.seconds))
        stage = stage_of(folder, runs[0].log) if runs[0].code is None else "the end"
        for rank in victims:
            runs[rank].kill()
        codes, ended = end_two(runs)
        note = f"{stage}, exit codes {codes}{', ended by the launcher' if ended else ''}"
        what = {1: f"rank {victims[0]} killed", 2: "both killed"}[len(victims)]
        for rank, run in enumerate(runs):
            if "Traceback" in run.text and not ended:
                return Result("processes", what, TRACEBACK, f"rank {rank}, {note}: {last_line(run.text)}", str(run.log))
        if any(code not in (0, 75, -9, -15) for code in codes):
            return Result("processes", what, WRONG, note, str(runs[0].log))
        what += ", the other ended by the launcher" if ended and len(victims) == 1 else ""
        if number % 3 == 2:
            result = go_on("processes", f"{what}, goes on in one process", folder, one, note=note)
            return tidy(folder, nearly(result, folder, two, lab))
        again = start_two(two.arguments, folder)
        codes, _ = end_two(again)
        outcome, found = judge(again[0], folder, two)
        bad = next((run for run in again if "Traceback" in run.text), None)
        if bad:
            outcome, found = TRACEBACK, last_line(bad.text)
        elif codes != [0, 0]:
            outcome, found = WRONG, f"then exit codes {codes}: {last_line(again[0].text)} / {last_line(again[1].text)}"
        result = Result("processes", f"{what}, goes on in two", outcome, f"{note}; {found}", str(again[0].log))
        return tidy(folder, result)

    def nearly_same() -> Result:
        return nearly(Result("processes", "unbroken, two against one", WRONG), two.folder, one, lab)

    cases: dict[str, Callable] = {"two against one": nearly_same}
    return lab.run(cases | {f"kill in two {number}": partial(attack, number) for number in range(args.processes)})


def nearly(result: Result, folder: Path, reference: Reference, lab: Laboratory) -> Result:
    """Another number of processes sums in another order: weights agree to 2e-3 of the training's update."""
    if result.outcome == TRACEBACK or not (folder / "out" / WEIGHTS).is_file():
        return result
    if re.search("exit code|refused|did not end", result.note.split("; ")[-1]):
        return result
    from safetensors.torch import load_file

    ours, theirs, base = (load_file(path / WEIGHTS) for path in
                          (folder / "out", reference.folder / "out", lab.model))  # fmt: skip
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5
    update = sum(float((theirs[name] - base[name]).square().sum()) for name in ours) ** 0.5
    result.note = f"{result.note.split('; ')[0]}; {apart / update:.1e} of the update apart".removeprefix("; ")
    result.outcome = HEALED if apart <= 2e-3 * update else WRONG
    return result


def signals(lab: Laboratory, args: argparse.Namespace) -> list[Result]:
    """Signals at random moments, to one process or to both of two; a launcher that is killed."""
    references = [lab.reference(kind) for kind in ("mixed", "plain")[: args.signals]]
    two = lab.reference("mixed", two=True, train_batch_size=1) if args.signals_in_two else None
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def stopped(run: Run) -> str | None:
        """What is wrong with how a run ended that a signal reached."""
        text = run.text
        told = len(re.findall(r"^stopped: ", text, flags=re.MULTILINE))
        if "Traceback" in text:
            return "traceback"
        if run.code == 0 or (run.code is not None and run.code < 0 and "Plan" not in text):
            # It was done, or Python had not yet begun with the command.
            return None
        return None if run.code == 75 and told == 1 else f"exit code {run.code}, {told} lines: {last_line(text)}"

    def attack(number: int) -> Result:
        choose = lab.random("signals", number)
        mine = references[number % 2]
        folder, kind = lab.place("signal", number), numbers[number % 3]
        run = start(mine.arguments, folder)
        run.wait(choose.uniform(0, mine.seconds))
        stage = stage_of(folder, run.log) if run.code is None else "the end"
        began = time.monotonic()
        run.send(kind)
        run.wait(30)
        note = f"{stage}, ended after {time.monotonic() - began:.1f} s with {run.code}"
        what = f"{kind.name}: {stage}"
        wrong = stopped(run)
        if wrong:
            run.kill()
            outcome = TRACEBACK if wrong == "traceback" else WRONG
            return Result("signals", what, outcome, f"{note}: {wrong}, {last_line(run.text)}", str(run.log))
        return tidy(folder, go_on("signals", what, folder, mine, [run], note))

    def attack_two(number: int) -> Result:
        choose = lab.random("signals in two", number)
        folder, kind = lab.place("signal-two", number), numbers[number % 3]
        ranks = choose.choice(((0,), (1,), (0, 1)))
        runs = start_two(two.arguments, folder)
        runs[0].wait(choose.uniform(0.3, 1) * two.seconds)
        stage = stage_of(folder, runs[0].log) if runs[0].code is None else "the end"
        for rank in ranks:
            runs[rank].send(kind)
        codes, ended = end_two(runs)
        note = f"{kind.name} to {ranks}, {stage}, exit codes {codes}{', ended by the launcher' if ended else ''}"
        what = "two processes"
        for run in runs:
            wrong = stopped(run)
            if wrong:
                outcome = TRACEBACK if wrong == "traceback" else WRONG
                return Result("signals", what, outcome, f"{note}: {wrong}", str(run.log))
        again = start_two(two.arguments, folder)
        end_two(again)
        outcome, found = judge(again[0], folder, two)
        return tidy(folder, Result("signals", what, outcome, f"{note}; {found}", str(again[0].log)))

    def launcher() -> Result:
        """A real launcher is killed: the process that it started ends by itself."""
        import psutil

        folder = lab.place("launcher")
        folder.mkdir(parents=True)
        long = lab.arguments("mixed", max_train_steps=2000, checkpointing_steps=1000)
        log = folder.parent / "launcher.txt"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", str(REPOSITORY / "examples" / "train_sa.py"),
                   *long]  # fmt: skip
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file,
                                       env={**os.environ, "PYTHONPATH": path})  # fmt: skip
        run = Run(process.pid, log)
        end = time.monotonic() + _LIMIT
        while "forgetting" not in run.text and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        began = time.monotonic()
        _, alive = psutil.wait_procs(children, timeout=30)
        seconds = time.monotonic() - began
        for orphan in alive:
            orphan.kill()
        what, text = "the launcher is killed", run.text
        if not children or alive or "the launcher is gone" not in text or "Traceback" in text:
            note = f"{len(alive)} of {len(children)} live on: {last_line(text)}"
            return Result("signals", what, WRONG, note, str(log))
        kept = list((folder / "out").glob("checkpoint-*"))
        note = f"the process ended by itself after {seconds:.1f} s with {len(kept)} checkpoints"
        return Result("signals", what, ENDED if kept else WRONG, note, str(log))

    cases: dict[str, Callable] = {f"signal {number}": partial(attack, number) for number in range(args.signals)}
    cases |= {f"signal in two {number}": partial(attack_two, number) for number in range(args.signals_in_two)}
    return lab.run(cases | {f"launcher {number}": launcher for number in range(args.launchers)})


def flip(path: Path, choose: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = choose.randrange(len(content))
    content[place] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def on_tensors(change: Callable) -> Callable[[Path, random.Random], None]:
    """A damage that leaves a file of tensors well-formed, what is recorded in it included."""

    def damage(path: Path, _: random.Random) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        save_file({name: change(value).contiguous() for name, value in tensors.items()}, path, metadata)

    return damage


def _with_nan(value: Any) -> Any:
    value = value.clone()
    if value.is_floating_point():
        value.flatten()[0] = float("nan")
    return value


def _replaced_by_text(path: Path, _: random.Random) -> None:
    path.write_text("this is not what you think\n")


def _halved(path: Path, _: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _json_changed(path: Path, _: random.Random) -> None:
    """A number or a text in it is another one; it stays JSON."""
    text = path.read_text()
    changed = re.sub(r"(?<=[:\s])(\d)(?=[\d.]*,?\n)", lambda found: str((int(found[1]) + 1) % 10), text, count=1)
    path.write_text(changed if changed != text else text.replace(": ", ": 1", 1))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "one bit flipped": flip,
    "cut in half": _halved,
    "emptied": lambda path, _: path.write_bytes(b""),
    "deleted": lambda path, _: path.unlink(),
    "replaced by text": _replaced_by_text,
}
TENSOR_DAMAGES = {
    "NaN in a tensor": on_tensors(_with_nan),
    "rows reordered": on_tensors(lambda value: value.flip(0) if value.dim() else value),
    "values negated": on_tensors(lambda value: -value),
}
JSON_DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "another number": _json_changed,
    "an empty list": lambda path, _: path.write_text("[]\n"),
}
# Kind of file: the state of the run in which it is damaged, and where it is. The last of those that match is taken.
FILES = {
    "samples": ("training", "cache/replay-*/samples.safetensors"),
    "manifest of samples": ("training", "cache/surrogate-*/manifest.json"),
    "preview of samples": ("training", "cache/replay-*/preview/*.png"),
    "Fisher information": ("training", "cache/fisher-*/fisher.safetensors"),
    "Fisher settings": ("training", "cache/fisher-*/fisher_config.json"),
    "part of samples": ("sampling", "cache/.part-replay-*/*.safetensors"),
    "part of Fisher information": ("fisher", "cache/.part-fisher-*/*.safetensors"),
    "checkpoint: parameters": ("training", "out/checkpoint-6/parameters.safetensors"),
    "checkpoint: optimiser": ("training", "out/checkpoint-6/optimizer.safetensors"),
    "checkpoint: average": ("training", "out/checkpoint-6/average.safetensors"),
    "checkpoint: state": ("training", "out/checkpoint-6/state.json"),
    "run.json, stopped": ("training", "out/.selective_amnesia/run.json"),
    "run.json, finished": ("finished", "out/.selective_amnesia/run.json"),
    "finished.json": ("finished", "out/.selective_amnesia/finished.json"),
    "erased weights": ("finished", f"out/{WEIGHTS}"),
    "model_index.json": ("finished", "out/model_index.json"),
    "selective_amnesia.json": ("finished", "out/selective_amnesia.json"),
    "training_history.json": ("finished", "out/training_history.json"),
    "report.json": ("finished", "out/report.json"),
    "before_after.png": ("finished", "out/before_after.png"),
    "images before": ("finished, no report", "cache/evaluation-*/samples.safetensors"),
    "reported.json": ("finished", "out/.selective_amnesia/reported.json"),
}


def states(lab: Laboratory) -> dict[str, Path]:
    """Folders of runs that died at chosen moments."""
    reference = lab.reference("mixed")
    made = {"finished": reference.folder}

    def until(name: str, reached: Callable[[tuple], bool]) -> None:
        """Stop a run for good after the first rename that matches."""

        def prepare() -> None:
            def watched(original: Callable) -> Callable:
                def call(*args: Any) -> None:
                    original(*args)
                    if reached(args):
                        os.kill(os.getpid(), signal.SIGKILL)

                return call

            os.rename, os.replace = watched(os.rename), watched(os.replace)

        folder = lab.root / "states" / name
        run = start(reference.arguments, folder, prepare=prepare)
        assert run.wait() == -signal.SIGKILL, run.text
        made[name] = folder

    until("sampling", lambda args: re.search(r"part-replay.*/0+3\.safetensors", str(args[1])))
    until("fisher", lambda args: "part-fisher" in str(args[1]))
    until("training", lambda args: str(args[1]).endswith("checkpoint-6"))
    made["finished, no report"] = lab.root / "states" / "unreported"
    shutil.copytree(reference.folder, made["finished, no report"])
    (made["finished, no report"] / "out" / "report.json").unlink()
    return made


def damage(lab: Laboratory, args: argparse.Namespace) -> list[Result]:
    """Every kind of file, damaged in every way; then the same command."""
    reference = lab.reference("mixed")
    other = lab.reference("other")
    made = states(lab)
    combinations = []
    for kind, (_, pattern) in FILES.items():
        ways = dict(DAMAGES)
        if pattern.endswith(".safetensors"):
            ways |= TENSOR_DAMAGES
        elif pattern.endswith(".json"):
            ways |= JSON_DAMAGES
        combinations += [(kind, way, change) for way, change in (ways | {"foreign, well-formed": None}).items()]
    # Whole folders of others, every file well-formed and every digest right.
    combinations += [("samples", "another set's folder", None), ("Fisher information", "another run's folder", None),
                     ("checkpoint: state", "another run's folder", None)]  # fmt: skip
    if args.damage < len(combinations):
        combinations = lab.random("damage").sample(combinations, args.damage)

    def foreign(path: Path, pattern: str) -> Path:
        """A file of the same kind from elsewhere."""
        near = [path.with_name("000000000.safetensors")] if ".part-replay" in str(path) else []
        if "fisher" in path.parent.name and ".part" in str(path):
            near = [*(other.folder / "cache").glob("fisher-*/fisher.safetensors")]
        near += [*(other.folder).glob(pattern), *other.folder.glob(re.sub(r"checkpoint-\d+", "checkpoint-*", pattern))]
        near += [*other.folder.glob("out/checkpoint-*/parameters.safetensors")]
        return next(found for found in near if found.is_file() and found.read_bytes() != path.read_bytes())

    def attack(kind: str, way: str, change: Callable | None) -> Result:
        state, pattern = FILES[kind]
        folder = lab.place("damage", kind, way)
        shutil.copytree(made[state], folder)
        path = sorted(folder.glob(pattern))[-1]
        if way.endswith("folder"):
            source = foreign(path, pattern).parent
            shutil.rmtree(path.parent)
            shutil.copytree(source, path.parent)
        elif change is None:
            shutil.copyfile(foreign(path, pattern), path)
        else:
            change(path, lab.random("damage", kind, way))
        run = start(reference.arguments, folder)
        run.wait()
        outcome, note = judge(run, folder, reference)
        named = [path.name, path.parent.name, "made again", "passed over"]
        if outcome == SAME and re.search("warning: .*|.* is passed over", run.text):
            told = [line for line in re.split(r"[\r\n]", run.text) if any(name in line for name in named)
                    and ("warning" in line or "passed over" in line)]  # fmt: skip
            outcome, note = (HEALED, told[0][:200]) if told else (SAME, "")
        return tidy(folder, Result("damage", kind, outcome, f"{way}: {note}", str(run.log)))

    return lab.run({f"{case[0]}: {case[1]}": partial(attack, *case) for case in combinations})


# Bad settings

_DEEP = "[" * 300 + "]" * 300
_TEXTS = (
    "", " ", "nan", "1e5", "no", "off", "null", "~", "../x", "/dev/null", "a" * 5000, "\x1b[31mred", "a\nb", "a\rb",
    "a\x07", "\u202egnirts", "🐈", "{}", "{", "{0}", "{concept}", "%s", "%(prog)s", "```", "-5", "--concept", "None",
    "uniform_noise", "photo of {}", "１２", "٣", "a,b", "cat", "none", "latest", "checkpoint-1", "file:///etc", "x:y:z",
)  # fmt: skip
_NUMBERS = (
    0, 1, 2, 3, 7, 8, -1, -5, 1000, 999_999_999, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, -(2**63), 0.0, -0.0, 0.5,
    1.0, 1.5, 1e308, 5e-324, -1e308, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
_NESTED = ([], {}, [[1]], {"a": 1}, [None], [1, "a"], {"a": {"b": [1, {"c": None}]}}, [{}], ["cat", ["dog"]], True,
           False, None, ["a"] * 300)  # fmt: skip
_RAW = (
    "2020-01-01", "!!binary aGk=", "!!set {a, b}", "&a [*a]", "!!python/object/apply:os.getpid []", "0x10", "1_000",
    "1:30", "*nobody", "{a: b", "[a, b", "'open", "!!float abc", "!!int 3.5", "|\n  two\n  lines", "? [a]\n: b",
    "!<tag:x> y", ".nan", "-.inf", "1e400", "9" * 5000, _DEEP, "\t- a", "<<: 3", "@x", "`x`", "&a {b: *a}",
)  # fmt: skip
_FILES = (
    b"", b"\x00", b"\xff\xfe\x00", "concept: cat".encode("utf-16"), b"\xef\xbb\xbfconcept: cat\nsurrogate: dog\n",
    b"- a\n- b\n", b"just text", b"42", b"a: b: c", b"{", b"null", b"concept: [cat\n", b"\xe9: 1", b"1: 2\n",
    b"? {a: b}\n: 3\n", b"[]: 1", b"concept: cat\nconcept: dog\nsurrogate: x\n", b"~: 1", b"2020-01-01: x",
    b"x" * 100_000, b"&a {*a : 1}", b"a: &a [*a]", b"--- a\n--- b\n", b"%YAML 9.9\n---\na: 1\n", _DEEP.encode(),
    b"learning_rate: 1e-5\nlearning-rate: 2\n", b"seed: 1\n\x1b[2J: 3\n",
)  # fmt: skip
_PAIRS: tuple[dict[str, Any], ...] = (
    {"concept": ["cat", "dog"], "surrogate": ["a", "b", "c"]}, {"concept": "cat", "surrogate": "cat"},
    {"num_replay_images": 0}, {"num_replay_images": 0, "replay_weight": 0, "num_fisher_samples": 1},
    {"reference_features": "x.npz"}, {"classifier": "nowhere"}, {"lr_warmup_steps": 10**6}, {"adam_epsilon": 1e308},
    {"max_train_steps": 10**9, "num_surrogate_images": 10**7}, {"naive": True, "surrogate": None},
    {"eval_templates": ["{}{}"]}, {"concept_templates": []}, {"resolution": 2**40}, {"resolution": 12},
    {"sampler": "ddpm", "num_inference_steps": 10**6}, {"fisher": "nowhere"},
    {"push_to_hub": True, "hub_model_id": "//"}, {"train_method": "nothing.*"}, {"train_method": "("},
    {"replay_prompts": "nowhere.txt"}, {"mixed_precision": "fp16"},
    {"allow_tf32": True}, {"use_8bit_adam": True}, {"enable_xformers_memory_efficient_attention": True},
    {"fisher_timesteps": 10**6}, {"output_dir": "a" * 300}, {"artifacts_dir": "a" * 300}, {"logging_dir": "/"},
    {"resume_from_checkpoint": "checkpoint-99"}, {"variant": "fp99"}, {"revision": "no such"}, {"report_to": "wandb"},
    {"eval_seed": 0}, {"eval_seed": 2**64}, {"seed": 2**70}, {"prediction_type": "v_prediction"},
    {"pretrained_model_name_or_path": "nowhere/at all"}, {"pretrained_model_name_or_path": ""},
    {"ewc_weight": 1e308}, {"snr_gamma": 1e-300}, {"noise_offset": 1e30}, {"guidance_scale": 1e300},
)  # fmt: skip


def bad_settings(lab: Laboratory, number: int, folder: Path) -> list[str]:
    """A command line with something wrong in it, or something strange."""
    import dataclasses

    from sa_diffusers.configuration import SelectiveAmnesiaConfig

    choose = lab.random("settings", number)
    names = [spec.name for spec in dataclasses.fields(SelectiveAmnesiaConfig)]
    base = {"concept": "cat", "surrogate": "a dog", "pretrained_model_name_or_path": str(lab.model),
            "output_dir": f"out-{number}", "artifacts_dir": "cache", "report_to": "none", "num_replay_images": 4,
            "num_surrogate_images": 4, "num_inference_steps": 2}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    way = choose.random()
    if way < 0.06:
        file = folder / f"{number}{choose.choice(('.yaml', '.yml', '.json', '.txt', ''))}"
        file.write_bytes(choose.choice(_FILES))
        return ["--config", str(choose.choice((file, file, file, folder, folder / "nowhere.yaml")))]

    def value() -> Any:
        return choose.choice((choose.choice(_TEXTS), choose.choice(_NUMBERS), choose.choice(_NESTED)))

    if way < 0.25:
        return command_line({name: [] if value is None else value
                             for name, value in (base | choose.choice(_PAIRS)).items()})  # fmt: skip
    changed = {choose.choice(names): value() for _ in range(choose.choice((1, 1, 1, 2, 3)))}
    if choose.random() < 0.05:
        changed[choose.choice(("learning-rate", "Seed", "", "concept ", "\x1b[2Jname", "a" * 3000))] = value()
    if way < 0.6:
        arguments = command_line(base | {"report_to": "none"})
        for name, given in changed.items():
            flag = choose.choice((f"--{name}", f"--{name}", f"--{name}", f"--no-{name}", f"--{name}="))
            texts = [str(item) for item in (given if isinstance(given, list) else [given])]
            arguments += [flag + texts[0], *texts[1:]] if flag.endswith("=") and texts else [flag, *texts]
        # No program can be given a NUL.
        return [argument.replace("\x00", "") for argument in arguments]
    if way < 0.7:
        file = folder / f"{number}.json"
        file.write_text(json.dumps(base | changed))
        return ["--config", str(file)]
    lines = [f"{json.dumps(name)}: {_yaml(given)}" for name, given in (base | changed).items() if name not in changed
             or choose.random() < 0.5]  # fmt: skip
    lines += [f"{choose.choice(names)}: {choose.choice(_RAW)}" for _ in range(choose.choice((0, 1, 1)))]
    lines += [f"{json.dumps(name)}: {_yaml(given)}" for name, given in changed.items()]
    file = folder / f"{number}.yaml"
    file.write_text("\n".join(lines) + "\n")
    return ["--config", str(file)]


def _yaml(value: Any) -> str:
    text = json.dumps(value)
    return {"NaN": ".nan", "Infinity": ".inf", "-Infinity": "-.inf"}.get(text, text)


class _TooLong(BaseException):
    pass


def _too_long(*_: Any) -> None:
    raise _TooLong


def settings(lab: Laboratory, args: argparse.Namespace) -> list[Result]:
    """Bad settings through files and flags: read, and where they are accepted, planned with on the tiny model."""
    size = 50

    def reads(first: int) -> list[Result]:
        """Many in one process: nothing but the reading is done."""
        folder = lab.place("settings", first)
        found = folder.parent / f"settings-{first}.jsonl"

        def prepare() -> None:
            from sa_diffusers.commands.erase import parse_config

            signal.signal(signal.SIGALRM, _too_long)
            sys.set_int_max_str_digits(4300)
            with found.open("w") as file:
                for number in range(first, min(first + size, args.settings)):
                    errors, code = io.StringIO(), 0
                    arguments = bad_settings(lab, number, folder)
                    signal.alarm(20)
                    try:
                        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
                            parse_config(arguments)
                    except SystemExit as stop:
                        code = stop.code
                        if isinstance(code, str):
                            errors.write(code)
                            code = 1
                    except _TooLong:
                        code = None
                    except BaseException:
                        code = 1
                        errors.write(traceback.format_exc())
                    signal.alarm(0)
                    json.dump({"number": number, "code": code, "text": errors.getvalue()}, file)
                    file.write("\n")
                    file.flush()
            os._exit(0)

        start([], folder, prepare=prepare).wait(600)
        results, accepted = [], []
        for line in found.read_text().splitlines():
            case = json.loads(line)
            if case["code"] == 0:
                accepted.append(case["number"])
            results.append(verdict("read", case["number"], case["code"], case["text"]))
        missing = min(size, args.settings - first) - len(results)
        if missing:
            results.append(Result("settings", "read", WRONG, f"the process died at {first + len(results)}"))
        chosen = [number for number in accepted if lab.random("plan", number).random() < args.planned]
        return results + [plans(number, folder) for number in chosen]

    def plans(number: int, folder: Path) -> Result:
        def prepare() -> None:
            from sa_diffusers.erasure import Erasure

            # What is too large must be told, not tried.
            resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
            Erasure.run = lambda *_, **__: sys.exit(0)

        place = folder / "a" / "b" / str(number)
        place.mkdir(parents=True, exist_ok=True)
        run = start(bad_settings(lab, number, folder), place, prepare=prepare)
        code = run.wait(60)
        run.kill()
        return verdict("planned", number, code, run.text)

    def verdict(what: str, number: int, code: int | None, text: str) -> Result:
        told = next((line for line in text.splitlines() if "error: " in line and "Traceback" not in text), "")
        short = f"number {number}: {ascii(told[:160]) if told else last_line(text)}"
        if code is None:
            return Result("settings", what, WRONG, f"{short} (took too long)")
        if "Traceback" in text:
            frames = re.findall(r'File "[^"]*/(\w+\.py)", line (\d+), in (\w+)', text)
            frame = [frame for frame in frames if frame[0] in OWN_FILES] or frames
            return Result("settings", what, TRACEBACK, f"{short} ({':'.join(frame[-1]) if frame else ''})")
        if code == 0:
            return Result("settings", what, ACCEPTED)
        if code in (1, 2) and is_one_sentence(text):
            return Result("settings", what, REFUSED)
        return Result("settings", what, WRONG, f"{short} (exit code {code}, not one clean line of text)")

    firsts = range(0, args.settings, size)
    return lab.run({f"settings {first} of {args.settings}": partial(reads, first) for first in firsts})


OWN_FILES = {path.name for path in (REPOSITORY / "sa_diffusers").rglob("*.py")}


# Others at work, and the disk


def together(lab: Laboratory, args: argparse.Namespace) -> list[Result]:
    """Two runs at once, in one output folder, and in two with one cache."""
    plain = (lab.reference("mixed"),) * 2
    kind = "adapter on half"
    adapters = (lab.reference(kind), lab.reference(kind, lora_rank=3)) if args.together_adapters else ()

    def one_folder(number: int, reference: Reference = plain[0], name: str = "") -> list[Result]:
        choose = lab.random("together", *([name] if name else []), number)
        folder = lab.place("together", *([name] if name else []), number)
        first = start(reference.arguments, folder)
        while not (folder / "out" / ".selective_amnesia" / "run.json").is_file() and first.wait(0.01) is None:
            pass
        first.wait(choose.uniform(0, 0.5 * reference.seconds))
        second = start(reference.arguments, folder)
        # The report is the last that is written before the folder is free again.
        end = time.monotonic() + _LIMIT
        while second.wait(0.002) is None and _KEPT not in second.text and time.monotonic() < end:
            pass
        reported = (folder / "out" / "report.json").is_file()
        second.wait()
        refused = second.code == 1 and "is in use by another run" in second.text and is_one_sentence(second.text)
        first.wait()
        outcome, note = judge(first, folder, reference)
        what = f"{name}, one output folder" if name else "one output folder"
        results = [Result("together", f"{what}: the first", outcome, note, str(first.log))]
        kind, note = (REFUSED, "") if refused else (WRONG, last_line(second.text))
        if second.code == 0 and reported and _KEPT in second.text:
            kind, note = SAME, "the first had ended"
        return [*results, Result("together", f"{what}: the second", kind, note, str(second.log))]

    def one_cache(number: int, references: Sequence[Reference] = plain, name: str = "") -> list[Result]:
        choose = lab.random("one cache", *([name] if name else []), number)
        folders = [lab.place("cache", *([name] if name else []), number, rank) for rank in (0, 1)]
        cache = lab.place("cache", *([name] if name else []), number, "shared")
        cache.mkdir(parents=True)
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "cache").symlink_to(cache)
        runs = [start(references[0].arguments, folders[0])]
        runs[0].wait(choose.choice((0, 0, choose.uniform(0, 0.7 * references[0].seconds))))
        runs.append(start(references[1].arguments, folders[1]))
        for run in runs:
            run.wait()
        results = []
        for folder, run, reference in zip(folders, runs, references, strict=True):
            # What they share is looked at as the cache of either.
            (folder / "cache").unlink()
            shutil.copytree(cache, folder / "cache")
            what = f"{name}, one cache, ranks of 2 and 3" if name else "one cache"
            results.append(Result("together", what, *judge(run, folder, reference), str(run.log)))
        return results

    cases: dict[str, Callable] = {
        f"{way.__name__} {number}": partial(way, number)
        for way in (one_folder, one_cache)
        for number in range(args.together)
    }
    for number in range(args.together_adapters):
        cases[f"one_folder of {kind} {number}"] = partial(one_folder, number, adapters[0], kind)
        cases[f"one_cache of {kind} {number}"] = partial(one_cache, number, adapters, kind)
    return lab.run(cases)


def disk(lab: Laboratory, args: argparse.Namespace) -> list[Result]:
    """A disk that takes only so much, folders that cannot be written, places that are none."""
    reference, other = lab.reference("mixed"), lab.reference("other")
    replacing = lab.reference("mixed", base=other.folder, overwrite_output_dir=True)
    largest = max(path.stat().st_size for path in reference.folder.rglob("*") if path.is_file())

    def weights(folder: Path) -> dict[str, str]:
        return {name: digest for name, digest in contents(folder).items()
                if name.startswith("out/") and not name.startswith("out/.")}  # fmt: skip

    def full(number: int, replaces: bool) -> Result:
        choose = lab.random("disk", number)
        limit = 0 if number == 0 else int(largest ** choose.uniform(0.3, 1.0))
        mine = replacing if replaces else reference
        folder = lab.place("disk", number, replaces)
        if replaces:
            shutil.copytree(other.folder, folder)
        reading, writing = os.pipe()

        def prepare() -> None:
            # A file's size is limited, a pipe's is not.
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        os.set_blocking(reading, False)
        run = start(mine.arguments, folder, prepare=prepare)
        os.close(writing)
        text, end = b"", time.monotonic() + _LIMIT
        while run.wait(0.01) is None and time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                text += os.read(reading, 2**16)
        with contextlib.suppress(BlockingIOError):
            while more := os.read(reading, 2**16):
                text += more
        os.close(reading)
        run.log.write_bytes(text)
        what = f"full disk{', replacing another erasure' if replaces else ''}"
        note = f"{limit} bytes a file: {last_line(run.text)}"
        if run.code == 0:
            return tidy(folder, Result("disk", f"{what} (enough room)", *judge(run, folder, mine), str(run.log)))
        if "Traceback" in run.text:
            return Result("disk", what, TRACEBACK, note, str(run.log))
        if run.code != 1 or not is_one_sentence(run.text):
            return Result("disk", what, WRONG, f"exit code {run.code}, {note}", str(run.log))
        # Once the new weights are there, the old report is gone, and rightly so.
        saved = (folder / "out" / ".selective_amnesia" / "finished.json").is_file() and replaces and (
            weights(folder).get(f"out/{WEIGHTS}") == mine.files[f"out/{WEIGHTS}"])  # fmt: skip
        if replaces and not saved and weights(folder) != weights(other.folder):
            return Result("disk", what, WRONG, f"the old files changed, {note}", str(run.log))
        result = go_on("disk", f"{what}; then room", folder, mine, note=note)
        return tidy(folder, result)

    def place(name: str, changes: dict[str, str], prepare: Callable[[Path], None]) -> Result:
        folder = lab.place("place", name)
        folder.mkdir(parents=True)
        prepare(folder)
        nobody = os.getuid() == 0

        def become_nobody() -> None:
            if nobody:
                os.setgid(65534)
                os.setuid(65534)

        run = start(lab.arguments("mixed", **changes), folder, prepare=become_nobody)
        run.wait()
        if "Traceback" in run.text:
            return Result("disk", name, TRACEBACK, last_line(run.text), str(run.log))
        good = run.code == 1 and is_one_sentence(run.text)
        return Result("disk", name, REFUSED if good else WRONG, last_line(run.text), str(run.log))

    def read_only(*names: str) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            folder.chmod(0o777)
            for name in names:
                (folder / name).mkdir(parents=True)
                (folder / name).chmod(0o555)

        return prepare

    def with_file(folder: Path) -> None:
        folder.chmod(0o777)
        (folder / "file").write_text("a file")

    def read_only_finished(folder: Path) -> None:
        folder.chmod(0o777)
        shutil.copytree(other.folder / "out", folder / "out")
        for path in (folder / "out", *(folder / "out").rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)

    places = [
        ("output folder read-only", {}, read_only("out")), ("cache read-only", {}, read_only("cache")),
        ("an earlier erasure read-only", {"overwrite_output_dir": True}, read_only_finished),
        ("output folder's parent read-only", {"output_dir": "parent/out"}, read_only("parent")),
        ("cache's parent read-only", {"artifacts_dir": "parent/cache"}, read_only("parent")),
        ("output folder below a file", {"output_dir": "file/out"}, with_file),
        ("cache below a file", {"artifacts_dir": "file/cache"}, with_file),
        ("output folder is a file", {"output_dir": "file"}, with_file),
        ("cache is a file", {"artifacts_dir": "file"}, with_file),
    ]  # fmt: skip
    cases: dict[str, Callable] = {f"full {number}": partial(full, number // 2, bool(number % 2))
                                  for number in range(args.disk)}  # fmt: skip
    if args.places < len(places):
        places = lab.random("places").sample(places, args.places)
    return lab.run(cases | {case[0]: partial(place, *case) for case in places})


ATTACKS: dict[str, Callable[[Laboratory, argparse.Namespace], list[Result]]] = {
    "kills": kills, "renames": renames, "processes": processes, "signals": signals, "damage": damage,
    "settings": settings, "together": together, "disk": disk,
}  # fmt: skip


# Report


def table(attack: str, results: Sequence[Result]) -> str:
    """One attack's results as a Markdown table."""
    columns = [outcome for outcome in OUTCOMES if outcome in (TRACEBACK, WRONG)
               or any(result.outcome == outcome for result in results)]  # fmt: skip
    lines = [f"| {attack} | times | {' | '.join(columns)} |", f"| --- {'| ---: ' * (len(columns) + 1)}|"]
    whats = sorted({result.what for result in results})
    for what in [*whats, "all"] if len(whats) > 1 else whats:
        mine = [result for result in results if what in ("all", result.what)]
        counts = [sum(result.outcome == outcome for result in mine) for outcome in columns]
        lines.append(f"| {what} | {len(mine)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def faults(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        if result.outcome in (TRACEBACK, WRONG):
            yield f"- {result.attack}, {result.what}: {result.outcome}. {result.note} [{result.log}]"


MODERATE = {"kills": 16, "stage_kills": 1, "kind_kills": 2, "every_rename": 6, "every_change": 40, "processes": 6,
            "signals": 9, "signals_in_two": 3, "launchers": 1, "damage": 40, "settings": 400, "together": 1,
            "together_adapters": 1, "disk": 6, "places": 9}  # fmt: skip
SHORT = {"kills": 1, "stage_kills": 0, "kind_kills": 0, "every_rename": 100, "every_change": 0, "processes": 1,
         "signals": 1, "signals_in_two": 0, "launchers": 0, "damage": 4, "settings": 100, "together": 1,
         "together_adapters": 0, "disk": 2, "places": 2}  # fmt: skip
LARGE = {"kills": 60, "stage_kills": 5, "kind_kills": 10, "every_rename": 1, "every_change": 10, "processes": 24,
         "signals": 30, "signals_in_two": 9, "launchers": 1, "damage": 1000, "settings": 2000, "together": 5,
         "together_adapters": 3, "disk": 20, "places": 9}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="which [all]")
    parser.add_argument("--size", choices=("short", "moderate", "large"), default="moderate", help="sets all counts")
    helps = {
        "kills": "kills at any moment", "stage_kills": "kills in each stage",
        "kind_kills": "kills of a run with an adapter, of one in bfloat16, and of one with both",
        "every_rename": "die at every n-th rename (1: at all, 0: at none)",
        "every_change": "die at every n-th change of the disk of any kind (0: at none)",
        "processes": "kills in two processes", "signals": "signals", "signals_in_two": "signals to two processes",
        "launchers": "launchers killed", "damage": "damaged files", "settings": "bad settings",
        "together": "pairs of runs at once, of each kind",
        "together_adapters": "likewise, of runs with an adapter", "disk": "full disks",
        "places": "places that cannot be written",
    }  # fmt: skip
    for name, text in helps.items():
        shown = "/".join(str(size[name]) for size in (SHORT, MODERATE, LARGE))
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} [{shown}]")
    parser.add_argument("--planned", type=float, default=0.2, metavar="SHARE",
                        help="of the settings that are read, so many are planned with [0.2]")  # fmt: skip
    parser.add_argument("--only", default="", metavar="PATTERN", help="of all these, those with it in their name, as "
                        "the file of --results has it: 'finished.json: one bit' [all]")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of everything random [0]")
    parser.add_argument("--jobs", type=int, default=1, help="attacks at a time [1]")
    parser.add_argument("--folder", help="where runs take place; kept [a temporary one, deleted if nothing was wrong]")
    parser.add_argument("--report", help="file for the tables too, also of what has ended so far")
    parser.add_argument("--results", help="file for what became of each attack, a JSON object a line; what it holds is "
                        "not attacked again")  # fmt: skip
    args = parser.parse_args()
    for name, count in {"short": SHORT, "moderate": MODERATE, "large": LARGE}[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, count)
    return args


def main() -> None:
    args = parse_args()
    for folder in (args.folder, *(Path(file).parent for file in (args.results, args.report) if file)):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="torture-", dir=args.folder)).resolve()
    # A user without rights has to get in, or root could not be shown a folder that cannot be written.
    root.chmod(0o755)
    closed = [path for path in root.parents if not path.stat().st_mode & 0o001]
    if closed and os.getuid() == 0 and "disk" in args.attacks:
        sys.exit(f"error: only some users can enter {closed[0]}: choose another --folder")
    tables: list[str] = []

    def tell(found: Sequence[Result], attack: str) -> None:
        if args.report:
            text = "\n\n".join([*tables, *([table(attack, found)] if found else [])]) + "\n"
            partly = Path(f"{args.report}.part")
            partly.write_text(text)
            partly.replace(args.report)

    lab = Laboratory(root, args.seed, args.jobs, Path(args.results or root / "results.jsonl"), args.only)
    again = start(lab.arguments("mixed"), root / "again")
    again.wait()
    unequal = differences(root / "again", lab.reference("mixed"))
    if unequal:
        sys.exit(f"error: two unbroken runs differ: {'; '.join(unequal)}")
    results: list[Result] = []
    for attack in args.attacks:
        began = time.monotonic()
        lab.tell = partial(tell, attack=attack)
        found = ATTACKS[attack](lab, args)
        results += found
        lab.tell(found)
        tables.append(table(attack, found) if found else "")
        print(f"{tables[-1]}\n\n({time.monotonic() - began:.0f} s)\n", flush=True)
        told = list(faults(found))
        print("\n".join([*told[:SHOWN], *([f"- and {len(told) - SHOWN} more"] if told[SHOWN:] else [])]), flush=True)
    bad = sum(result.outcome in (TRACEBACK, WRONG) for result in results)
    print(f"\n{len(results)} attacks, {bad} went wrong" + (f"; what they left is in {root}" if bad else ""))
    if not bad and not args.folder:
        shutil.rmtree(root)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
