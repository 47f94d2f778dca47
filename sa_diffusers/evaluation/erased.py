"""What an erased pipeline's folder or repository says of its erasure."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ..configuration import CONFIG_NAME, ENDING_NAME, REPORT_NAME
from ..families.adapters import find_adapter, rank_of
from ..families.names import TRAINED_NAME
from ..files import read_json
from ..hub import HUB_TIMEOUT_SECONDS, sorted_reports
from ..results import Report
from ..results.schema import FUSED, Ending


def erasure_settings(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """The settings of the erasure, with the precision that its own report was made in.

    Args:
        name_or_path: Folder or Hub name of the erased pipeline.
        revision: Of the pipeline on the Hub.

    Returns:
        Empty if nothing is on record.

    Raises:
        ValueError: A file is not valid JSON, or holds something else than named values.
    """
    settings, found = (_recorded(name_or_path, name, revision) for name in (CONFIG_NAME, REPORT_NAME))
    settings.pop("sa_diffusers_version", None)
    # The settings may leave it to the machine that erased.
    precision = Report.from_dict(found, str(Path(name_or_path) / REPORT_NAME)).mixed_precision
    if precision:
        settings["mixed_precision"] = precision
    return settings


def recorded_ending(name_or_path: str, revision: str | None = None) -> Ending | None:
    """How the training of an erased pipeline ended, if it measured itself, and if the weights are those that it left.

    Args:
        name_or_path: Folder or Hub name of the erased pipeline.
        revision: Of the pipeline on the Hub.

    Raises:
        ValueError: The file that says so is not what a run writes.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and folder / REPORT_NAME in sorted_reports(folder)[1]:
        return None
    values = _recorded(name_or_path, ENDING_NAME, revision)
    return Report.from_dict({"ending": values}, str(Path(name_or_path) / ENDING_NAME)).ending


def fused_on_record(name_or_path: str, settings: Mapping[str, Any]) -> str | None:
    """The adapters that were in the base model's weights when it was erased from, in words; None where nothing says so.

    Args:
        name_or_path: Folder or Hub name of the erased pipeline.
        settings: Of its erasure.
    """
    report = Report.from_dict(_recorded(name_or_path, REPORT_NAME, None), str(Path(name_or_path) / REPORT_NAME))
    return report.handed_in.get(FUSED) or ("by fuse_adapters" if settings.get("fuse_adapters") else None)


def distilled_on_record(name_or_path: str, revision: str | None = None) -> str | None:
    """What it means that the base model of an erased pipeline is distilled to few steps, as its own report says it.

    Args:
        name_or_path: Folder or Hub name of the erased pipeline.
        revision: Of the pipeline on the Hub.
    """
    found = _recorded(name_or_path, REPORT_NAME, revision)
    return Report.from_dict(found, str(Path(name_or_path) / REPORT_NAME)).distilled


def warn_of_another_base(base: str, base_module: str, erased: str, revision: str | None = None) -> None:
    """Warn where an erased pipeline was made from other weights than those that it is compared with.

    Args:
        base: What it is compared with.
        base_module: Digest of that one's denoiser.
        erased: Folder or Hub name of the erased pipeline.
        revision: Of the erased pipeline on the Hub.
    """
    if is_of_other_weights(base_module, erased, revision):
        warnings.warn(
            f"{erased} was made from other weights than those of {base} (by their digests): what differs between the "
            "two is not the work of its erasure alone",
            stacklevel=2,
        )


def is_of_other_weights(base_module: str, erased: str, revision: str | None = None) -> bool:
    """Whether an erased pipeline says that it was made from another denoiser; see `warn_of_another_base`."""
    recorded = Report.from_dict(_recorded(erased, REPORT_NAME, revision), str(Path(erased) / REPORT_NAME)).base_module
    return recorded is not None and recorded != base_module


def saved_alone(name_or_path: str, revision: str | None = None) -> list[str]:
    """The parts that an erased pipeline's folder or repository holds where it holds what was trained alone; else none.

    Args:
        name_or_path: Folder or Hub name of the erased pipeline.
        revision: Of the pipeline on the Hub.
    """
    return list(_recorded(name_or_path, TRAINED_NAME, revision).get("components") or [])


def adapter_on_record(name_or_path: str, revision: str | None = None) -> str | None:
    """What kind of adapter an erased pipeline's folder or repository holds, in words; None where it holds none.

    Args:
        name_or_path: Folder or Hub name of the erased pipeline.
        revision: Of the pipeline on the Hub.
    """
    file = find_adapter(name_or_path, revision)
    return file and f"LoRA, rank {rank_of(file)}"


def takes_classes(name_or_path: str, revision: str | None = None) -> bool | None:
    """Whether a saved pipeline is sampled under classes, by its index alone; None where that cannot be read."""
    if Path(name_or_path).is_file():
        # No checkpoint of classes is one file.
        return False
    try:
        index = _recorded(name_or_path, DiffusionPipeline.config_name, revision)
        index = index or _recorded(name_or_path, TRAINED_NAME, revision).get("pipeline")
    except (ValueError, OSError):
        # Loading says what is wrong with it.
        return None
    return "id2label" in index if index else None


def _recorded(name_or_path: str, name: str, revision: str | None) -> dict[str, Any]:
    path = Path(name_or_path) / name
    if not Path(name_or_path).exists():
        with contextlib.suppress(HfHubHTTPError, OSError, ValueError):
            path = Path(hf_hub_download(name_or_path, name, revision=revision, etag_timeout=HUB_TIMEOUT_SECONDS))
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no `name: value`: give the folder of an erased pipeline as it was written")
    return values
