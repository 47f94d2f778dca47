"""`sa-diffusers evaluate`, which `examples/evaluate_sa.py` calls."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..configuration import EvaluationConfig
from .parser import build_parser, one_line_errors, parse

# Scripts that do what the command does.
_SAME = ("evaluate_sa.py", "sa-diffusers", "__main__.py")
_EPILOG = """\
    sa-diffusers evaluate --base CompVis/stable-diffusion-v1-4 --erased brad-pitt --protocol concept
    sa-diffusers evaluate --base mnist-base --erased 0 --protocol class --classifier mnist-classifier \\
        --real ylecun/mnist

What is sampled is kept: the same command goes on where it stopped, and protocols share what they have in common.
"""


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> EvaluationConfig:
    """Read the command line; a mistake in it ends the program with exit code 2 and a message.

    Args:
        arguments: Default: the program's own.
        prog: The program's name in its help. Default: as it was called.
    """
    description = "Measure what a saved pipeline has forgotten and what it has kept, against its base."
    config = parse(build_parser(EvaluationConfig, prog, description, _EPILOG), EvaluationConfig, arguments)
    config.command = _command(arguments, prog)
    return config


def _command(arguments: Sequence[str] | None, prog: str | None) -> str:
    """How it was called: by a script of one's own, that may have registered more than the command knows, or not."""
    script = Path(sys.argv[0]).name
    own = prog is None and arguments is None and script not in _SAME
    words = ["python", script] if own else ["sa-diffusers", "evaluate"]
    return shlex.join([*words, *(sys.argv[1:] if arguments is None else arguments)])


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the command line, measure, write the report; what goes wrong ends the program with one line.

    Args:
        arguments: Default: the program's own.
        prog: The program's name in its help. Default: as it was called.
    """
    config = parse_args(arguments, prog)
    with one_line_errors():
        # Imported late: it takes seconds, and a mistake on the command line should not.
        from ..evaluation.command_line import run
        from ..results.verdict import EXIT_NOT_FORGOTTEN, FORGOTTEN

        report = run(config)
        verdict = report and report.verdict
        if config.require_forgotten and verdict and verdict.outcome != FORGOTTEN:
            sys.exit(EXIT_NOT_FORGOTTEN)
