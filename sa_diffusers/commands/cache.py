"""`sa-diffusers cache`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..cache import STATES, delete, entries, listing
from ..configuration import SelectiveAmnesiaConfig, Settings, flag
from .parser import build_parser, one_line_errors, parse


@dataclass
class CacheConfig(Settings):
    """What to list or delete of what earlier runs have kept."""

    as_flags = True
    artifacts_dir: str | None = flag(None, "the folder [$SA_DIFFUSERS_CACHE or ~/.cache/sa_diffusers]", path=True)
    delete: list[str] = flag(
        [], f"a state ({', '.join(STATES)}), a kind (evaluation, replay, fisher, ...), or all", metavar="WHAT"
    )
    older_than: float = flag(0.0, "only what is that old", metavar="DAYS", at_least=0)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the command line, and list or delete.

    Args:
        arguments: Default: the program's own.
        prog: The program's name in its help. Default: as it was called.
    """
    parser = build_parser(
        CacheConfig,
        prog,
        "List samples, images and Fisher information that earlier runs have kept, and delete them.",
        "sa-diffusers cache --delete old damaged; sa-diffusers cache --delete evaluation --older_than 7",
    )
    config = parse(parser, CacheConfig, arguments)
    with one_line_errors():
        folder = SelectiveAmnesiaConfig(artifacts_dir=config.artifacts_dir).resolved_artifacts_dir
        found = entries(folder)
        known = {*STATES, "all", *(entry.kind for entry in found)}
        unknown = [name for name in config.delete if name not in known]
        if unknown:
            raise ValueError(f"--delete {unknown[0]} is not one of {', '.join(sorted(known))}")
        if config.delete:
            print(f"deleted from {folder}:")
            print("\n".join(listing(delete(found, config.delete, config.older_than))))
        else:
            print(f"kept in {folder}:")
            print("\n".join(listing(found)))
