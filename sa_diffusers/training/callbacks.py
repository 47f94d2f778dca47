"""The one hook in the loop: what a controller, or a user's own code, sees of each step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn


@dataclass
class StepState:
    """A step that is done.

    Attributes:
        step: Optimiser steps so far, from 1.
        surrogate_loss: Mean over the global batch; not finite where the step was left out.
        replay_loss: Likewise; 0 without replay.
        learning_rate: Of this step.
        left_out: Whether the step was left out because its gradient was not finite.
        parameters: Name and trained parameter, to be looked at and not changed.
        stop: Set it to True to end the training after this step. Its weights are kept; of several processes, one that
            asks is enough.
    """

    step: int
    surrogate_loss: float
    replay_loss: float
    learning_rate: float
    left_out: bool
    parameters: Mapping[str, nn.Parameter]
    stop: bool = False


class StepCallback(Protocol):
    """Called after every step, on every process."""

    def after_step(self, state: StepState) -> None: ...


# A function of the state will do.
Callback = StepCallback | Callable[[StepState], None]


def step_functions(callbacks: Sequence[Callback]) -> list[Callable[[StepState], None]]:
    """What is called after every step.

    Raises:
        ValueError: One cannot be called.
    """
    if callable(callbacks) or callbacks is None or not isinstance(callbacks, Sequence):
        raise ValueError("callbacks: give a list of them")
    functions = [getattr(callback, "after_step", callback) for callback in callbacks]
    for callback, function in zip(callbacks, functions, strict=True):
        if not callable(function):
            raise ValueError(f"callbacks: a {type(callback).__name__} is no function and has no after_step(state)")
        if isinstance(callback, type):
            raise ValueError(f"callbacks: {callback.__name__} is a class: give an object of it, {callback.__name__}()")
    return functions
