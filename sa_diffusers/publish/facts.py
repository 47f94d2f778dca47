"""What the folder of an erased pipeline says of itself."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..configuration import (
    CONFIG_NAME,
    ENDING_NAME,
    FISHER_CONFIG_NAME,
    GRID_NAME,
    HISTORY_NAME,
    MERGED_NAME,
    REPORT_NAME,
)
from ..families.adapters import ADAPTER_FILE, header_list, read_header
from ..families.base import Family
from ..families.registry import family_of
from ..families.trained import read_trained
from ..files import Recorded, read_json
from ..hub import shown_name, sorted_reports
from ..results.schema import FUSED, Ending, ErasedPair, Report, Row, Verdict
from ..results.verdict import decide

INDEX_NAME = "model_index.json"


@dataclass
class Facts:
    """Everything but the pipeline's index may be empty.

    Attributes:
        name: What the pipeline is loaded by.
        index: Of the pipeline; where the folder holds what was trained alone, of the whole.
        trained: What the folder says of what was trained alone; None where it holds the whole pipeline.
        settings: Of the erasure.
        reports: Title -> report; the erasure's own has no title.
        history: Logged losses.
        fisher: What the Fisher information was computed from.
        has_grid: Whether there is a picture of before and after.
        ending: How the training ended, if it measured itself.
        adapter: Header of the adapter's file, where the folder holds one in place of a pipeline.
        merged: The adapter that was fused into the pipeline's weights, by its folder or its name on the Hub.
    """

    name: str
    index: Recorded
    trained: Recorded | None = None
    settings: Recorded = field(default_factory=Recorded)
    reports: dict[str, Report] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    fisher: Recorded = field(default_factory=Recorded)
    has_grid: bool = False
    ending: Ending | None = None
    adapter: dict[str, str] | None = None
    merged: str | None = None

    @property
    def report(self) -> Report:
        """The erasure's own report, which may be empty."""
        return self.reports[""] if "" in self.reports else Report()

    @property
    def base(self) -> str | None:
        recorded = self.settings["pretrained_model_name_or_path"] or self.report.base_model
        return recorded or (self.adapter or {}).get("base_model")

    @property
    def base_is_on_hub(self) -> bool:
        """A report knows whether it was a folder."""
        if not self.base or shown_name(self.base) != self.base or self.report.base_is_folder:
            return False
        return re.fullmatch(r"[\w.-]+/[\w.-]+", self.base, re.ASCII) is not None

    @property
    def fused(self) -> str | None:
        """The adapters that were fused into the base model before it was trained, in words; None where there were
        none, as far as it is known."""
        told = ", ".join(header_list(self.adapter or {}, "fused_adapters")) or self.report.handed_in.get(FUSED)
        return told or ("which ones, this folder does not say" if self.settings["fuse_adapters"] else None)

    @property
    def pipeline_class(self) -> str:
        name = self.index["_class_name"] or "DiffusionPipeline"
        return name[-1] if isinstance(name, list) else name

    @property
    def family(self) -> type[Family] | None:
        """None for a family of somebody's own that is not registered here."""
        return family_of(self.pipeline_class)

    @property
    def brings_code(self) -> bool:
        return isinstance(self.index["_class_name"], list)

    @property
    def takes_text(self) -> bool:
        # Only models of texts take adapters.
        return self.adapter is not None or "tokenizer" in self.index

    @property
    def pipeline_tag(self) -> str:
        # The Hub knows no task for models of classes.
        return "text-to-image" if self.takes_text else "unconditional-image-generation"

    @property
    def pairs(self) -> list[ErasedPair]:
        """What was erased into what, as a report or else the settings say."""
        for report in self.reports.values():
            if report.pairs:
                return report.pairs
        concepts, surrogates = (self.settings[name] or [] for name in ("concept", "surrogate"))
        surrogates = surrogates * len(concepts) if len(surrogates) == 1 else surrogates
        surrogates = [*surrogates, *[""] * len(concepts)]
        return [ErasedPair(*both) for both in zip(concepts, surrogates, strict=False)]

    @property
    def concepts(self) -> list[str]:
        return [pair.concept for pair in self.pairs]

    @property
    def verdicts(self) -> list[Verdict]:
        """Of each report that has rows of a concept."""
        return [report.verdict or decide(report) for report in self.reports.values() if report.of_role("concept")]

    @property
    def rows(self) -> list[Row]:
        return [row for report in self.reports.values() for row in report.rows]


def read_facts(folder: Path, name: str | None = None) -> Facts:
    """Read model_index.json, trained_components.json or an adapter's header, selective_amnesia.json, report.json,
    evaluation*/**/report.json of this pipeline, training_history.json, training_ending.json, fisher_config.json,
    merged_adapter.json.

    Args:
        folder: An erased pipeline.
        name: What it is loaded by. Default: the folder's name.

    Raises:
        ValueError: The folder holds no pipeline, or one of these files is not what a run writes.
    """
    trained, adapter = read_trained(folder, {}), None
    if trained is None and not (folder / INDEX_NAME).is_file():
        if not (folder / ADAPTER_FILE).is_file():
            raise ValueError(f"{folder} holds no pipeline (no {INDEX_NAME}): give the folder of an erased one")
        adapter = read_header(folder / ADAPTER_FILE)

    def read(file: str, empty: Any) -> Any:
        value = read_json(folder / file) if (folder / file).is_file() else empty
        if not isinstance(value, type(empty)):
            raise ValueError(f"{folder / file} holds other values than a run writes: restore it or remove it")
        return value

    reports: dict[str, Report] = {}
    current, stale = sorted_reports(folder)
    # How a training ended says nothing of weights that it did not leave.
    has_other_weights = folder / REPORT_NAME in stale
    ending = {} if has_other_weights else read(ENDING_NAME, {})
    for path in current:
        report = Report.load(path)
        title = "" if path.parent == folder else report.protocol or path.parent.name
        reports[title if title not in reports else str(path.parent.relative_to(folder))] = report
    index = read(INDEX_NAME, {}) if trained is None else trained["pipeline"]
    if adapter is not None:
        index = {"_class_name": adapter.get("pipeline_class")}
    return Facts(
        name=name or folder.resolve().name,
        index=Recorded(index),
        trained=trained,
        settings=Recorded(read(CONFIG_NAME, {})),
        reports=reports,
        history=read(HISTORY_NAME, []),
        fisher=Recorded(read(FISHER_CONFIG_NAME, {})),
        has_grid=(folder / GRID_NAME).is_file() and not has_other_weights,
        ending=Report.from_dict({"ending": ending}, str(folder / ENDING_NAME)).ending,
        adapter=adapter,
        merged=Recorded(read(MERGED_NAME, {}))["adapter"],
    )
