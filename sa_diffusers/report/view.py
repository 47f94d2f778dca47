"""One view of a report: its title, verdict, facts and sections, in which every figure is text already."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..configuration import CONFIG_NAME, GRID_NAME, HISTORY_NAME
from ..files import Recorded, read_json, write_text
from ..hub import shown_name
from ..results.figures import (
    MISSING,
    percent,
    percent_text,
    plain,
    sampling_text,
    score_text,
    share_text,
    significant,
)
from ..results.schema import TIMES, CelebrityTotal, NudityTotal, Report, Row, Share, Times, Verdict
from ..results.verdict import decide
from .charts import curve_svg, histogram, histogram_svg, tick_text
from .conclusions import (
    black_images,
    changes,
    not_measured,
    recognition,
    role_rank,
    strongest_attack,
    verdict_notes,
)
from .cost import cost_table
from .document import Block, Chart, Charts, Document, Items, Paragraph, Pictures, Section, Strip, Table
from .provenance import configuration_tables, reproduction
from .tables import (
    WIDEST,
    counted,
    quality_table,
    robustness_table,
    row_note,
    row_tables,
    score_kinds,
    surrogate_table,
    totals,
)

MARKDOWN_NAME = "report.md"
PAGE_NAME = "report.html"
Grid = Sequence[tuple[str, Sequence[Image.Image], Sequence[Image.Image]]]

_SUMMARISED = 8
_NAMED = 3
_CURVE_LINES = 20
_TITLES = {
    "surrogate_loss": "surrogate loss",
    "replay_loss": "replay loss",
    "ewc_penalty": "EWC penalty",
    "forgotten": "forgotten, of the concept's samples",
    "forgotten_root": "forgotten, of the concept's samples, as one minus the root",
    "forgotten_surrogate": "forgotten, of the surrogate's samples",
    "drift": "drift of remembered prompts, the mean",
    "drift_p90": "drift of remembered prompts, the 90th percentile",
    "drift_empty": "drift of the empty prompt",
    "drift_surrogate": "drift of the surrogate",
    "drift_neighbours": "drift of the neighbour that drifted farthest",
    "balance": "weight of what protects, by how much it was raised",
}
_NO_CURVES = frozenset({"step", "learning_rate", "forgotten_unguided", "drift_unguided"})


def write_report(report: Report, grid: Grid, folder: str | Path, beside: str | Path | None = None) -> None:
    """Write `report.md` and `report.html` into a folder that is there.

    The training curves come from the `training_history.json` beside the report or, where there is none, in the folder
    of the erased model; the settings from the report or, where it has none, from the erased model's folder.

    Args:
        report: The results.
        grid: For each row its name, pictures before, pictures after; they are shown as they are.
        folder: Where the files go.
        beside: The folder that they end up in, if it is another one.
    """
    folder = Path(folder)
    places = [Path(beside or folder), *([Path(report.erased_model)] if report.erased_model else [])]

    def first(name: str) -> Any:
        return next((read_json(place / name) for place in places if (place / name).is_file()), None)

    document = view(report, grid, first(HISTORY_NAME) or [], report.configuration or first(CONFIG_NAME) or {})
    write_text(folder / MARKDOWN_NAME, document.to_markdown())
    write_text(folder / PAGE_NAME, document.to_html())


def view(
    report: Report,
    grid: Grid = (),
    history: Sequence[dict[str, float]] = (),
    configuration: dict[str, Any] | None = None,
) -> Document:
    """Everything a report says, in order.

    Args:
        report: The results; only rows and sampling must be there.
        grid: For each row its name, pictures before, pictures after.
        history: Entries of the training history.
        configuration: The erasure's settings.
    """
    configuration = Recorded(configuration or {})
    kinds = score_kinds(report.rows, counted(report))
    verdict = report.verdict or decide(report)
    sections = [
        Section("Summary", "summary", [Items(_summary(report, verdict, kinds, configuration))]),
        Section("Before and after", "pictures", _pictures(report, grid)),
        Section("Detected, in all", "totals", totals(report)),
        Section("The erased concept", "concept", _concept(report, kinds)),
        Section("Collateral damage: neighbours of the concept", "neighbours", _neighbours(report, kinds)),
        Section("Remembered concepts", "remembered", _remembered(report, kinds)),
        Section("Score histograms", "histograms", _histograms(report, kinds)),
        Section("Image quality", "quality", quality_table(report)),
        Section("Robustness: does the concept come back?", "robustness", robustness_table(report)),
        Section("Training", "training", _training(history)),
        Section("What it cost", "cost", cost_table(report)),
        Section("Configuration", "configuration", configuration_tables(configuration)),
        Section("How to reproduce each figure", "reproduce", reproduction(report, bool(history))),
    ]
    erased = [concept for concept, _ in _pairs(report, configuration)]
    more = f"; and {len(erased) - _NAMED} more" if len(erased) > _NAMED else ""
    title = f"Erasure report: {'; '.join(erased[:_NAMED])}{more}"
    shown = [section for section in sections if section.blocks]
    return Document(title, verdict, _facts(report), shown, report.ending)


# What was erased


def _pairs(report: Report, configuration: Recorded) -> list[tuple[str, str]]:
    """What was erased into what, in short and in a sentence."""
    if not report.pairs:
        names = [row.name for row in report.of_role("concept")]
        return [(f"“{name}”", f"“{name}” was to be erased.") for name in names] or [("nothing", "Nothing was erased.")]
    told = []
    for pair in report.pairs:
        concept, surrogate = f"“{pair.concept}”", f"“{pair.surrogate}”"
        if configuration["naive"]:
            told.append((concept, f"{concept} was to be erased by lowering the ELBO of its own samples (eq. 3)."))
            continue
        into = surrogate
        if pair.kind == "noise":
            into = "uniform noise"
        elif pair.kind == "images":
            into = f"the images in “{shown_name(pair.surrogate)}”"
        told.append((f"{concept} into {into}", f"{concept} was to be erased into {into}."))
    return told


def _facts(report: Report) -> list[tuple[str, str]]:
    images = sum(row.images for row in report.rows)
    alone = f", its {' and '.join(report.saved)} alone: the rest is the base model's" if report.saved else ""
    if report.adapter:
        alone = f", an adapter ({report.adapter}) on the base model, at full strength: it can be switched off"
    facts = [
        ("Base model", plain(report.base_model and shown_name(report.base_model))),
        ("Distilled", plain(report.distilled)),
        ("Erased model", plain(report.erased_model and shown_name(report.erased_model) + alone)),
        ("Protocol", plain(report.protocol)),
        ("Images", f"{images:,} before, as many after, the same seeds"),
        ("Sampled with", sampling_text(report.sampling)),
    ]
    return [(name, value) for name, value in facts if value != MISSING]


def _summary(report: Report, verdict: Verdict, kinds: dict[str, str], configuration: Recorded) -> list[str]:
    told = [sentence for _, sentence in _pairs(report, configuration)]
    told += verdict_notes(verdict)
    rows = report.of_role("concept")
    if report.totals:
        told += [_total(total) for total in report.totals]
    else:
        told += [_told(row, kinds) for row in rows[:_SUMMARISED]]
    if len(rows) > _SUMMARISED and not report.totals:
        told.append(f"{len(rows) - _SUMMARISED} further rows of erased concepts are in the table below.")
    near = recognition(report.of_role("neighbour"))
    if near:
        lost = "None is recognised less often than before."
        if near.worst and near.worst.recognised:
            lost = f"The largest loss is that of “{near.worst.name}”: {_from_to(near.worst.recognised)}."
        told.append(
            f"Neighbours of the concept ({near.rows}): recognised in {_per_cent(near.before)} before and "
            f"{_per_cent(near.after)} after, on average. {lost}"
        )
    if report.remembered:
        before, after = (_per_cent(getattr(report.remembered, time).recognised) for time in TIMES)
        told.append(
            f"Everything but the concept ({len(report.remembered.labels)}): recognised as what was asked for in "
            f"{before} of images before and {after} after, on average."
        )
    elif others := changes([row for row in report.rows if row.role != "concept"]):
        told.append(
            f"The images of the {others.rows} other rows changed by {_per_cent(others.mean)} of the distance between "
            "two seeds, on average."
        )
    strongest = strongest_attack(report)
    if strongest:
        figures = [f"{attack.model} {_together(attack.recognised)}" for attack in strongest]
        told.append(f"The strongest attack is “{strongest[0].attack}”: recognised in {', '.join(figures)} of images.")
    if black := black_images(report):
        told.append(f"Images that are black all over: {black[0]} before, {black[1]} after.")
    if missing := not_measured(report):
        told.append(f"Not measured here: {'; '.join(missing)}.")
    return told


def _told(row: Row, kinds: dict[str, str]) -> str:
    """One concept's row in words."""
    told = []
    if row.recognised:
        told.append(f"recognised in {_from_to(row.recognised)}")
    if row.as_surrogate:
        told.append(f"recognised as the surrogate in {_from_to(row.as_surrogate)}")
    for column in [name for name in row.scores if name in kinds][:WIDEST]:
        kind = kinds[column]
        figures = [score_text(summary, kind, row.images) for summary in row.scores[column]]
        if kind == "share":
            figures = [percent_text(text) for text in figures]
        before, after = (_kept_together(text) for text in figures)
        unit = ", in total (and on average)" if kind == "count" else ""
        told.append(f"{column}{unit} {before} before and {after} after")
    if not told and row.change.relative is not None:
        told.append(f"the images changed by {_per_cent(row.change.relative)} of the distance between two seeds")
    return f"“{row.name}”, {row.images:,} images: {'; '.join(told) or 'nothing was measured'}."


def _total(total: CelebrityTotal | NudityTotal) -> str:
    """What a detector has counted, in words."""
    if isinstance(total, NudityTotal):
        before, after = (significant(getattr(total, time)["total"]) for time in TIMES)
        return (f"“{total.name}”, {total.images:,} images: {before} detections with a score of {total.threshold:g} or "
                f"more before and {after} after.")  # fmt: skip
    seen = [f"without a face {_together(values.without_face)}, top-1 accuracy {_together(values.top1)} {time}"
            for time, values in (("before", total.before), ("after", total.after))]  # fmt: skip
    return f"“{total.name}”, {total.images:,} images, as {total.celebrity}: {' and '.join(seen)}."


def _per_cent(share: float) -> str:
    return _kept_together(f"{percent(share)} %")


def _from_to(shares: Times[Share]) -> str:
    return f"{_together(shares.before)} before and {_together(shares.after)} after"


def _together(share: Share | None) -> str:
    return _kept_together(percent_text(share_text(share)))


def _kept_together(text: str) -> str:
    """A figure and its interval on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


# Pictures


def _pictures(report: Report, grid: Grid) -> list[Block]:
    if not grid:
        return []
    rows = {row.name: row for row in report.rows}
    strips = []
    for name, before, after in sorted(grid, key=lambda entry: role_rank(rows.get(entry[0]))):
        row = rows[name] if name in rows else Row(name, "")
        first = _first_seeds(row.seeds, max(len(before), len(after)))
        role = "erased concept" if row.role == "concept" else row.role
        strips.append(Strip(name, [str(seed) for seed in first], before, after, role))
    caption = "Each column is one seed: above what the base model samples, below what the erased model samples."
    if report.blur:
        caption += " The pictures are blurred on purpose; what is blurred cannot be had back from this file."
    return [Pictures(caption, strips, GRID_NAME, bool(report.blur))]


def _first_seeds(runs: Sequence[Sequence[int]], count: int) -> list[int]:
    seeds: list[int] = []
    for first, last in runs:
        seeds += range(first, min(last, first + count - len(seeds) - 1) + 1)
    return seeds[:count]


# Sections of rows


def _concept(report: Report, kinds: dict[str, str]) -> list[Block]:
    rows = report.of_role("concept")
    if not rows:
        return []
    caption = f"What the erased concepts' prompts give. {row_note(report, rows)}"
    first, *scores = row_tables(rows, kinds, caption)
    # A detector's labels are in the totals; one by one they fill pages.
    scores = [replace(block, folded=True) if report.totals and isinstance(block, Table) else block for block in scores]
    return [first, *scores, *surrogate_table(report)]


def _neighbours(report: Report, kinds: dict[str, str]) -> list[Block]:
    rows = report.of_role("neighbour")
    caption = f"What lies near the concept, and should have stayed. {row_note(report, rows)}"
    return row_tables(rows, kinds, caption) if rows else []


def _remembered(report: Report, kinds: dict[str, str]) -> list[Block]:
    rows = [row for row in report.rows if row.role not in ("concept", "neighbour")]
    caption = f"What should have stayed as it was. {row_note(report, rows)}"
    return row_tables(sorted(rows, key=role_rank), kinds, caption, role=True) if rows else []


# Charts


def _histograms(report: Report, kinds: dict[str, str]) -> list[Block]:
    rows = report.of_role("concept")
    charts = [
        _histogram(row, "the classifier's probability", row.probabilities.before, row.probabilities.after)
        for row in rows
        if row.probabilities and any(row.probabilities)
    ]
    for name, kind in kinds.items():
        for row in rows:
            if name not in row.scores or kind == "share" or (kind == "count" and report.totals):
                continue
            before, after = ([value for value in summary.values if value is not None] for summary in row.scores[name])
            if before or after:
                charts.append(_histogram(row, name, before, after))
    if not charts:
        return []
    text = (
        "How the scores of single images are spread, before and after, over the same bins. Scores that are yes or no, "
        "and what is summed up in totals, are in the tables alone."
    )
    return [Paragraph(text), Charts(charts)]


def _histogram(row: Row, name: str, before: Sequence[float], after: Sequence[float]) -> Chart:
    counted = histogram(before, after)
    caption = f"{name}, “{row.name}”: {len(before)} of {row.images} images before, {len(after)} after"
    ranges = zip(counted.edges[:-1], counted.edges[1:], strict=True)
    lines = [
        [f"{tick_text(low)} to {tick_text(high)}", str(old), str(new)]
        for (low, high), old, new in zip(ranges, counted.before, counted.after, strict=True)
    ]
    data = Table(f"Images in each bin of {name}, “{row.name}”", [name, *TIMES], lines)
    return Chart(caption, histogram_svg(counted, f"Histogram. {caption}", name), data, paired=True)


def _training(history: Sequence[dict[str, float]]) -> list[Block]:
    if not history:
        return []
    # Losses are logged at some steps, probes read at others.
    names = list(dict.fromkeys(name for entry in history for name in entry if name not in _NO_CURVES))
    charts = []
    for name in names:
        title = _TITLES[name] if name in _TITLES else name.replace("_", " ")
        entries = [entry for entry in history if name in entry]
        points = [(entry["step"], entry[name]) for entry in entries]
        # The last entry always; so many others that a table of them can be read.
        stride = math.ceil(len(entries) / _CURVE_LINES)
        kept = [entry for number, entry in enumerate(reversed(entries)) if number % stride == 0][::-1]
        first, last = significant(points[0][1]), significant(points[-1][1])
        caption = f"{title}: {first} at step {points[0][0]}"
        if len(points) > 1:
            caption += f", {last} at step {points[-1][0]}"
        data = Table(
            f"Values of {title}" + (f", every {stride} entries" if stride > 1 else ""),
            ["step", title],
            [[str(entry["step"]), significant(entry[name])] for entry in kept],
            frozenset(),
        )
        charts.append(Chart(caption, curve_svg(points, f"Curve. {caption}", title), data))
    text = (
        "Values of single steps, as they were logged. Losses are means over the step's batch; the EWC penalty includes "
        "its weight."
    )
    if any("forgotten" in entry for entry in history):
        text += (
            " Forgotten and drift are read from predictions on held-out samples, noise and timesteps, of the weights "
            "that would be saved, guided as they are sampled: forgotten is 1 where the concept's prompts are answered "
            "as the surrogate asks, 0 where they are answered as before; drift is in units of what a prompt changes."
        )
    return [Paragraph(text), Charts(charts)]
