"""What follows from a report's rows. Page, Markdown, card and terminal put it into words; none of them looks again."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..results.schema import AFTER, BEFORE, Attack, Report, Row


@dataclass(frozen=True)
class Recognition:
    """Mean recognition of several rows, and the one that lost most.

    Attributes:
        before: Mean over the rows.
        after: Mean over the rows.
        rows: How many.
        worst: The row with the largest loss; None where none lost any.
    """

    before: float
    after: float
    rows: int
    worst: Row | None


def recognition(rows: Sequence[Row]) -> Recognition | None:
    """Of the rows that a classifier knows; None if it knows none."""
    known = [row for row in rows if row.recognised is not None]
    if not known:
        return None

    def loss(row: Row) -> float:
        assert row.recognised is not None
        return row.recognised.before.share - row.recognised.after.share

    means = [sum(row.recognised[time].share for row in known if row.recognised) / len(known)
             for time in (BEFORE, AFTER)]  # fmt: skip
    worst = max(known, key=loss)
    return Recognition(means[0], means[1], len(known), worst if loss(worst) > 0 else None)


@dataclass(frozen=True)
class Changes:
    """Mean change of several rows' images, as a share of the distance between two seeds, and the row changed most."""

    mean: float
    rows: int
    worst: Row


def changes(rows: Sequence[Row]) -> Changes | None:
    """Of the rows that have one; None if none has."""
    known = [row for row in rows if row.change.relative is not None]
    if not known:
        return None
    relative = [row.change.relative or 0.0 for row in known]
    return Changes(sum(relative) / len(known), len(known), known[relative.index(max(relative))])


def strongest_attack(report: Report) -> list[Attack]:
    """The attack that brings the concept back most often, on each model that it was tried on; empty without any."""
    tried = [attack for attack in report.robustness if attack.recognised is not None]
    erased = [attack for attack in tried if attack.model == "erased"]
    if not erased:
        return []
    strongest = max(erased, key=lambda attack: attack.recognised.share if attack.recognised else 0.0)
    return [attack for attack in tried if attack.attack == strongest.attack]


def black_images(report: Report) -> tuple[int, int] | None:
    """Images that are black all over, before and after; None where there are none."""
    black = report.black_images
    return (black.before, black.after) if black and (black.before or black.after) else None
