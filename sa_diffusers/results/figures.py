"""Figures as text: the one place where a number of a report becomes what people read."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .schema import DECODER, Sampling, Share, Summary

MISSING = "–"
UNITS = {"share": "%", "count": "total (mean of an image)", "mean": "mean ± standard deviation"}
_LISTED = 12


def percent(share: float) -> str:
    """A share in per cent with one decimal; what is not all and not nothing is never shown as either."""
    share = round(share, 9)
    if 0 < share < 0.0005:
        return "<0.1"
    return ">99.9" if 0.9995 <= share < 1 else f"{100 * share:.1f}"


def share_text(share: Share | None) -> str:
    """A share and its interval in per cent."""
    if share is None:
        return MISSING
    low, high = share.interval
    return f"{percent(share.share)} [{percent(low)}, {percent(high)}]"


def percent_text(figures: str) -> str:
    """Figures in per cent, for the middle of a sentence: the sign stands after the first."""
    first, *rest = figures.split(" ", 1)
    return " ".join([f"{first} %", *rest])


def decimal(value: float | None) -> str:
    """Three decimals; what is positive is never shown as zero."""
    if value is None:
        return MISSING
    return "<0.001" if 0 < value < 0.0005 else f"{round(value, 3) + 0.0:.3f}"


def significant(value: float | None) -> str:
    """Whole numbers in full, others to three significant digits."""
    if value is None:
        return MISSING
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def spread_text(mean: float, deviation: float | None) -> str:
    """A mean and its standard deviation, both to the second digit of the deviation."""
    if not deviation:
        return significant(mean) + ("" if deviation is None else " ± 0")
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:,.{decimals}f} ± {deviation:,.{decimals}f}"


def score_text(scores: Summary | None, kind: str, images: int) -> str:
    """The figures of one column, as its kind asks for; how many images have one, where not all have."""
    if scores is None:
        return MISSING
    if not scores.count and scores.mean is None:
        return f"none of {images}"
    missing = f" (n = {scores.count})" if scores.count != images else ""
    if kind == "share":
        return share_text(scores.as_share()) + missing
    if kind == "count":
        return f"{significant(scores.sum)} ({significant(scores.mean)}){missing}"
    return (MISSING if scores.mean is None else spread_text(scores.mean, scores.std)) + missing


def plain(value: Any) -> str:
    """Any value of a report in words."""
    if value is None or value in ([], (), {}):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Share):
        return percent_text(share_text(value))
    if isinstance(value, Summary):
        return score_text(value, "mean", value.count)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({spec.name: getattr(value, spec.name) for spec in dataclasses.fields(value)})
    if isinstance(value, dict):
        return "; ".join(f"{name}: {plain(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(part) for part in value)
    return str(value)


def listed(values: Sequence[str], place: str, most: int = _LISTED) -> str:
    """Values in a row, the first of many, and where the rest is."""
    more = len(values) - most
    text = "; ".join(values[:most])
    return text if more <= 0 else f"{text}; and {more:,} more, in {place}"


def seeds_text(runs: Sequence[Sequence[int]], place: str) -> str:
    """Runs of seeds, each with its first and last."""
    return listed([str(first) if first == last else f"{first} to {last}" for first, last in runs], place)


def sampling_text(sampling: Sampling) -> str:
    """Sampler, steps and guidance, which a model that decodes in one pass has none of."""
    if sampling.sampler == DECODER:
        return "one pass of the decoder"
    return f"{sampling.sampler}, {sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}"
