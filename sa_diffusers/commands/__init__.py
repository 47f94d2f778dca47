"""Make a generative model forget, measure what it has forgotten, publish it."""

import importlib
import sys
from collections.abc import Sequence

from ..messages import Parser, did_you_mean, shown
from ..version import __version__

# Each is a module here, imported when it is asked for.
COMMANDS = {
    "erase": "make a text-to-image or class-conditional model forget a concept",
    "evaluate": "measure what a saved pipeline has forgotten and what it has kept",
    "push": "upload an erased pipeline or Fisher information to the Hub",
    "merge": "fuse an adapter into its base model",
    "extract": "make an adapter from an erased pipeline",
    "cache": "list what earlier runs have kept, and delete it",
    "train-class-model": "train the base model of a class experiment",
    "train-classifier": "train the image classifier that scores a class experiment",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `sa-diffusers`: read the command line and do what it says.

    Args:
        arguments: Default: the program's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {said}" for name, said in COMMANDS.items())
    parser = Parser(
        prog="sa-diffusers",
        usage="sa-diffusers COMMAND ...",
        description=f"{__doc__}\n\ncommands:\n{listed}",
        epilog="sa-diffusers COMMAND --help shows the flags of one.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    if not words or words[0].startswith("-"):
        parser.parse_args(words)
        parser.error(f"give a command: {', '.join(COMMANDS)}")
    if words[0] not in COMMANDS:
        near = did_you_mean(words[0], COMMANDS) or f": give one of {', '.join(COMMANDS)}"
        parser.error(f'unknown command "{shown(words[0])}"{near}')
    command = importlib.import_module(f".{words[0].replace('-', '_')}", __name__)
    command.main(words[1:], prog=f"sa-diffusers {words[0]}")
