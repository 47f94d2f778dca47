"""The command `sa-diffusers`."""

import sys
from collections.abc import Sequence

from .cache import STATES, delete, entries, listing
from .configuration import SelectiveAmnesiaConfig
from .messages import Parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do what it says.

    Args:
        arguments: Default: the program's own.
    """
    parser = Parser(prog="sa-diffusers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cache = commands.add_parser(
        "cache",
        help="list what earlier runs have kept, and delete it",
        description="List samples, images and Fisher information that earlier runs have kept, and delete them.",
        epilog="sa-diffusers cache --delete old damaged; sa-diffusers cache --delete evaluation --older_than 7",
    )
    cache.add_argument("--artifacts_dir", help="the folder [$SA_DIFFUSERS_CACHE or ~/.cache/sa_diffusers]")
    cache.add_argument(
        "--delete", nargs="+", metavar="WHAT", default=[],
        help=f"a state ({', '.join(STATES)}), a kind (evaluation, replay, fisher, ...), or all",
    )  # fmt: skip
    cache.add_argument("--older_than", type=float, default=0.0, metavar="DAYS", help="only what is that old [0]")
    args = parser.parse_args(arguments)
    try:
        folder = SelectiveAmnesiaConfig(artifacts_dir=args.artifacts_dir).resolved_artifacts_dir
        found = entries(folder)
        known = {*STATES, "all", *(entry.kind for entry in found)}
        unknown = [name for name in args.delete if name not in known]
        if unknown:
            sys.exit(f"error: --delete {unknown[0]} is not one of {', '.join(sorted(known))}")
        if args.delete:
            gone = delete(found, args.delete, args.older_than)
            print(f"deleted from {folder}:")
            print("\n".join(listing(gone)))
        else:
            print(f"kept in {folder}:")
            print("\n".join(listing(found)))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
