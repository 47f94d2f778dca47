"""A copy of an erased pipeline, for another place on the same machine."""

import shutil
from pathlib import Path

from ..configuration import (
    BASE_DEFAULTS_NAME,
    CONFIG_NAME,
    ENDING_NAME,
    FISHER_CONFIG_NAME,
    HISTORY_NAME,
    MERGED_NAME,
    REPORT_FILES,
    inherited_defaults,
    read_settings,
)
from ..files import new_folder, replacing_folder, write_json
from ..hub import CARD_NAME, is_own_card, published_files
from ..output_folder import VALIDATION_NAME, holds_run, model_files, write_digests

# What is of the weights that an earlier copy held, and goes with them.
_OF_WEIGHTS = (BASE_DEFAULTS_NAME, ENDING_NAME, *REPORT_FILES, FISHER_CONFIG_NAME,
               HISTORY_NAME, MERGED_NAME, VALIDATION_NAME)  # fmt: skip


def save_copy(source: str | Path, target: str | Path) -> None:
    """Copy what of an erased pipeline's folder would be published: neither checkpoints nor logs.

    Args:
        source: The folder of an erased pipeline.
        target: Empty, not there, or an earlier copy, which is replaced.

    Raises:
        ValueError: The target is a file, holds something else, is the base model's folder, or is inside of the source
            or around it.
        OSError: It cannot be written; what was there before is unchanged.
    """
    if not str(target).strip():
        raise ValueError('the folder is named "": name one')
    source, target = Path(source), Path(target)
    check_target(source, target)
    own_card = is_own_card(target)
    leaving = [name for name in _OF_WEIGHTS if (target / name).exists()]
    leaving += model_files(target) if target.is_dir() else []
    leaving += [path.name for path in target.glob("evaluation*") if path.is_dir()] if target.is_dir() else []
    leaving += [CARD_NAME] if own_card and (target / CARD_NAME).is_file() else []
    with replacing_folder(target, leaving) if target.is_dir() else new_folder(target) as staging:
        for file in published_files(source):
            inside = file.relative_to(source)
            if inside.as_posix() == CARD_NAME and not own_card:
                continue
            place = staging / inside
            place.parent.mkdir(parents=True, exist_ok=True)
            if inside.as_posix() == BASE_DEFAULTS_NAME:
                write_json(place, inherited_defaults(str(source), target))
            else:
                shutil.copyfile(file, place)
        write_digests(staging)


def check_target(source: Path, target: Path) -> None:
    """Refuse a folder that holds something of value.

    Raises:
        ValueError: It does.
    """
    if target.is_file():
        raise ValueError(f"{target} is a file: choose a folder")
    here, there = source.resolve(), target.resolve()
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise ValueError(f"{target} is inside of {source} or around it: choose another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if holds_run(target):
        raise ValueError(f"{target} is the output folder of another erasure: choose an empty folder")
    if not (target / CONFIG_NAME).is_file():
        raise ValueError(f"{target} already holds something else (no {CONFIG_NAME} in it): choose an empty folder")
    base = read_settings(source / CONFIG_NAME).get("pretrained_model_name_or_path")
    if base is not None and Path(base).resolve() == there:
        raise ValueError(f"{target} is the base model's own folder: choose an empty folder")
