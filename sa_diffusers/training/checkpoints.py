"""Checkpoints of a training: safetensors and JSON, whole or not there, each bound to its run."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import new_folder, read_json, read_sealed, set_aside, sweep, write_sealed
from ..identity import Identity
from ..passes import Passes

CHECKPOINT_PREFIX = "checkpoint-"
STATE_NAME = "state.json"
PARAMETERS_NAME = "parameters.safetensors"
_OPTIMIZER_NAME, _AVERAGE_NAME = "optimizer.safetensors", "average.safetensors"
FORMAT_VERSION = 3
# What of an optimiser's groups changes on the way; the last five are Prodigy's.
_OF_A_GROUP = ("lr", "initial_lr", "d", "d0", "d_max", "d_numerator", "k")
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


@dataclass
class TrainingState:
    """All that a training goes on from.

    Attributes:
        step: Optimiser steps done.
        parameters: Name and trained parameter.
        optimizer: `state_dict` of the optimiser.
        schedule: `state_dict` of the learning rate's schedule.
        average: `state_dict` of the averaged weights, if there are any.
        scaler: `state_dict` of the gradient scaler, if there is one.
        history: What was logged.
        skipped: Steps left out because their gradient was not finite.
        control: `state_dict` of the controller, if there is one.
        passes: What the steps took of the network, over all processes; None where that is not on record.
    """

    step: int
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    average: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0
    control: dict[str, Any] | None = None
    passes: Passes | None = None

    @classmethod
    def of(cls, step: int, parameters: Mapping[str, nn.Parameter], optimizer: Any, schedule: Any,
           average: EMAModel | None = None, scaler: Any = None, **more: Any) -> "TrainingState":  # fmt: skip
        """The state of a training's parts."""
        return cls(
            step=step,
            parameters={name: parameter.detach() for name, parameter in parameters.items()},
            optimizer=optimizer.state_dict(),
            schedule=schedule.state_dict(),
            average=average.state_dict() if average else None,
            scaler=scaler.state_dict() if scaler is not None else None,
            **more,
        )

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: Any, schedule: Any,
                average: EMAModel | None = None, scaler: Any = None) -> None:  # fmt: skip
        """Put the state into parts that were made as those that it is of."""
        for name, parameter in parameters.items():
            parameter.copy_(self.parameters[name])
        fresh = optimizer.state_dict()["param_groups"]
        groups = [{**group, **kept} for group, kept in zip(fresh, self.optimizer["param_groups"], strict=True)]
        optimizer.load_state_dict({"state": self.optimizer["state"], "param_groups": groups})
        schedule.load_state_dict(self.schedule)
        if average and self.average:
            average.load_state_dict(self.average)
            average.to(device=next(iter(parameters.values())).device)
        if scaler is not None and self.scaler:
            scaler.load_state_dict(self.scaler)


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    steps = {path: path.name.removeprefix(CHECKPOINT_PREFIX) for path in Path(folder).glob(f"{CHECKPOINT_PREFIX}*")}
    found = [path for path, step in steps.items() if path.is_dir() and step.isdecimal()]
    return sorted(found, key=lambda path: int(steps[path]))


def write_checkpoint(
    output_dir: Path, state: TrainingState, identity: Identity, settings: Mapping[str, Any], limit: int | None
) -> Path:
    """Write `output_dir/checkpoint-STEP`, and delete the oldest of this run's beyond a limit.

    Raises:
        OSError: The disk is full, say; earlier checkpoints are whole.
        FloatingPointError: A parameter is not finite.
    """
    for name, value in state.parameters.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{name} is not finite after step {state.step}: lower the learning rate")
    target = output_dir / f"{CHECKPOINT_PREFIX}{state.step}"
    if target.is_dir():
        if _belongs(target, identity):
            shutil.rmtree(target)
        else:
            set_aside(target)
    optimizer, scalars = _flattened(state.optimizer["state"])
    groups = [{name: group[name] for name in _OF_A_GROUP if name in group}
              for group in state.optimizer["param_groups"]]  # fmt: skip
    average = dict(state.average or {})
    shadow = average.pop("shadow_params", None)
    with new_folder(target) as staging:
        save_file({name: value.contiguous() for name, value in state.parameters.items()}, staging / PARAMETERS_NAME)
        save_file(optimizer, staging / _OPTIMIZER_NAME)
        if shadow is not None:
            named = {name: value.contiguous() for name, value in zip(state.parameters, shadow, strict=True)}
            save_file(named, staging / _AVERAGE_NAME)
        values = {
            "step": state.step,
            "trained": list(state.parameters),
            "run": dict(identity.facts),
            "settings": dict(settings),
            "history": state.history,
            "skipped": state.skipped,
            "passes": state.passes and state.passes.to_dict(),
            "optimizer": {"state": scalars, "param_groups": groups},
            "schedule": state.schedule,
            "average": None if shadow is None else average,
            "scaler": state.scaler,
            "control": state.control,
        }
        write_sealed(staging, STATE_NAME, FORMAT_VERSION, values)
    delete_oldest(output_dir, state.step, identity, limit)
    return target


def delete_oldest(output_dir: Path, step: int, identity: Identity, limit: int | None) -> None:
    """Delete the oldest checkpoints of a run up to a step, beyond a limit."""
    if limit:
        mine = [path for path in checkpoints(output_dir) if _step(path) <= step and _belongs(path, identity)]
        for old in mine[:-limit]:
            shutil.rmtree(old)


def read_checkpoint(folder: str | Path) -> TrainingState:
    """Read a checkpoint whose digests hold.

    Raises:
        DamagedArtefact: It is not whole, or not what was written.
    """
    folder = Path(folder)
    values = read_sealed(folder, STATE_NAME, FORMAT_VERSION, "a checkpoint")
    parameters = load_file(folder / PARAMETERS_NAME)
    state: dict[int, dict[str, Any]] = {
        int(number): dict(entries) for number, entries in values["optimizer"]["state"].items()
    }
    for name, value in load_file(folder / _OPTIMIZER_NAME).items():
        number, entry = name.split(".", 1)
        state.setdefault(int(number), {})[entry] = value
    average = values["average"]
    if average is not None:
        shadow = load_file(folder / _AVERAGE_NAME)
        average = {**average, "shadow_params": [shadow[name] for name in values["trained"]]}
    return TrainingState(
        values["step"], parameters, {"state": state, "param_groups": values["optimizer"]["param_groups"]},
        values["schedule"], average, values["scaler"], values["history"], values["skipped"],
        values["control"], Passes.read(values.get("passes")),
    )  # fmt: skip


def _flattened(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """An optimiser's state as tensors by name, and what is no tensor."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for number, entries in state.items():
        scalars[str(number)] = {}
        # bitsandbytes hides what it keeps in 8 bits from sharding, in a mapping, and takes it as it was without.
        hidden = [value for value in entries.values() if isinstance(value, Mapping)]
        entries = {name: value for name, value in entries.items() if not isinstance(value, Mapping)}
        for name, value in {**entries, **{key: one for each in hidden for key, one in each.items()}}.items():
            if isinstance(value, torch.Tensor):
                # Some optimisers share a table among parameters, which safetensors would refuse.
                tensors[f"{number}.{name}"] = value.detach().clone().contiguous()
            else:
                scalars[str(number)][name] = value
    return tensors, scalars


@dataclass(frozen=True)
class Choice:
    """Where a training goes on.

    Attributes:
        folder: The checkpoint; None to begin at the beginning.
        notes: What there is to say of it, and of those that were passed over.
    """

    folder: Path | None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return _step(self.folder) if self.folder else 0

    @property
    def control(self) -> dict[str, Any]:
        """What the checkpoint keeps of the controller."""
        return read_json(self.folder / STATE_NAME).get("control") or {} if self.folder else {}


def choose_checkpoint(
    output_dir: Path | None, wanted: str | None, identity: Identity | None, settings: Mapping[str, Any]
) -> Choice:
    """Find the checkpoint that `resume_from_checkpoint` means. Nothing is loaded but its digests are compared.

    Args:
        output_dir: The run's folder.
        wanted: `"latest"` (also None), the newest whole one of this very run; `"no"`; or a checkpoint by path or name.
        identity: Of the run; None where there is neither a folder nor a name to look at.
        settings: Of the run; those that a checkpoint may go on with although they changed are told.

    Raises:
        ValueError: A checkpoint that was asked for by name is not there, not whole, or of another run; the message
            names the newest that would do.
    """
    if wanted == "no" or identity is None:
        return Choice(None)
    own = reversed(checkpoints(output_dir)) if output_dir else ()
    if wanted in (None, "latest"):
        notes = []
        for folder in own:
            fault = _fault(folder, identity, settings)
            if fault is None:
                return Choice(folder, (*notes, *_changes(folder, settings)))
            notes.append(f"{folder} is passed over: {fault}")
        return Choice(None, tuple(notes))
    folder = Path(str(wanted))
    if not folder.is_dir() and output_dir:
        folder = output_dir / str(wanted)
    if not folder.is_dir() or not _is_named_so(folder):
        fault = f"is not a checkpoint folder (named {CHECKPOINT_PREFIX}STEP)"
    elif (found := _fault(folder, identity, settings)) is not None:
        fault = f"cannot be gone on from: {found}"
    else:
        return Choice(folder, tuple(_changes(folder, settings)))
    whole = next((path for path in own if path != folder and _fault(path, identity, settings) is None), None)
    other = f"{whole.name}, the newest whole one of this run, " if whole else ""
    raise ValueError(
        f'resume_from_checkpoint="{wanted}" {fault}. Use {other}latest for the newest one, or no to start over'
    )


def _is_named_so(folder: Path) -> bool:
    step = folder.name.removeprefix(CHECKPOINT_PREFIX)
    return step != folder.name and step.isdecimal()


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def _belongs(folder: Path, identity: Identity) -> bool:
    try:
        recorded = read_json(folder / STATE_NAME)
        return not _differences(recorded["run"], identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fault(folder: Path, identity: Identity, settings: Mapping[str, Any]) -> str | None:
    """Why a training cannot go on from a checkpoint; None if it can."""
    if not (folder / STATE_NAME).is_file():
        if (folder / "model.safetensors").is_file() or list(folder.glob("*.pkl")):
            return "it was written by an earlier version, or by another program, and may hold pickles"
        return f"it is empty or not whole (no {STATE_NAME})"
    try:
        recorded = read_sealed(folder, STATE_NAME, FORMAT_VERSION, "a checkpoint")
        differences = _differences(recorded["run"], identity)
        if differences:
            return f"it belongs to another run: {', '.join(differences)}"
        if recorded["step"] != _step(folder):
            return f"it is of step {recorded['step']}"
        steps = settings.get("max_train_steps")
        if steps is not None and recorded["step"] > steps:
            return f"it is beyond max_train_steps={steps}"
        if not _is_finite(folder):
            return "its parameters are not finite"
    except (SafetensorError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def _differences(run: Mapping[str, Any], identity: Identity) -> list[str]:
    left_out = set()
    if identity.facts.get("lr_scheduler") in CONSTANT_SCHEDULES:
        # The steps so far are the same however many there are to be.
        left_out = {"max_train_steps"}
    facts = {name: value for name, value in identity.facts.items() if name not in left_out}
    recorded = {name: value for name, value in run.items() if name not in left_out}
    return Identity(identity.kind, facts).differences(recorded)


def _is_finite(folder: Path) -> bool:
    with safe_open(folder / PARAMETERS_NAME, "pt") as file:
        return all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118


_MAY_CHANGE = (
    "max_train_steps", "logging_steps", "checkpointing_steps", "checkpointing_minutes", "checkpoints_total_limit",
    "validation_prompts", "validation_steps", "num_validation_images", "train_batch_size",
    "gradient_accumulation_steps", "gradient_checkpointing",
)  # fmt: skip


def _changes(folder: Path, settings: Mapping[str, Any]) -> Iterable[str]:
    recorded = read_json(folder / STATE_NAME)["settings"]
    changed = [f"{name}={settings[name]!r} (was {recorded[name]!r})" for name in _MAY_CHANGE
               if name in settings and name in recorded and settings[name] != recorded[name]]  # fmt: skip
    if changed:
        yield f"{folder.name} goes on with {', '.join(changed)}"


def sweep_checkpoints(output_dir: Path) -> None:
    """Delete what processes that are no more had begun to write."""
    sweep(output_dir, f".{CHECKPOINT_PREFIX}")
