"""`sa-diffusers merge`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..configuration import Settings, flag
from .parser import build_parser, one_line_errors, parse

_DESCRIPTION = """\
Fuse an adapter into its base model, and write the whole pipeline.

    sa-diffusers merge brad-pitt-adapter --output_dir brad-pitt

A fused erasure cannot be switched off, and loads without the base model.
"""


@dataclass
class MergeConfig(Settings):
    """What is fused, and where it goes."""

    as_flags = True
    adapter: str = flag(
        help="the adapter: a folder that an erasure wrote, or a name on the Hub", positional=True, path=True
    )
    output_dir: Path = flag(help="folder of the pipeline, empty or not there")
    base: str | None = flag(None, "the base model, not quantised [as in the adapter's settings]", path=True)
    single_file_config: str | None = flag(
        None,
        "of a base that is a single file: the pipeline that lends it its configurations [as in the adapter's settings]",
        path=True,
    )


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the command line and write the pipeline; what goes wrong ends the program with one line.

    Args:
        arguments: Default: the program's own.
        prog: The program's name in its help. Default: as it was called.
    """
    config = parse(build_parser(MergeConfig, prog, _DESCRIPTION), MergeConfig, arguments)
    with one_line_errors():
        # Imported late: it takes seconds, and a mistake on the command line should not.
        from ..merging import merge_adapter

        merge_adapter(config.adapter, config.output_dir, config.base, config.single_file_config)
        print(f"pipeline  {config.output_dir}")
