"""Histograms and curves as SVG that sits inside a page.

Drawn here and not by a plotting library, whose SVG has its colours and its lettering fixed inside: these take both from
the style sheet of the page around them, and so follow its light and dark theme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np

from ..markup import visible

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 20, 12, 40
MOST_BINS = 20
_TICKS = 4
_TICKS_ACROSS = 6


@dataclass(frozen=True)
class Histogram:
    """Counts of two sets of values over the same bins.

    Attributes:
        edges: One more than there are bins, rising.
        before: Values of the first set in each bin.
        after: Values of the second set in each bin.
    """

    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


def histogram(before: Sequence[float], after: Sequence[float]) -> Histogram:
    """Count two sets of values over bins that both share: one for each whole number, or at most 20 with round edges.

    Raises:
        ValueError: There is no value at all.
    """
    values = np.asarray([*before, *after], dtype=float)
    if not len(values):
        raise ValueError("a histogram of no values: give at least one")
    low, high = values.min(), values.max()
    if (values == np.round(values)).all() and high - low < MOST_BINS:
        edges = np.arange(low - 0.5, high + 1)
    else:
        edges = np.asarray(_ticks(low, high, MOST_BINS - 1))
    counts = (tuple(int(count) for count in np.histogram(part, edges)[0]) for part in (before, after))
    return Histogram(tuple(float(edge) for edge in edges), *counts)


def histogram_svg(counted: Histogram, description: str, label: str) -> str:
    """Both sets over one another.

    Args:
        counted: What to draw.
        description: What a reader hears who does not see it.
        label: Of the horizontal axis.
    """
    edges = counted.edges
    canvas = _Canvas((edges[0], edges[-1]), (0, max(*counted.before, *counted.after, 1)), whole_upwards=True)
    canvas.axes(label, "images")
    for name, counts in (("before", counted.before), ("after", counted.after)):
        points = [(edges[0], 0.0)]
        for index, count in enumerate(counts):
            points += [(edges[index], count), (edges[index + 1], count)]
        canvas.line([*points, (edges[-1], 0.0)], f"area {name}", closed=True)
    return canvas.text(description)


def curve_svg(points: Sequence[tuple[float, float]], description: str, label: str) -> str:
    """One curve; its vertical axis starts at zero unless a value is below.

    Args:
        points: Horizontal and vertical position, rising along the first, at least one, all finite.
        description: What a reader hears who does not see it.
        label: Of the vertical axis.
    """
    across, values = zip(*points, strict=True)
    canvas = _Canvas((min(0, *across), max(across)), (min(0, *values), max(values)), whole_across=True)
    canvas.axes("step", label)
    canvas.line(points, "curve")
    for point in points if len(points) <= 60 else ():
        canvas.dot(point)
    return canvas.text(description)


class _Canvas:
    """A plot area with its scales; either may be marked at whole numbers only."""

    def __init__(
        self,
        across: tuple[float, float],
        upwards: tuple[float, float],
        whole_across: bool = False,
        whole_upwards: bool = False,
    ) -> None:
        self.whole_across = whole_across
        self.across = across if across[1] > across[0] else (across[0], across[0] + 1)
        self.ticks = _ticks(*upwards, _TICKS, whole_upwards)
        self.upwards = (self.ticks[0], self.ticks[-1])
        self.root = ElementTree.Element(
            "svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "class": "chart"}
        )  # fmt: skip

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        share = [(value - low) / (high - low) for value, (low, high) in
                 zip(point, (self.across, self.upwards), strict=True)]  # fmt: skip
        return _LEFT + share[0] * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - share[1] * (HEIGHT - _TOP - _BOTTOM)

    def axes(self, horizontal: str, vertical: str) -> None:
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        for value in self.ticks:
            _, y = self.place((self.across[0], value))
            self._add("line", {"x1": _LEFT, "x2": right, "y1": y, "y2": y, "class": "rule"})
            self._write(_LEFT - 6, y + 4, tick_text(value), "end")
        for value in _ticks(*self.across, _TICKS_ACROSS, self.whole_across):
            if not self.across[0] <= value <= self.across[1]:
                continue
            x, _ = self.place((value, self.upwards[0]))
            self._add("line", {"x1": x, "x2": x, "y1": bottom, "y2": bottom + 4, "class": "axis"})
            self._write(x, bottom + 17, tick_text(value), "middle")
        self._add("line", {"x1": _LEFT, "x2": right, "y1": bottom, "y2": bottom, "class": "axis"})
        self._write((_LEFT + right) / 2, HEIGHT - 6, horizontal, "middle")
        middle = (_TOP + bottom) / 2
        text = self._write(12, middle, vertical, "middle")
        text.set("transform", f"rotate(-90 12 {_number(middle)})")

    def line(self, points: Sequence[tuple[float, float]], kind: str, closed: bool = False) -> None:
        placed = " ".join(",".join(_number(value) for value in self.place(point)) for point in points)
        self._add("polygon" if closed else "polyline", {"points": placed, "class": kind})

    def dot(self, point: tuple[float, float]) -> None:
        x, y = self.place(point)
        self._add("circle", {"cx": x, "cy": y, "r": 2.5, "class": "dot"})

    def text(self, description: str) -> str:
        self.root.set("aria-label", visible(description))
        return ElementTree.tostring(self.root, encoding="unicode")

    def _add(self, tag: str, attributes: dict[str, float | str]) -> ElementTree.Element:
        written = {name: value if isinstance(value, str) else _number(value) for name, value in attributes.items()}
        return ElementTree.SubElement(self.root, tag, written)

    def _write(self, x: float, y: float, text: str, anchor: str) -> ElementTree.Element:
        element = self._add("text", {"x": x, "y": y, "text-anchor": anchor})
        element.text = visible(text)
        return element


def _ticks(low: float, high: float, parts: int, whole: bool = False) -> list[float]:
    """Round figures, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`.

    Args:
        low: What is to be reached at the lower end.
        high: What is to be reached at the upper end.
        parts: Steps that reach from one to the other, at most; rounding outwards may add one.
        whole: Whether a step is a whole number.
    """
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / parts))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * parts >= span * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def tick_text(value: float) -> str:
    """At most four significant digits."""
    return f"{value + 0.0:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.4g}"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
