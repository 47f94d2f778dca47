"""`sa-diffusers erase`, which `examples/train_sa.py` calls."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..configuration import GRID_NAME, SelectiveAmnesiaConfig, base_defaults, experiments, read_settings
from ..messages import Parser
from . import parser as parsing

_EPILOG = """\
Settings are taken from, the later the stronger: the defaults shown here, the base model's own
(selective_amnesia_defaults.json in its folder), the file given by --config, the flags.
"""


def build_parser(prog: str | None = None) -> Parser:
    """The parser of `sa-diffusers erase`, one flag for each field of the configuration."""
    parser = parsing.build_parser(
        SelectiveAmnesiaConfig, prog, "Make a text-to-image or class-conditional model forget a concept.", _EPILOG
    )
    parser.add_argument(
        "--config", metavar="FILE",
        help="YAML or JSON file with any of the settings below, or the name of one of the paper's experiments: "
             + ", ".join(experiments()),
    )  # fmt: skip
    return parser


def parse_config(arguments: Sequence[str] | None = None, prog: str | None = None) -> SelectiveAmnesiaConfig:
    """Read the command line; a mistake in it ends the program with exit code 2 and a message.

    Args:
        arguments: Default: the program's own.
        prog: The program's name in its help. Default: as it was called.
    """

    def build(flags: dict[str, Any]) -> SelectiveAmnesiaConfig:
        file = flags.pop("config", None)
        settings = (read_settings(file) if file else {}) | flags
        return SelectiveAmnesiaConfig(**(base_defaults(settings) | settings))

    return parsing.parse(build_parser(prog), SelectiveAmnesiaConfig, arguments, build)


def main(
    arguments: Sequence[str] | None = None, build_objective: Callable | None = None, prog: str | None = None
) -> None:
    """Read the command line and run the erasure; what goes wrong ends the program with one line.

    Args:
        arguments: Default: the program's own.
        build_objective: As for `sa_diffusers.erasure.Erasure`.
        prog: The program's name in its help. Default: as it was called.
    """
    config = parse_config(arguments, prog)
    with parsing.one_line_errors():
        _erase(config, build_objective)


def _erase(config: SelectiveAmnesiaConfig, build_objective: Callable | None) -> None:
    # Imported late: these take seconds, and a mistake on the command line should not.
    from ..erasure import Erasure
    from ..hub import CARD_NAME
    from ..markup import visible
    from ..report import PAGE_NAME
    from ..results.verdict import EXIT_NOT_FORGOTTEN, FORGOTTEN

    erasure = Erasure(config, build_objective)

    def say(text: str) -> None:
        try:
            erasure.accelerator.print(text, flush=True)
        except BrokenPipeError:
            # Nobody reads any more: that is no reason to leave the work half done.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    say(f"\nPlan\n{erasure.plan()}\n")
    comparison = erasure.run(parts=True)
    own_card = erasure.accelerator.is_main_process and erasure.card_stage.run()
    verdict, ending = comparison and comparison.report.verdict, comparison and comparison.report.ending
    failed = config.require_forgotten and verdict and verdict.outcome != FORGOTTEN
    if comparison is not None:
        folder = erasure.output_dir
        say(f"\n{comparison.table()}\n")
        say(f"{'adapter ' if config.adapter else 'pipeline'}  {folder}")
        say(f"report    {folder / PAGE_NAME}")
        say(f"pictures  {folder / GRID_NAME}")
        kept = "" if own_card else " (your own; not written)"
        say(f"card      {folder / CARD_NAME}{kept}")
        if failed and config.push_to_hub:
            say("hub       not pushed, as the verdict is another than forgotten (--require_forgotten)")
        elif address := erasure.push_stage.run():
            say(f"hub       {address}")
        say(next_commands(config, folder, erasure.labels is not None))
    if ending:
        say(f"training  {ending.title}: {visible(ending.sentence)}")
    if verdict:
        say(f"verdict   {visible(verdict.line)}")
    if failed:
        sys.exit(EXIT_NOT_FORGOTTEN)


def next_commands(config: SelectiveAmnesiaConfig, folder: Path, has_classes: bool) -> str:
    """What whoever has an erased pipeline does next."""
    base, place = shlex.quote(config.pretrained_model_name_or_path), shlex.quote(str(folder))
    protocol = "class" if has_classes else "concept"
    # Where a classifier knows the model's world, CLIP need not be downloaded for it.
    clip = " --clip none" if config.classifier and not has_classes else ""
    load = f"DiffusionPipeline.from_pretrained({str(folder)!r})"
    if config.save_components == "trained":
        load = f"sa_diffusers.load_pipeline({str(folder)!r})"
    if config.adapter:
        from ..families.trained import loads_in_diffusers

        name = config.pretrained_model_name_or_path
        call = f"DiffusionPipeline.from_pretrained({name!r})"
        if not loads_in_diffusers(name):
            lender = f", single_file_config={config.single_file_config!r}" if config.single_file_config else ""
            call = f"sa_diffusers.load_pipeline({name!r}{lender})"
        load = f"{call}, then pipeline.load_lora_weights({str(folder)!r})"
    lines = [
        f"load      {load}",
        f"evaluate  sa-diffusers evaluate --base {base} --erased {place} --protocol {protocol}{clip}",
    ]
    if not config.push_to_hub:
        lines.append(f"publish   sa-diffusers push {place}")
    return "\n".join(lines)
