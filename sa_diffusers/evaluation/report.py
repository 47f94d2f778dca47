"""The old place of `sa_diffusers.report` and `sa_diffusers.results.figures`; it goes with the next version."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import report as _report
from ..results.figures import decimal, percent, significant, spread_text
from ..results.schema import Report

__all__ = ["decimal", "percent", "significant", "spread_text", "write_report"]
warnings.warn("sa_diffusers.evaluation.report is sa_diffusers.report", DeprecationWarning, stacklevel=2)


def write_report(report: dict[str, Any], grid: Sequence, folder: str | Path, beside: str | Path | None = None) -> None:
    """As `sa_diffusers.report.write_report`, of what `report.json` holds."""
    _report.write_report(Report.from_dict(report), grid, folder, beside)
