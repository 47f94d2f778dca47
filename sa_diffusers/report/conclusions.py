"""What follows from a report's rows. Page, Markdown, card and terminal put it into words; none of them looks again."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..results.schema import AFTER, BEFORE, ROLES, Attack, Report, Row, Verdict
from ..results.verdict import FORGOTTEN, MOST_LEFT, NOT_FORGOTTEN, NOT_MEASURABLE, PARTLY, evidence


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


_MEANING = {
    FORGOTTEN: f"the 95 % interval of how often it is still recognised ends at {100 * MOST_LEFT:.0f} % or below",
    PARTLY: "it is recognised less often than before (the 95 % intervals are apart), and too often for forgotten",
    NOT_FORGOTTEN: "the 95 % intervals of before and after overlap: what it lost may be chance",
    NOT_MEASURABLE: "these images can show neither that it is gone nor that it is there",
}
_DAMAGED = 12


def role_rank(row: Row | None) -> int:
    """Where a row stands among others: the concepts' first, and last what has no role."""
    return ROLES.index(row.role) if row is not None and row.role in ROLES else len(ROLES)


def verdict_notes(verdict: Verdict) -> list[str]:
    """What a verdict means, and what its one line has no room for: each of several concepts, all that is damaged."""
    notes = []
    if verdict.outcome in _MEANING:
        notes.append(f"“{verdict.outcome.capitalize()}” of a concept means: {_MEANING[verdict.outcome]}.")
    if len(verdict.concepts) > 1:
        notes += [f"{each.outcome.capitalize()}: {each.because}." for each in verdict.concepts]
    if damaged := verdict.damaged:
        more = f" and {len(damaged) - _DAMAGED} more" if len(damaged) > _DAMAGED else ""
        names = ", ".join(f"“{name}”" for name in damaged[:_DAMAGED])
        notes.append(f"Damaged, of {len(verdict.kept)} that should have stayed: {names}{more}.")
    return notes


def not_measured(report: Report) -> list[str]:
    """What a reader may look for and this report has no figures of."""
    missing = []
    concepts = report.of_role("concept")
    if concepts and not any(evidence(row) or row.scores for row in concepts) and not report.totals:
        missing.append("whether anything still takes the images for the concept (no classifier or detector knows it)")
    if not report.robustness:
        missing.append("attempts to bring the concept back")
    if concepts and len(concepts) == len(report.rows):
        missing.append("anything but the concept")
    elif concepts and not report.of_role("neighbour"):
        missing.append("neighbours of the concept")
    return missing


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
