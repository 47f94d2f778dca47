"""From a dataclass of settings to the flags of a command, and from a command line to the dataclass."""

import argparse
import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..configuration import Settings, default_of, flag_type, flags_of, group_of, help_text
from ..messages import Parser
from ..processes import (
    EXIT_INTERRUPTED,
    Interrupted,
    is_lost_peer,
    is_out_of_memory,
    out_of_memory,
    say_stopped,
    watching,
)

_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
_PACKAGE = Path(__file__).parent.parent
Config = TypeVar("Config", bound=Settings)


def build_parser(config: type[Settings], prog: str | None, description: str, epilog: str | None = None) -> Parser:
    """A parser with one flag for each setting."""
    parser = Parser(prog=prog, description=description, epilog=epilog)
    groups: dict[str | None, Any] = {None: parser}
    for spec in flags_of(config):
        title = group_of(config, spec.name)
        if title not in groups:
            groups[title] = parser.add_argument_group(title[0].lower() + title[1:])
        _add_flag(groups[title], spec)
    return parser


def _add_flag(group: Any, spec: dataclasses.Field) -> None:
    kind, is_list, allowed = flag_type(spec.type)
    must = " (must be given)" if default_of(spec) is dataclasses.MISSING else ""
    options: dict[str, Any] = {"help": help_text(spec).replace("%", "%%") + must}
    if spec.metadata["positional"]:
        group.add_argument(spec.name, **options)
        return
    options["default"] = argparse.SUPPRESS
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        choices = "{" + ",".join(allowed) + "}" if allowed else None
        # A refusal that says why is the configuration's own.
        listed = None if spec.metadata["why_no_other"] else allowed
        options |= {"type": kind, "choices": listed, "metavar": choices or spec.metadata["metavar"] or _METAVARS[kind]}
        if is_list:
            options["nargs"] = "+"
    group.add_argument(f"--{spec.name}", **options)


def parse(
    parser: Parser,
    config: type[Config],
    arguments: Sequence[str] | None,
    build: Callable[[dict[str, Any]], Config] | None = None,
) -> Config:
    """Read the command line; a mistake in it ends the program with exit code 2 and a message.

    Args:
        parser: As `build_parser` makes it of the class.
        config: The class of the settings.
        arguments: None is the program's own.
        build: Makes the settings of the flags that were given. Default: the class itself.
    """
    flags = vars(parser.parse_args(arguments))
    needed = [f"--{spec.name}" for spec in flags_of(config)
              if default_of(spec) is dataclasses.MISSING and spec.name not in flags]  # fmt: skip
    if needed:
        parser.error(f"the following arguments are required: {', '.join(needed)}")
    try:
        with one_line_warnings():
            return build(flags) if build else config(**flags)
    except ValueError as error:
        parser.error(str(error))


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """What this package warns of inside is shown as one line, without the place in its code."""
    usual = warnings.formatwarning

    def formatted(message: Any, category: type[Warning], filename: str, *place: Any, **more: Any) -> str:
        is_own = category is UserWarning and _PACKAGE in Path(filename).parents
        return f"warning: {message}\n" if is_own else usual(message, category, filename, *place, **more)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


@contextlib.contextmanager
def one_line_errors(after_a_stop: str = "The same command goes on from there") -> Iterator[None]:
    """What goes wrong inside ends the program with one line and exit code 1, a request to stop with 75.

    Args:
        after_a_stop: What the user is to do then.
    """
    try:
        with watching(), one_line_warnings():
            yield
    except Interrupted as stop:
        say_stopped(stop, after_a_stop)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        from ..hub import one_line

        sys.exit(f"error: {one_line(error)}")
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            sys.exit(f"error: {out_of_memory(error)}: give smaller batches or --weights_dtype bfloat16, or free some")
        if not is_lost_peer(error):
            raise
        say_stopped(f"another process of this run is gone ({str(error).splitlines()[0]})", after_a_stop)
        sys.exit(EXIT_INTERRUPTED)
