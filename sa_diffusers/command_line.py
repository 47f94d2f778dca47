"""From a command line to a configuration."""

import argparse
import dataclasses
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .configuration import (
    GRID_NAME,
    SelectiveAmnesiaConfig,
    base_defaults,
    flag_type,
    read_settings,
)
from .messages import Parser


def build_parser() -> argparse.ArgumentParser:
    """The parser of `examples/train_sa.py`, one flag for each field of the configuration."""
    parser = Parser(
        description="Make a text-to-image model forget a concept.",
        epilog=textwrap.dedent("""\
            Settings are taken from, the later the stronger: the defaults shown here, the base model's own
            (selective_amnesia_defaults.json in its folder), the file given by --config, the flags.
        """),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of the settings below")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for spec in dataclasses.fields(SelectiveAmnesiaConfig):
        group = spec.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        _add_flag(groups[group], spec)
    return parser


def _add_flag(group: argparse._ArgumentGroup, spec: dataclasses.Field) -> None:
    kind, is_list, allowed = flag_type(spec.type)
    default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()  # type: ignore[misc]
    text = spec.metadata["help"]
    if default not in (None, [], False):
        shown = " ".join(f'"{item}"' for item in default) if is_list else default
        text += f" [{shown}]"
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": kind, "choices": allowed}
        options["metavar"] = "{" + ",".join(allowed) + "}" if allowed else _metavar(kind)
        if is_list:
            options["nargs"] = "+"
    group.add_argument(f"--{spec.name}", **options)


def _metavar(kind: type) -> str:
    return {int: "N", float: "X", str: "TEXT"}[kind]


def parse_config(arguments: Sequence[str] | None = None) -> SelectiveAmnesiaConfig:
    """Read the command line; a mistake in it ends the program with exit code 2 and a message.

    Args:
        arguments: Default: the program's own.
    """
    parser = build_parser()
    flags = vars(parser.parse_args(arguments))
    file = flags.pop("config", None)
    try:
        settings = (read_settings(file) if file else {}) | flags
        return SelectiveAmnesiaConfig(**(base_defaults(settings) | settings))
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None, build_objective: Callable | None = None) -> None:
    """Read the command line and run the erasure; what goes wrong ends the program with one line.

    Args:
        arguments: Default: the program's own.
        build_objective: As for `sa_diffusers.erasure.Erasure`.
    """
    config = parse_config(arguments)
    # Imported late: these take seconds, and a mistake on the command line should not.
    from .processes import EXIT_INTERRUPTED, Interrupted, is_lost_peer, say_stopped, watching

    try:
        with watching():
            _erase(config, build_objective)
    except Interrupted as stop:
        say_stopped(stop)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        say_stopped(f"another process of this run is gone ({str(error).splitlines()[0]})")
        sys.exit(EXIT_INTERRUPTED)


def _erase(config: SelectiveAmnesiaConfig, build_objective: Callable | None) -> None:
    from .erasure import Erasure
    from .hub import CARD_NAME, repository_name
    from .markup import visible
    from .publish import push_pipeline, write_model_card
    from .report import PAGE_NAME
    from .results.verdict import EXIT_NOT_FORGOTTEN, FORGOTTEN

    if config.push_to_hub:
        # A name that the Hub refuses should not come to light after hours.
        repository_name(config.resolved_output_dir, config.hub_model_id)
    erasure = Erasure(config, build_objective)

    def say(text: str) -> None:
        try:
            erasure.accelerator.print(text, flush=True)
        except BrokenPipeError:
            # Nobody reads any more: that is no reason to leave the work half done.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    say(f"\nPlan\n{erasure.plan()}\n")
    comparison = erasure.run()
    own_card = erasure.accelerator.is_main_process and write_model_card(erasure.output_dir)
    if comparison is not None:
        folder = erasure.output_dir
        say(f"\n{comparison.table()}\n")
        say(f"pipeline  {folder}")
        say(f"report    {folder / PAGE_NAME}")
        say(f"pictures  {folder / GRID_NAME}")
        kept = "" if own_card else " (your own; not written)"
        say(f"card      {folder / CARD_NAME}{kept}")
        if config.push_to_hub:
            say(f"hub       {push_pipeline(folder, config.hub_model_id, config.hub_private_repo)}")
        say(next_commands(config, folder, erasure.labels is not None))
    erasure.accelerator.end_training()
    verdict = comparison and comparison.report.verdict
    if verdict:
        say(f"verdict   {visible(verdict.line)}")
        if config.require_forgotten and verdict.outcome != FORGOTTEN:
            sys.exit(EXIT_NOT_FORGOTTEN)


def next_commands(config: SelectiveAmnesiaConfig, folder: Path, has_classes: bool) -> str:
    """What whoever has an erased pipeline does next."""
    base, place = shlex.quote(config.pretrained_model_name_or_path), shlex.quote(str(folder))
    protocol = "class" if has_classes else "concept"
    lines = [
        f"load      DiffusionPipeline.from_pretrained({str(folder)!r})",
        f"evaluate  python examples/evaluate_sa.py --base {base} --erased {place} --protocol {protocol}",
    ]
    if not config.push_to_hub:
        lines.append(f"publish   python examples/push_to_hub.py {place}")
    return "\n".join(lines)
