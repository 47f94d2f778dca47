"""Processes of real scripts that begin with what they all import: one imports it, the others are forked from it.

What a process is apart from that stays: arguments, environment, folder, output, exit code. An environment variable that
a library reads when it is imported has to be the nursery's own, but for that of the Hub's cache. What an import itself
does, and what a launcher does, is tried with processes that are started.
"""

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import constants

REPOSITORY = Path(__file__).parent.parent
LIBRARIES = ("torch.utils.tensorboard", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
IMPORTED = (*LIBRARIES, "sa_diffusers.erasure", "sa_diffusers.publish")
# What libraries read when they are imported, of what tests change.
EARLY = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_MODULES_CACHE")
# Nurseries at a time: each holds half a gigabyte.
_MOST = 3


class Nursery(contextlib.AbstractContextManager):
    """A process from which scripts are forked.

    Args:
        environment: Of all of them.
        launcher: The command that starts it, as `python` or `accelerate launch` with its flags.
        seconds: That a script may take.
        imported: Names of modules.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        launcher: Sequence[str] = (sys.executable,),
        seconds: int = 600,
        imported: Sequence[str] = IMPORTED,
    ):
        self.seconds = seconds
        self.environment = {**environment, "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen([*launcher, __file__, *imported], env=self.environment, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def run(
        self, script: str | Path, arguments: Sequence, folder: Path, environment: Mapping[str, str | None],
        processes: int = 1,
    ) -> subprocess.CompletedProcess:  # fmt: skip
        """What `python script arguments` ends with, in a folder, with changes of the environment: None for a variable
        that is not there.

        Several processes are joined by the variables that `torchrun` sets; what they write comes together.
        """
        words = [str(script), *map(str, arguments)]
        joined = [dict(environment)]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            common = {**environment, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            joined = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        with tempfile.TemporaryDirectory() as place:
            files = [Path(place, name) for name in ("output", "errors")]
            request = [(words, str(folder), each, self.seconds, *map(str, files)) for each in joined]
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(words, code, *(file.read_text() for file in files))


# What tests share, the one that was last used last; all end with this process.
_SHARED: OrderedDict[tuple, Nursery] = OrderedDict()


def forked(
    script: str | Path,
    arguments: Sequence,
    folder: Path,
    environment: Mapping[str, str],
    processes: int = 1,
    imported: Sequence[str] = IMPORTED,
) -> subprocess.CompletedProcess:
    """What `python script arguments` ends with, in a folder, in an environment; see `Nursery.run`."""
    key = (tuple(imported), *(environment.get(name) for name in EARLY))
    if key not in _SHARED:
        if len(_SHARED) >= _MOST:
            _SHARED.popitem(last=False)[1].__exit__()
        # The Hub's cache is each process's own.
        begun = {name: value for name, value in environment.items() if name != "HF_HUB_CACHE"}
        _SHARED[key] = Nursery(begun, imported=imported)
    _SHARED.move_to_end(key)
    nursery = _SHARED[key]
    absent = {name: None for name in nursery.environment if name not in environment}
    return nursery.run(script, arguments, folder, absent | dict(environment), processes)


def forked_code(code: str, folder: Path, environment: Mapping[str, str], *arguments: object, processes: int = 1,
                imported: Sequence[str] = IMPORTED) -> subprocess.CompletedProcess:  # fmt: skip
    """What `python -c code arguments` ends with, as by `forked`."""
    with tempfile.TemporaryDirectory() as place:
        script = Path(place, "code.py")
        script.write_text(code, encoding="utf-8")
        return forked(script, arguments, folder, environment, processes, imported)


def _begin(words: list[str], folder: str, environment: dict[str, str | None], seconds: int, *files: str) -> None:
    """Make a forked process what a new one would be."""
    for number, file in enumerate((os.devnull, *files)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(file, flags, 0o600), number)
    os.chdir(folder)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    constants.HF_HUB_CACHE = os.environ.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    signal.alarm(seconds)
    # Nothing may hang on numbers that nobody seeded.
    torch.seed()
    random.seed()
    numpy.random.seed()


def _end(running: set[int]) -> int:
    """Wait as a launcher does: where one process fails, the others are ended. The first failure, if there is one."""
    failure = 0
    while running:
        pid, status = os.wait()
        running.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failure:
            failure = code
            # They may end by themselves.
            deadline = time.monotonic() + 10
            while running and time.monotonic() < deadline:
                pid, _ = os.waitpid(-1, os.WNOHANG)
                running.discard(pid)
                time.sleep(0 if pid else 0.05)
            for other in running:
                os.kill(other, signal.SIGTERM)
    return failure


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    gc.freeze()
    told = os.fdopen(os.dup(1), "w")
    # What is imported says nothing to those that wait for an exit code.
    os.dup2(2, 1)
    for line in sys.stdin:
        running = set()
        for request in json.loads(line):
            pid = os.fork()
            if pid == 0:
                _begin(*request)
                runpy.run_path(request[0][0], run_name="__main__")
                return
            running.add(pid)
        print(_end(running), file=told, flush=True)


if __name__ == "__main__":
    main()
