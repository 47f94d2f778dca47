"""Write `docs/flags.md` from the settings themselves.

python docs/flags.py
"""

import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path

from sa_diffusers.commands import COMMANDS
from sa_diffusers.commands.cache import CacheConfig
from sa_diffusers.commands.extract import ExtractConfig
from sa_diffusers.commands.merge import MergeConfig
from sa_diffusers.commands.push import PushConfig
from sa_diffusers.configuration import (
    ClassifierConfig,
    ClassModelConfig,
    EvaluationConfig,
    SelectiveAmnesiaConfig,
    Settings,
    default_of,
    experiments,
    flags_of,
    group_of,
    type_name,
)

SETTINGS: dict[str, type[Settings]] = {
    "erase": SelectiveAmnesiaConfig,
    "evaluate": EvaluationConfig,
    "push": PushConfig,
    "merge": MergeConfig,
    "extract": ExtractConfig,
    "cache": CacheConfig,
    "train-class-model": ClassModelConfig,
    "train-classifier": ClassifierConfig,
}
HEAD = """\
# Every flag

Written by `python docs/flags.py` from the settings themselves. A truth value is given as `--flag` or `--no-flag`, a
list as words behind its flag, each in quotes where it holds a space. `sa-diffusers COMMAND --help` shows the same.
"""
LAYERS = f"""\
Settings are taken from, the later the stronger: the defaults here, the base model's own
(`selective_amnesia_defaults.json` in its folder), the file given by `--config`, the flags. `--config` takes a YAML or
JSON file whose names are these without the dashes, or the name of one of the paper's experiments:
{textwrap.fill(", ".join(f"`{name}`" for name in experiments()), 120)}.
"""


def pages() -> Iterator[str]:
    yield HEAD
    for command, said in COMMANDS.items():
        config = SETTINGS[command]
        yield f"## sa-diffusers {command}\n\n{said[0].upper() + said[1:]}.\n"
        if command == "erase":
            yield LAYERS
        groups: dict[str | None, list[dataclasses.Field]] = {}
        for spec in flags_of(config):
            groups.setdefault(group_of(config, spec.name), []).append(spec)
        for title, specs in groups.items():
            head = ["flag | type | default | meaning", "--- | --- | --- | ---"]
            table = "\n".join(f"| {line} |" for line in [*head, *map(row, specs)])
            yield (f"### {title}\n\n" if title else "") + table + "\n"


def row(spec: dataclasses.Field) -> str:
    default = default_of(spec)
    if default is dataclasses.MISSING:
        shown = "must be given"
    elif default is None or default == []:
        shown = ""
    else:
        items = default if isinstance(default, list) else [default]
        shown = " ".join(f"`{str(item).lower() if isinstance(item, bool) else item}`" for item in items)
    name = spec.name if spec.metadata["positional"] else f"--{spec.name}"
    meaning = spec.metadata["help"].replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")
    return f"`{name}` | {type_name(spec)} | {shown} | {meaning}"


def text() -> str:
    return "\n".join(pages())


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(text(), encoding="utf-8")
