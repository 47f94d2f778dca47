"""The figures of a card that the Hub reads."""

import math
from collections.abc import Iterable
from typing import Any

from huggingface_hub import EvalResult

from ..hub import shown_name
from ..results.schema import Quality, Row, Share
from ..results.verdict import LEAST_KNOWN, NOT_MEASURABLE, decide
from .facts import Facts

_METRIC_NAMES = {
    "probability": "mean probability of the label asked for",
    "entropy": "mean entropy in nats",
    "recognised": "share recognised as what was asked for",
    "as_surrogate": "share taken for the surrogate",
    "change": "distance from the base model's images, 1 is that of two seeds",
}


def eval_results(facts: Facts) -> Iterable[EvalResult]:
    """The erased model's own figures, one result for each finite number. Those of the base stay in the tables, and what
    was hardly recognised of it too: alone, a share of 0 would read as if it were gone."""
    for title, report in facts.reports.items():
        place = title or "training"
        verdict = report.verdict or decide(report)
        untold = [each.concept for each in verdict.concepts if each.outcome == NOT_MEASURABLE]
        for row in report.rows:
            subject = f"{row.images} generated images, {row.role}: {row.name}"
            if row.role == "concept" and (row.concept or row.name) in untold:
                # No card beside the figure says so where the Hub shows it.
                subject += ", which is not measurable"
            yield from _results(facts, f"{place}/{row.name}", subject, _of_row(row))
        if report.remembered:
            after = report.remembered.after
            figures = {"recognised": after.recognised, "frechet_distance": after.frechet_distance}
            subject = f"{after.images} generated images, all but the concept"
            yield from _results(facts, f"{place}/remembered", subject, figures)
        for entry in report.quality:
            features = shown_name(entry.features)
            subject = f"{entry.images} generated images against {entry.reference}, features of {features}"
            key = f"{place}/{features} against {entry.reference}"
            yield from _results(facts, key, subject, vars(entry.after or Quality()))
        of_base = {attack.attack: attack.recognised for attack in report.robustness if attack.model == "base"}
        for attack in report.robustness:
            if attack.model == "erased":
                figures = {name: value for name, value in attack.others.items() if isinstance(value, float)}
                figures |= {name: summary.mean for name, summary in attack.scores.items()}
                if attack.recognised and _is_known(of_base.get(attack.attack)):
                    figures["recognised"] = attack.recognised.share
                subject = f"{attack.images or 0} generated images, attack: {attack.attack}"
                yield from _results(facts, f"{place}/attack {attack.attack}", subject, figures)


def _of_row(row: Row) -> dict[str, Any]:
    figures = {name: getattr(row, name).after if getattr(row, name) else None for name in ("probability", "entropy")}
    for name in ("recognised", "as_surrogate"):
        figures[name] = getattr(row, name).after.share if getattr(row, name) else None
    if not _is_known(row.recognised and row.recognised.before):
        figures["recognised"] = figures["probability"] = None
    return {**figures, "change": row.change.relative, **{name: times.after.mean for name, times in row.scores.items()}}


def _is_known(before: Share | None) -> bool:
    return before is None or before.share >= LEAST_KNOWN


def _results(facts: Facts, key: str, subject: str, figures: dict[str, Any]) -> Iterable[EvalResult]:
    for name, value in figures.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield EvalResult(
                task_type=facts.pipeline_tag,
                # The Hub keeps results apart by type and configuration.
                dataset_type="generated-images",
                dataset_name=subject,
                dataset_config=key,
                metric_type=name,
                metric_name=_METRIC_NAMES[name] if name in _METRIC_NAMES else name.replace("_", " "),
                metric_value=round(value, 6),
            )
