"""What a training has logged, and the steps that it left out."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..hub import one_line
from ..passes import Passes, over_processes
from ..processes import say, warn_once

# So many steps in a row without a finite gradient end the training. Half precision needs some to find its scale.
_MAX_SKIPPED = {"fp16": 25}
_MAX_SKIPPED_ELSE = 10


class Progress:
    """History and skipped steps.

    Attributes:
        history: For every logged step: `step`, `surrogate_loss`, `replay_loss`, `ewc_penalty`, `learning_rate`; for
            every reading of the probes its figures (`Reading.values`), and `balance`.
        skipped: Steps left out because their gradient was not finite.
        passes: What this process's steps took of the network; in the main process also what all took before the
            checkpoint that they go on from.
        has_all_passes: Whether that checkpoint, if there is one, said so.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.history: list[dict[str, float]] = []
        self.skipped = 0
        self.passes = Passes()
        self.has_all_passes = True
        self._in_a_row = 0
        self._is_probed = False

    def all_passes(self) -> Passes | None:
        """What the steps took in all processes, which must all call it; None where it is not on record."""
        return over_processes(self.passes if self.has_all_passes else None, self.accelerator)

    def go_on_from(self, passes: Passes | None) -> None:
        """Count on from what a checkpoint holds, which is not what validation took right after it."""
        self.has_all_passes = passes is not None
        if passes is not None and self.accelerator.is_main_process:
            self.passes.add(passes)

    def log(self, step: int, losses: torch.Tensor, penalty: torch.Tensor | None, rate: float, bar: tqdm) -> None:
        """Keep a step's values and tell the trackers; values that are not finite are left out.

        Args:
            step: From 1.
            losses: Surrogate and replay loss, `[2]`, over all processes.
            penalty: The EWC term.
            rate: The learning rate.
            bar: Shows them.
        """
        values = {
            "surrogate_loss": losses[0].item(),
            "replay_loss": losses[1].item(),
            "ewc_penalty": 0.0 if penalty is None else penalty.item(),
            "learning_rate": rate,
        }
        if not _finite(values):
            return
        self._keep(step, values)
        if not self._is_probed:
            bar.set_postfix(surrogate=f"{losses[0]:.4f}", replay=f"{losses[1]:.4f}", ewc=f"{values['ewc_penalty']:.4f}")

    def read(self, step: int, values: Mapping[str, float], bar: tqdm) -> None:
        """Keep a reading of the probes and tell the trackers.

        Args:
            step: From 1.
            values: Figures by name.
            bar: Shows the two that matter.
        """
        self._is_probed = True
        self._keep(step, {name: value for name, value in values.items() if math.isfinite(value)})
        bar.set_postfix(forgotten=f"{values['forgotten']:.2f}", drift=f"{values['drift_p90']:.3f}")

    def _keep(self, step: int, values: Mapping[str, float]) -> None:
        if self.history and self.history[-1]["step"] == step:
            self.history[-1].update(values)
        else:
            self.history.append({"step": step, **values})
        with tracker_errors():
            self.accelerator.log(dict(values), step=step)

    def went_on(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def skip(self, step: int) -> None:
        """A step is left out.

        Raises:
            FloatingPointError: It is one of too many in a row.
        """
        self.skipped += 1
        self._in_a_row += 1
        limit = _MAX_SKIPPED.get(str(self.accelerator.mixed_precision), _MAX_SKIPPED_ELSE)
        if self._in_a_row >= limit:
            raise FloatingPointError(
                f"the gradient is not finite at step {step}, and was not at the {limit - 1} steps before: lower the "
                "learning rate or the EWC weight, or use bf16 in place of fp16"
            )
        if self.accelerator.is_main_process:
            say(f"warning: the gradient is not finite at step {step}: the step is left out ({self.skipped} so far)")


@contextlib.contextmanager
def tracker_errors() -> Iterator[None]:
    """A tracker that fails costs no training: it is told of in one line."""
    try:
        yield
    except Exception as error:  # a tracker's network errors are its own kinds
        warn_once(f"the tracker took no entry ({one_line(error)}); the history in the output folder goes on")


def _finite(values: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, values.values()))
