"""`sa-diffusers extract`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..configuration import Settings, flag
from .parser import build_parser, one_line_errors, parse

_DESCRIPTION = """\
Make a low-rank adapter from an erased pipeline: what it changed, as far as a rank holds it.

    sa-diffusers extract brad-pitt --output_dir brad-pitt-adapter --lora_rank 8

How much of the update that is, is said; whether it is enough, only an evaluation says.
"""


@dataclass
class ExtractConfig(Settings):
    """What is compared, and where the adapter goes."""

    as_flags = True
    erased: str = flag(
        help="the erased pipeline: a folder that an erasure wrote, or a name on the Hub", positional=True, path=True
    )
    output_dir: Path = flag(help="folder of the adapter, empty or not there")
    lora_rank: int = flag(8, "rank of the adapter, and its alpha", at_least=1, at_most=65_536)
    base: str | None = flag(None, "the base model [as in the erasure's settings]", path=True)
    single_file_config: str | None = flag(
        None,
        "of a base that is a single file: the pipeline that lends it its configurations [as in the erasure's settings]",
        path=True,
    )


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the command line and write the adapter; what goes wrong ends the program with one line.

    Args:
        arguments: Default: the program's own.
        prog: The program's name in its help. Default: as it was called.
    """
    config = parse(build_parser(ExtractConfig, prog, _DESCRIPTION), ExtractConfig, arguments)
    with one_line_errors():
        # Imported late: it takes seconds, and a mistake on the command line should not.
        from ..merging import extract_adapter

        extracted = extract_adapter(
            config.erased, config.output_dir, config.lora_rank, config.base, config.single_file_config
        )
        print(f"adapter   {config.output_dir}")
        print(f"holds     {extracted.sentence}")
