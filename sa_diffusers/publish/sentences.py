"""The card's sentences: what a report's figures depend on, what still comes through, what else changed."""

from collections.abc import Iterable
from typing import Any

from ..hub import shown_name
from ..markup import markdown_code, markdown_text
from ..report.conclusions import changes, recognition, strongest_attack
from ..report.document import Table
from ..report.tables import attack_matrix, counted, quality_table, row_tables, score_kinds, totals
from ..results.figures import percent, sampling_text, significant
from ..results.schema import ErasedPair, Report
from ..results.verdict import LEAST_KNOWN

_md = markdown_text


def quoted(value: Any) -> str:
    """A name in quotation marks, as Markdown."""
    return f'"{_md(value)}"'


def _percent(share: float) -> str:
    return f"{percent(share)} %"


def setting_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f'"{item}"' for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def surrogate_name(pair: ErasedPair) -> str:
    """What stands in the concept's place, in words."""
    name = pair.surrogate or "not recorded"
    return "uniform noise" if pair.kind == "noise" else shown_name(name) if pair.kind == "images" else name


def tables(report: Report) -> list[Table]:
    """Totals, rows (the concepts' first), quality, attacks."""
    rows = sorted(report.rows, key=lambda row: row.role != "concept")
    found: list[Any] = [*totals(report)]
    if rows:
        # A detector's labels are in the totals; beside them they would be dozens of lines.
        found += row_tables(rows, score_kinds(rows, counted(report)), "", role=True)
    return [block for block in (*found, *quality_table(report), *attack_matrix(report)) if isinstance(block, Table)]


def remembered(report: Report) -> str:
    """What became of all rows but the concepts', on average; empty if no classifier knows any."""
    if report.remembered is None:
        return ""
    old, new = report.remembered.before, report.remembered.after
    text = (
        f"All rows but the concept's: recognised {_percent(old.recognised)} before, {_percent(new.recognised)} after."
    )
    if old.frechet_distance is not None and new.frechet_distance is not None:
        text += (
            f" Fréchet distance to real images in the classifier's features: {old.frechet_distance:.2f} before, "
            f"{new.frechet_distance:.2f} after ({new.images} images each)."
        )
    return text


def conditions(report: Report) -> str:
    """What the figures depend on."""
    told = []
    if report.rows:
        told.append(f"The same seeds before and after. Sampled with {_md(sampling_text(report.sampling))}.")
    if report.classifier:
        told.append(
            f"Recognised: the share of images that the classifier {markdown_code(shown_name(report.classifier.name))} "
            f"gives the row's label, of {len(report.classifier.labels)}."
        )
    for evaluator in report.evaluators:
        facts = [f"{_md(key)} {_md(setting_text(value))}" for key, value in evaluator.others.items()
                 if value not in (None, [], "") and not isinstance(value, dict)
                 and not (isinstance(value, list) and len(value) > 12)]  # fmt: skip
        detail = f" ({'; '.join(facts)})" if facts else ""
        told.append(f"Scored by {markdown_code(shown_name(evaluator.name))}{detail}.")
    if any(row.recognised for row in report.rows):
        told.append("Brackets: 95 % Wilson interval, in per cent.")
    if any(row.change.relative is not None for row in report.rows):
        told.append("Change: distance in pixels between before and after at the same seed; 100 % is that of two seeds.")
    return " ".join(told)


def leaks(report: Report) -> Iterable[str]:
    """What still comes through, in sentences."""
    for row in report.of_role("concept"):
        name = quoted(row.name)
        if row.recognised:
            before, after = row.recognised
            if before.share < LEAST_KNOWN:
                line = (
                    f"{name}: recognised in {_percent(after.share)} of {row.images} images, but before in no more than "
                    f"{_percent(before.share)}: what scores hardly knows it, and does not show whether it is gone."
                )
            elif after.share == 0:
                line = (
                    f"{name}: recognised in none of {row.images} images (before: {_percent(before.share)}). The true "
                    f"share may still be up to {_percent(after.interval[1])} (95 % interval)."
                )
            else:
                line = (
                    f"{name} still leaks: recognised in {_percent(after.share)} of {row.images} images (before: "
                    f"{_percent(before.share)})."
                )
            if row.as_surrogate:
                line += f" {_percent(row.as_surrogate.after.share)} are taken for the surrogate."
            yield line
        elif row.scores and not report.totals:
            figures = ", ".join(
                f"{_md(column)} {significant(times.before.mean)} before, {significant(times.after.mean)} after"
                for column, times in row.scores.items()
            )
            yield f"{name}: {figures}."
        elif row.change.relative is not None and not row.scores:
            yield (
                f"{name}: no classifier or detector has looked at the images. They differ from the base model's by "
                f"{_percent(row.change.relative)} of the distance between two seeds, which does not show that the "
                "concept is gone."
            )
    strongest = strongest_attack(report)
    if strongest:
        shares = {attack.model: _percent(attack.recognised.share) for attack in strongest if attack.recognised}
        erased = shares.pop("erased")
        others = ", ".join(f"{share} on the {_md(model)} model" for model, share in shares.items())
        yield (
            f"Attempts to bring the concept back: the most successful one, {quoted(strongest[0].attack)}, shows it in "
            f"{erased} of its images" + (f" ({others})." if others else ".")
        )


def damage(report: Report) -> Iterable[str]:
    """What else changed, in sentences."""
    for role, subject in (("neighbour", "the concept's neighbours"), ("surrogate", "the surrogate"),
                          ("remembered", "what should be remembered")):  # fmt: skip
        rows = report.of_role(role)
        if found := recognition(rows):
            line = (f"Collateral damage to {subject}: recognition goes from {_percent(found.before)} to "
                    f"{_percent(found.after)}")  # fmt: skip
            line += f" on average over {found.rows} rows" if found.rows > 1 else ""
            if found.worst is None or found.worst.recognised is None:
                line += "; no row lost any"
            elif found.rows > 1:
                shares = [_percent(share.share) for share in found.worst.recognised]
                line += f", and falls most for {quoted(found.worst.name)}, from {shares[0]} to {shares[1]}"
            yield f"{line}."
        elif changed := changes(rows):
            yield (
                f"Collateral damage to {subject}: images change by {_percent(changed.mean)} of the distance between "
                f"two seeds on average over {changed.rows} rows, most for {quoted(changed.worst.name)} "
                f"({_percent(changed.worst.change.relative or 0)})."
            )
    black = report.black_images
    if black and black.after > black.before:
        yield f"{black.after} images came out black, {black.before} from the base model."
