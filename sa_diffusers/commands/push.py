"""`sa-diffusers push`, which `examples/push_to_hub.py` calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..configuration import CONFIG_NAME, FISHER_CONFIG_NAME, Settings, flag
from ..files import read_json
from .parser import build_parser, one_line_errors, parse

_DESCRIPTION = """\
Upload a folder to the Hub: an erased pipeline, or saved Fisher information.

    sa-diffusers push brad-pitt --hub_model_id USER/no-brad-pitt --private

Checkpoints and logs stay behind. Log in with `hf auth login` first.
"""


@dataclass
class PushConfig(Settings):
    """What to upload, and where to."""

    as_flags = True
    folder: Path = flag(help="the folder", positional=True)
    hub_model_id: str | None = flag(None, "name on the Hub [as in the run's settings, or the folder's]")
    private: bool | None = flag(None, "make a new repository private [as in the run's settings]")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the command line and upload; what goes wrong ends the program with one line.

    Args:
        arguments: Default: the program's own.
        prog: The program's name in its help. Default: as it was called.
    """
    config = parse(build_parser(PushConfig, prog, _DESCRIPTION), PushConfig, arguments)
    with one_line_errors():
        print(f"hub       {push(config)}")


def push(config: PushConfig) -> str:
    """Upload the folder, and tell what its reports say; returns its address on the Hub."""
    # Imported late: these take seconds, and a mistake on the command line should not.
    from ..families.adapters import ADAPTER_FILE
    from ..families.names import TRAINED_NAME
    from ..fisher import FisherInformation
    from ..hub import push_folder
    from ..markup import visible
    from ..publish import push_pipeline
    from ..publish.facts import read_facts

    folder = config.folder
    settings = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / CONFIG_NAME} holds no settings: restore it or remove it")
    name = config.hub_model_id or settings.get("hub_model_id")
    private = settings.get("hub_private_repo", False) if config.private is None else config.private
    is_pipeline = any((folder / name).is_file() for name in ("model_index.json", TRAINED_NAME, ADAPTER_FILE))
    if (folder / FISHER_CONFIG_NAME).is_file() and not is_pipeline:
        card = FisherInformation.from_pretrained(folder).model_card
        return push_folder(folder, name, private, card, commit_message="Upload Fisher information")
    address = push_pipeline(folder, name, private)
    facts = read_facts(folder)
    if facts.ending:
        print(f"training  {facts.ending.title}: {visible(facts.ending.sentence)}")
    for verdict in facts.verdicts:
        print(f"verdict   {visible(verdict.line)}")
    return address
