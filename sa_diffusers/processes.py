"""The processes of a run: when they stop, how they wait for each other, and what they do when memory runs out."""

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import filelock
import psutil

# "Temporary failure: try again", of sysexits.h.
EXIT_INTERRUPTED = 75
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed", "torch/distributed", "deepspeed")
# Where launchers say which process of how many this is.
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_POLL_SECONDS = 0.05
_LOOK_SECONDS = 2
Result = TypeVar("Result")


class Interrupted(BaseException):
    """The run was asked to stop, and did at a point from which the same command goes on.

    No error: what handles those of a network or a tracker must not take it for one.
    """


def leads() -> bool:
    """Whether this is the main process of the run, by what the launcher says: before they have joined."""
    rank, size = (
        next((value for name in names if (value := os.environ.get(name))), usual)
        for names, usual in ((RANKS, "0"), (_SIZES, "1"))
    )
    return rank == "0" or size == "1"


class _Watch:
    """What asks this process to stop: a signal, or the end of the launcher that started it."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.finishing = 0
        self.parent = os.getppid() if _is_launcher(os.getppid()) else None

    def handle(self, number: int, _frame: Any) -> None:
        again = self.reason is not None
        self.reason = signal.Signals(number).name
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.finishing:
            raise Interrupted(self.reason)

    def poll(self) -> str | None:
        if self.reason is None and self.parent is not None and os.getppid() != self.parent:
            self.reason = "the launcher is gone"
        return self.reason


_watch: _Watch | None = None


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Take SIGINT, SIGTERM, SIGUSR1 (a scheduler's warning) and a launcher that has vanished as requests to stop.

    Work under `finishing` goes on to its next safe point; anything else ends at once. Both raise `Interrupted`. A
    second SIGINT does not wait. Handlers are those of before on leaving.
    """
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch = _Watch()
    before = {}
    for name in _SIGNALS:
        if hasattr(signal, name):
            number = getattr(signal, name)
            before[number] = signal.signal(number, _watch.handle)
    try:
        yield
    except (Interrupted, OSError, FloatingPointError):
        raise
    except Exception as error:
        # What a signal interrupts may be code that answers with an error of its own (an import does).
        if _watch.reason is None:
            raise
        raise Interrupted(_watch.reason) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _watch = None


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Work that stops by itself, at its calls of `check_stop` or at its end."""
    if _watch is None:
        yield
        return
    _watch.finishing += 1
    try:
        yield
    finally:
        _watch.finishing -= 1
    if not _watch.finishing:
        check_stop()


def stop_requested() -> str | None:
    """Why this process is to stop: the name of a signal, say; None if it is not."""
    return _watch.poll() if _watch is not None else None


def check_stop() -> None:
    """A safe point.

    Raises:
        Interrupted: The process is to stop.
    """
    reason = stop_requested()
    if reason:
        raise Interrupted(reason)


def _is_launcher(pid: int) -> bool:
    try:
        command = " ".join(psutil.Process(pid).cmdline()[:6])
    except psutil.Error:
        return False
    return any(name in command for name in _LAUNCHERS)


def wait_until(ready: Callable[[], bool], patience: float = 0.0) -> None:
    """Wait for what another process does, outside of a collective: that would give up after some minutes.

    A launcher ends all processes when one has failed.

    Args:
        ready: Whether it is done.
        patience: Seconds to go on waiting once this process is to stop, for what the other does before it stops too.

    Raises:
        Interrupted: The process is to stop.
    """
    delay, waited = _POLL_SECONDS, None
    while not ready():
        if stop_requested():
            waited = waited or time.monotonic()
            if time.monotonic() - waited >= patience:
                check_stop()
        time.sleep(delay)
        delay = min(2 * delay, 1.0)


def say_stopped(reason: object, then: str = "The same command goes on from there") -> None:
    """The line that a program ends with when it was asked to stop; the main process says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"stopped: {reason}. {then}", file=sys.stderr, flush=True)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error)
    return type(error).__name__.startswith("Dist") or any(
        sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "gloo/transport",
                                  "Broken pipe", "NCCL")
    )  # fmt: skip


class Lock:
    """A folder's lock, which ends with the process that holds it.

    Args:
        path: The lock's file.
        message: Of the error if another process holds it.
    """

    def __init__(self, path: str | Path, message: str) -> None:
        self.path = Path(path)
        self.message = message
        self._lock = filelock.FileLock(self.path)

    def __enter__(self) -> None:
        self._acquire()

    def _acquire(self, seconds: float = 0) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=seconds)
        except filelock.Timeout:
            raise ValueError(self.message) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, PermissionError):
                raise
            warnings.warn(f"{self.path.parent} cannot be locked ({error}): start no second run on it", stacklevel=2)

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def check(self) -> None:
        """Refuse if another process holds it.

        Raises:
            ValueError: It does.
        """
        # Who may not write there cannot tell.
        with contextlib.suppress(PermissionError):
            if self.path.is_file():
                # Others may be looking at the same moment.
                self._acquire(_LOOK_SECONDS)
                self._lock.release()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def out_of_memory(error: BaseException) -> str:
    """The beginning of a sentence on it."""
    return f"memory ran out ({' '.join(str(error).split())[:200] or type(error).__name__})"


def shrinking(
    function: Callable[[int], Result], batch_size: int, flag: str, processes: int = 1, advice: str = ""
) -> Result:
    """Call a function with a batch size; where memory runs out, with half of it, until one fits.

    Args:
        function: Takes the batch size. It is called anew from its beginning.
        batch_size: The first.
        flag: That sets it.
        processes: Of the run. With several the batch is left alone: they would no longer agree.
        advice: Further flags that save memory.

    Raises:
        ValueError: Not even one fits, or the run has several processes.
    """
    from accelerate.utils.memory import clear_device_cache

    while True:
        try:
            return function(batch_size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            told = out_of_memory(error)
        clear_device_cache(garbage_collection=True)
        if batch_size == 1 or processes > 1:
            lower = f"lower --{flag} (now {batch_size})" if batch_size > 1 else f"--{flag} is 1 already"
            raise ValueError(f"{told}: {lower}{advice}")
        batch_size //= 2
        warn_once(f"{told}: going on with --{flag} {batch_size}")


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """One line on standard error, once a process."""
    if message not in _warned:
        _warned.add(message)
        say(f"warning: {message}")


def say(message: str) -> None:
    """One line on standard error, beside a progress bar if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr, nolock=False):
        print(message, file=sys.stderr, flush=True)


class Pace:
    """When something that costs time is due again: where it takes a small share of the time, or a time has passed.

    Args:
        share: Of the time that passes, which it may take.
        seconds: After so many it is due whatever it costs.
        cost: What it is expected to take, in seconds, before it was done once.
    """

    def __init__(self, share: float = 0.02, seconds: float = float("inf"), cost: float = 0.0) -> None:
        self.share, self.seconds, self.cost = share, seconds, cost
        self._last = time.monotonic()

    def due(self) -> bool:
        elapsed = time.monotonic() - self._last
        return elapsed >= min(self.seconds, self.cost / self.share)

    def done(self, began: float) -> None:
        """It was done; `began` is `time.monotonic()` of its beginning."""
        self._last = time.monotonic()
        self.cost = self._last - began
