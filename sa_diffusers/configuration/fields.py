"""Settings as dataclasses: what a field says of itself, and how a value is checked against it."""

import dataclasses
import inspect
import math
import os
import textwrap
import types
import typing
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from ..messages import shown

_LONGEST_TEXT = 10_000
_NEEDED = object()
Kind = TypeVar("Kind", bound=type)


def flag(
    default: Any = _NEEDED,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    path: bool = False,
    own: bool = False,
    check: Callable[[str, Any], None] | None = None,
    metavar: str | None = None,
    positional: bool = False,
    why_no_other: str | None = None,
) -> Any:
    """A setting.

    Args:
        default: Left out, the setting must be given.
        help: What it means, in one line.
        at_least: The smallest number allowed; `above` is the largest that is too small.
        at_most: The largest number allowed; `below` is the smallest that is too large.
        path: Whether it is, or may be, a place on this machine.
        own: Whether no base model may recommend it.
        check: Called with the name and the value, where there is one; raises ValueError.
        metavar: Stands for the value in the help of the command line.
        positional: Whether the command line takes it without a name.
        why_no_other: Of a setting with a few allowed values, why another is refused, and what to do instead.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if default is _NEEDED:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """Checks every field by what it says of itself, and then all of them together.

    A group of settings is a dataclass of this kind, and its docstring the group's title; one that inherits from
    several groups has the settings of them all.
    """

    _written: ClassVar[frozenset[str]]
    # Whether messages name a setting as a flag (`--images 0`) or as a name and a value (`images=0`).
    as_flags: ClassVar[bool] = False

    def __new__(cls, *values: Any, **named: Any) -> "Settings":
        settings = super().__new__(cls)
        # What was written counts as written, even where it is the default.
        settings.__dict__["_written"] = (
            frozenset([spec.name for spec in dataclasses.fields(cls)][: len(values)]) | named.keys()
        )
        return settings

    @property
    def written(self) -> dict[str, Any]:
        """The settings that were given, and those that are not their defaults (any more)."""
        return {
            spec.name: getattr(self, spec.name)
            for spec in flags_of(type(self))
            if spec.name in self._written or getattr(self, spec.name) != default_of(spec)
        }

    def __post_init__(self) -> None:
        for spec in flags_of(type(self)):
            try:
                setattr(self, spec.name, checked(spec, getattr(self, spec.name)))
            except ValueError as error:
                if not self.as_flags:
                    raise
                raise ValueError(str(error).replace(f"{spec.name}=", f"--{spec.name} ", 1)) from error
        self.check()

    def check(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ValueError: They do.
        """


def flags_of(cls: type) -> list[dataclasses.Field]:
    """The fields that are settings, in order."""
    return [spec for spec in dataclasses.fields(cls) if "help" in spec.metadata]


def documented(cls: Kind) -> Kind:
    """Let `help` of a class of settings say what each of them means."""
    lines = []
    for spec in flags_of(cls):
        said = f"{spec.name} ({type_name(spec)}): {help_text(spec)}"
        lines += textwrap.wrap(said, 115, initial_indent="    ", subsequent_indent=" " * 8,
                               break_on_hyphens=False)  # fmt: skip
    cls.__doc__ = (inspect.getdoc(cls) or "") + "\n\nAttributes:\n" + "\n".join(lines) + "\n"
    return cls


def group_of(cls: type, name: str) -> str | None:
    """The title of the group that a setting belongs to; None if it is the class's own."""
    for base in reversed(cls.__mro__):
        if name in getattr(base, "__dataclass_fields__", {}):
            return None if base is cls else (base.__doc__ or "").partition("\n")[0].rstrip(".")
    raise KeyError(name)


def default_of(spec: dataclasses.Field) -> Any:
    """A field's default; `dataclasses.MISSING` if it has none."""
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default


def help_text(spec: dataclasses.Field) -> str:
    """What a setting means, and its default unless that says nothing."""
    default = default_of(spec)
    if default in (None, [], False, dataclasses.MISSING):
        return spec.metadata["help"]
    value = " ".join(f'"{item}"' for item in default) if isinstance(default, list) else default
    return f"{spec.metadata['help']} [{value}]"


def type_name(spec: dataclasses.Field) -> str:
    """A setting's type in words: `int`, `list of str`, `"no", "fp16" or "bf16"`."""
    kind, is_list, allowed = flag_type(spec.type)
    if allowed is None:
        return f"list of {kind.__name__}" if is_list else kind.__name__
    names = [f'"{item}"' for item in allowed]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def flag_type(annotation: Any) -> tuple[type, bool, tuple | None]:
    """The element type, whether it is a list, and the allowed values, of a field's annotation."""
    options = [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [option for option in typing.get_args(annotation) if option is not types.NoneType]
    option = options[0]
    if typing.get_origin(option) is list:
        return typing.get_args(option)[0], True, None
    if typing.get_origin(option) is Literal:
        return str, False, typing.get_args(option)
    return option, False, None


def checked(spec: dataclasses.Field, value: Any) -> Any:
    """A value as its field wants it: a single string serves as a list of one, a path's `~` is expanded.

    Raises:
        ValueError: The value is of another type, or not allowed.
    """
    value = _coerced(spec, value)
    if value is not None:
        _check_range(spec, value)
        if spec.metadata["check"] is not None:
            spec.metadata["check"](spec.name, value)
    return value


def _check_range(spec: dataclasses.Field, value: Any) -> None:
    limits = spec.metadata
    at_least, above, at_most, below = (limits[name] for name in ("at_least", "above", "at_most", "below"))
    given = f"{spec.name}={shown(value)}"
    if below is not None:
        if not at_least <= value < below:
            raise ValueError(f"{given} must be at least {at_least} and less than {below}")
    elif at_least is not None and not value >= at_least:
        raise ValueError(f"{given} must be at least {at_least}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{given} must be at most {at_most:,}")
    if above is not None and not value > above:
        raise ValueError(f"{given} must be greater than {above}")


def _coerced(spec: dataclasses.Field, value: Any) -> Any:
    kind, is_list, allowed = flag_type(spec.type)
    # YAML reads a bare `no` as false.
    if value is False and (spec.name == "resume_from_checkpoint" or "no" in (allowed or ())):
        value = "no"
    if value is None and spec.name == "resume_from_checkpoint":
        value = spec.default
    if value is None:
        if types.NoneType not in typing.get_args(spec.type):
            raise ValueError(f"{spec.name} must be given")
        return None
    if is_list:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, kind) for item in value):
            raise ValueError(
                f"{spec.name}={shown(value)} must be a list of {kind.__name__}: put each in quotes if it is text"
            )
        return [_text(spec, item) for item in value]
    if allowed is not None:
        if not isinstance(value, str) or value not in allowed:
            why = f": {spec.metadata['why_no_other']}" if spec.metadata["why_no_other"] else ""
            names = ", ".join(f"{item!r}" for item in allowed)
            raise ValueError(f'{spec.name}="{shown(value)}" is not one of {names}{why}')
        return value
    if kind is float and not isinstance(value, bool):
        # YAML reads 1e-5 (no dot) as a string.
        try:
            value = float(value)
        except (TypeError, ValueError):
            # What Python writes of a text is in quotes.
            given = repr(shown(value)) if isinstance(value, str) else shown(value)
            raise ValueError(f"{spec.name}={given} must be a number") from None
        except OverflowError:
            raise ValueError(f"{spec.name}={shown(value)} must be finite: it is too large a number") from None
        if not math.isfinite(value):
            raise ValueError(f"{spec.name}={value} must be finite")
        return value
    is_path = kind is Path
    if is_path:
        kind = str
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        given = repr(shown(value)) if isinstance(value, str) else shown(value)
        raise ValueError(f"{spec.name}={given} must be of type {kind.__name__}")
    if kind is str:
        value = _text(spec, value)
        if not value.strip():
            raise ValueError(f"{spec.name} is empty: give it a value, or leave it out")
    return Path(value) if is_path else value


def _text(spec: dataclasses.Field, value: str) -> str:
    """A text that files can hold; where it is a path, with its `~` expanded."""
    unwritable = [letter for letter in value if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r"]
    if unwritable:
        raise ValueError(f'{spec.name}="{shown(value)}" holds the character {shown(unwritable[0])}: leave it out')
    if len(value) > _LONGEST_TEXT:
        raise ValueError(f'{spec.name}="{shown(value)}" has {len(value):,} characters, {_LONGEST_TEXT:,} are allowed')
    if not (spec.metadata["path"] or flag_type(spec.type)[0] is Path):
        return value
    if value.startswith("~"):
        expanded = os.path.expanduser(value)
        if expanded.startswith("~"):
            raise ValueError(f'{spec.name}="{shown(value)}": there is no such user: give the whole path')
        value = expanded
    # A surrogate may be a prompt of any length.
    if spec.name != "surrogate" and max(len(os.fsencode(part)) for part in value.split(os.sep)) > 255:
        raise ValueError(f'{spec.name}="{shown(value)}" is longer than the name of a file can be')
    return value
