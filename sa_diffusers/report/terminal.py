"""A report as text for a terminal."""

import textwrap
from collections.abc import Sequence

from ..markup import visible
from ..results.figures import MISSING, percent, sampling_text
from ..results.schema import TIMES, Attack, CelebrityTotal, FaceFigures, NudityTotal, Report, Row, Share

# A plain terminal is so wide; of a table's names at least so much is kept on one line.
_WIDTH, _NAME = 80, 16
_SEEN = {"samples": "the surrogate's own samples", "mean": "their mean image"}


def format_report(report: Report) -> str:
    """All of a report that has figures: rows, scores, totals, quality, attacks."""
    parts = [format_totals(report.totals)] if report.totals else [format_table(report), format_scores(report)]
    parts += [format_quality(report), format_robustness(report.robustness)]
    return "\n\n".join(part for part in parts if part)


def concept_first(rows: Sequence[Row]) -> list[Row]:
    """The concepts' rows before all others, else in their order."""
    return sorted(rows, key=lambda row: row.role != "concept")


def format_table(report: Report) -> str:
    """A report's rows as aligned text."""
    rows = concept_first(report.rows)
    scored = any(row.recognised for row in rows)
    if scored:
        lines = [["prompted with", "recognised before", "recognised after", "change"]]
    else:
        lines = [["prompted with", "role", "images", "change", "black before/after"]]
    for row in rows:
        relative = row.change.relative
        change = "-" if relative is None else f"{100 * relative:.0f} %"
        if scored:
            shares = [format_share(row.recognised and row.recognised[time]) for time in TIMES]
            lines.append([row.name, *shares, change])
        else:
            lines.append([row.name, row.role, str(row.images), change, f"{row.black.before}/{row.black.after}"])
    text = [*aligned(lines), "", *_certainties(rows, report), *_remembered(report)]
    if rows:
        text.append(
            f"{_counts(rows)}, the same seeds before and after; {sampling_text(report.sampling)}"
            + ("; brackets: 95 % interval" if scored else "")
        )
    text.append("change: distance between before and after at the same seed; 100 % is that of two different seeds")
    return "\n".join(text)


def _counts(rows: Sequence[Row]) -> str:
    own = [row.images for row in rows if row.role == "concept"]
    usual = max([row.images for row in rows if row.role != "concept"] or own)
    return f"{usual} images a row" + (f", {max(own)} of a concept" if own and max(own) != usual else "")


def _certainties(rows: Sequence[Row], report: Report) -> list[str]:
    told = []
    for row in rows:
        if row.role != "concept":
            continue
        if row.as_surrogate:
            taken = " ".join(format_share(row.as_surrogate.after).split())
            told.append(visible(f'"{row.name}": taken for the surrogate in {taken} of images after'))
        if row.probability is None or row.entropy is None:
            continue
        line = (f'"{row.name}": probability {row.probability.before:.3f} before, {row.probability.after:.3f} after; '
                f"entropy {row.entropy.before:.2f} before, {row.entropy.after:.2f} after")  # fmt: skip
        for kind, seen in report.surrogate_samples.get(row.name, {}).items():
            line += f"; {_SEEN[kind]}: {seen.probability:.3f} and {seen.entropy:.2f}"
        told.append(visible(line))
    return told


def _remembered(report: Report) -> list[str]:
    remembered = report.remembered
    if remembered is None:
        return []
    old, new = remembered.before, remembered.after
    told = [f"All but the concept: recognised {100 * old.recognised:.1f} % before, {100 * new.recognised:.1f} % after"]
    if old.frechet_distance is not None and new.frechet_distance is not None:
        told.append(
            f"Fréchet distance to real images, in the classifier's features: {old.frechet_distance:.2f} before, "
            f"{new.frechet_distance:.2f} after ({new.images} images each)"
        )
    if values := remembered.against_base:
        told.append(
            f"Against the base model's own images, in the classifier's features: Fréchet distance "
            f"{values.frechet_distance:.2f}, precision {values.precision:.2f}, recall {values.recall:.2f}"
        )
    return told


def format_scores(report: Report) -> str:
    """The mean of each scored column, row by row, before and after. Empty where nothing was scored."""
    rows = [row for row in concept_first(report.rows) if row.scores]
    if not rows:
        return ""
    columns = list(rows[0].scores)
    lines = [["prompted with", *columns]]
    for row in rows:
        means = [[summary.mean for summary in row.scores[column]] for column in columns]
        lines.append([row.name, *(" -> ".join("none" if value is None else f"{value:.3g}" for value in pair)
                                  for pair in means)])  # fmt: skip
    return "\n".join(aligned(lines))


def format_quality(report: Report) -> str:
    """The measured qualities as lines of text."""
    lines = []
    for entry in report.quality:
        lines.append(f"Remembered, {entry.images} images against {entry.reference_images} ({entry.reference}), "
                     f"features of {entry.features}:")  # fmt: skip
        for time in TIMES:
            if values := getattr(entry, time):
                lines.append(f"  {time:6}  Fréchet distance {values.frechet_distance:.3f}, precision "
                             f"{values.precision:.3f}, recall {values.recall:.3f}")  # fmt: skip
    return "\n".join(lines)


def format_robustness(attacks: Sequence[Attack]) -> str:
    """Attacks in rows, models in columns. Empty without any."""
    if not attacks:
        return ""
    models = list(dict.fromkeys(attack.model for attack in attacks))
    by_key = {(attack.attack, attack.model): attack for attack in attacks}
    lines = [["sampled as the concept", *models]]
    for name in dict.fromkeys(attack.attack for attack in attacks):
        lines.append([name, *(_attack(by_key.get((name, model))) for model in models)])
    return "\n".join(aligned(lines))


def _attack(attack: Attack | None) -> str:
    if attack is None:
        return ""
    if attack.recognised is not None:
        return format_share(attack.recognised)
    return ", ".join(f"{name} {value.mean:.2f}" for name, value in attack.scores.items() if value.mean is not None)


def format_totals(totals: Sequence[CelebrityTotal | NudityTotal]) -> str:
    """The detectors' totals, as the paper's Table 2 or its Tables 3 and 4."""
    lines = []
    for total in totals:
        if isinstance(total, NudityTotal):
            lines += _nudity(total)
            continue
        lines.append(f"{total.name}, {total.images} images, GIPHY celebrity detector for {total.celebrity}:")
        lines += [f"  {time:6}  {_faces(getattr(total, time))}" for time in TIMES]
        lines.append("probability (standard deviation) and top-1 accuracy are over the images with a face")
    return visible("\n".join(lines))


def _faces(values: FaceFigures) -> str:
    probability = values.probability
    text = f"without a face {values.without_face.share:.3f}"
    if probability.mean is None or values.top1 is None:
        return f"{text}, no face to recognise"
    spread = "" if probability.std is None else f" ({probability.std:.3g})"
    top = ", ".join(f"{picture.probability:.3g}" for picture in values.top5) or MISSING
    return (
        f"{text}, probability {probability.mean:.3g}{spread}, top-1 accuracy {values.top1.share:.3f}, highest "
        f"probabilities {top}"
    )


def _nudity(total: NudityTotal) -> list[str]:
    names = list(total.before)
    table = [["", *(name.replace("_", " ") for name in names)],
             *([time, *(str(getattr(total, time)[name]) for name in names)] for time in TIMES)]  # fmt: skip
    widths = [max(len(line[number]) for line in table) for number in range(len(table[0]))]
    head = f"{total.name}, {total.images} images, detections with a score of {total.threshold:g} or more:"
    return [head, *("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
                    for line in table)]  # fmt: skip


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells, the header first, as lines of text with a rule under the header.

    Long names in the first column are broken over lines where the table would be wider than 80 columns.
    """
    lines = [[visible(cell) for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    name = max(_NAME, _WIDTH - sum(widths[1:]) - 3 * (len(widths) - 1))
    if widths[0] > name:
        lines = [part for line in lines for part in _broken(line, name)]
        widths[0] = max(len(line[0]) for line in lines)
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in ruled]


def _broken(line: Sequence[str], width: int) -> list[list[str]]:
    first, *rest = textwrap.wrap(line[0], width, subsequent_indent="  ") or [""]
    return [[first, *line[1:]], *([part, *[""] * (len(line) - 1)] for part in rest)]


def format_share(share: Share | None) -> str:
    """A share and its interval in per cent, to stand under others; empty without one."""
    if share is None:
        return ""
    low, high = share.interval
    return f"{100 * share.share:5.1f} % [{percent(low)}, {percent(high)}]"
