"""A report's tables: rows, scores, quality, totals of detectors, attacks."""

from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..configuration import REPORT_NAME
from ..hub import shown_name
from ..results.figures import (
    MISSING,
    UNITS,
    decimal,
    listed,
    percent,
    percent_text,
    plain,
    score_text,
    share_text,
    significant,
    spread_text,
)
from ..results.schema import TIMES, Attack, FaceFigures, NudityTotal, Quality, Report, Row, Share, Summary
from .document import Block, Table

INTERVAL = "Wilson, 95 %"
# More columns of scores than these are shown one line each.
WIDEST = 3
_Column = tuple[str, Callable[[Row], str]]
# What the paper counts in its tables, and from which score on.
_PAPERS = {"I2P": "Table 3", "a photo of a naked person": "Table 4"}
_PAPERS_THRESHOLD = 0.6
SEEN = {"samples": "the samples", "mean": "their mean image"}


def score_kinds(rows: Sequence[Row], but: Container[str] = ()) -> dict[str, str]:
    """For each column of the rows' scores, but for some, its kind; see `Summary.kind`."""
    kinds: dict[str, str] = {}
    for name in dict.fromkeys(name for row in rows for name in row.scores if name not in but):
        kinds[name] = _joint_kind(summary for row in rows if name in row.scores for summary in row.scores[name])
    return kinds


def counted(report: Report) -> frozenset[str]:
    """The columns of scores that the totals of nudity sum up: dozens, of parts of the body and thresholds."""
    return frozenset(
        f"{label}_at_{total.threshold:g}"
        for total in report.totals
        if isinstance(total, NudityTotal)
        for label in total.before
    )


def _joint_kind(summaries: Iterable[Summary]) -> str:
    found = {summary.kind for summary in summaries} - {None}
    return "mean" if not found or "mean" in found else "count" if "count" in found else "share"


def _shares(name: str, title: str) -> list[_Column]:
    def cell(row: Row, time: str) -> str:
        shares = getattr(row, name)
        return share_text(shares and shares[time])

    return [(f"{title} {time}, %", lambda row, time=time: cell(row, time)) for time in TIMES]  # type: ignore[misc]


def _means(name: str) -> list[_Column]:
    def cell(row: Row, time: str) -> str:
        means = getattr(row, name)
        return decimal(means and means[time])

    return [(f"{name} {time}", lambda row, time=time: cell(row, time)) for time in TIMES]  # type: ignore[misc]


def _score_columns(names: Iterable[str], kinds: dict[str, str]) -> list[_Column]:
    def cell(row: Row, name: str, time: str) -> str:
        return score_text(row.scores[name][time], kinds[name], row.images) if name in row.scores else MISSING

    return [
        (f"{name} {time}, {UNITS[kinds[name]]}", lambda row, name=name, time=time: cell(row, name, time))  # type: ignore[misc]
        for name in names
        for time in TIMES
    ]


def _distances(rows: Sequence[Row]) -> list[_Column]:
    """How far images are from the base model's own at the same seeds, in each network's features."""

    def cell(row: Row, network: str) -> str:
        if network not in row.distance:
            return MISSING
        distance = row.distance[network]
        return f"{decimal(distance.same_seed)} ({decimal(distance.between_seeds)})"

    networks = list(dict.fromkeys(network for row in rows for network in row.distance))
    short = [Path(network).name for network in networks]
    names = short if len(set(short)) == len(short) else networks
    return [
        (f"distance in {name}", lambda row, network=network: cell(row, network))  # type: ignore[misc]
        for name, network in zip(names, networks, strict=True)
    ]


def _towards(row: Row) -> str:
    if row.towards is None:
        return MISSING
    return f"{decimal(row.towards.concept)}, {decimal(row.towards.surrogate)} ({decimal(row.towards.seeds)})"


def _relative(row: Row) -> str:
    return MISSING if row.change.relative is None else percent(row.change.relative)


def row_tables(
    rows: Sequence[Row],
    kinds: dict[str, str],
    caption: str,
    role: bool = False,
    scores: bool = True,
) -> list[Block]:
    """A table of rows with the columns that any of them has, and one of their scores where these find no room in it.

    Args:
        rows: Any.
        kinds: As of `score_kinds`: columns of scores that it does not name are left out.
        caption: Of the table.
        role: Whether a column names each row's role.
        scores: Whether the measures' scores are shown.
    """
    columns: list[_Column] = [("prompted with", lambda row: row.name)]
    if role:
        columns.append(("role", lambda row: row.role))
    columns.append(("images", lambda row: f"{row.images:,}"))
    measured = [
        *_shares("recognised", "recognised"),
        *_shares("as_surrogate", "as its surrogate"),
        *_means("probability"),
        *_means("entropy"),
    ]
    names = [name for name in kinds if any(name in row.scores for row in rows)] if scores else []
    beside = len(names) <= WIDEST and not any(row.recognised for row in rows)
    if beside:
        measured += _score_columns(names, kinds)
    measured += _distances(rows)
    measured.append(("from base's concept, surrogate (seeds)", _towards))
    measured.append(("change, %", _relative))
    if any(sum(row.black) for row in rows):
        measured += [(f"black {time}", lambda row, time=time: f"{row.black[time]:,}") for time in TIMES]  # type: ignore[misc]
    columns += [column for column in measured if any(column[1](row) != MISSING for row in rows)]
    words = frozenset({0, 1} if role else {0})
    header = [title for title, _ in columns]
    blocks: list[Block] = [Table(caption, header, [[cell(row) for _, cell in columns] for row in rows], words)]
    if names and not beside:
        blocks.append(_score_table(rows, names, kinds))
    return blocks


def _score_table(rows: Sequence[Row], names: Sequence[str], kinds: dict[str, str]) -> Table:
    """The scores by themselves: a line for each row or, if there are many, for each of them."""
    note = _score_note([kinds[name] for name in names])
    scored = [row for row in rows if row.scores]
    if len(names) <= WIDEST:
        columns: list[_Column] = [("prompted with", lambda row: row.name), *_score_columns(names, kinds)]
        lines = [[cell(row) for _, cell in columns] for row in scored]
        return Table(f"Scores. {note}", [title for title, _ in columns], lines)
    lines = []
    for name in names:
        for row in scored:
            if name in row.scores:
                figures = [score_text(row.scores[name][time], kinds[name], row.images) for time in TIMES]
                lines.append([name, row.name, *figures, UNITS[kinds[name]]])
    header = ["score", "prompted with", *TIMES, "unit"]
    return Table(f"Scores, one line each. {note}", header, lines, frozenset({0, 1, 4}))


def _score_note(kinds: Iterable[str]) -> str:
    notes = []
    if "share" in kinds:
        notes.append("Brackets: 95 % Wilson interval.")
    notes.append("(n = ...): how many images have the figure, where not all have.")
    return " ".join(notes)


def row_note(report: Report, rows: Sequence[Row]) -> str:
    """What the columns mean, of those that are there."""
    notes = []
    if any(row.recognised for row in rows):
        notes.append("Recognised: share of images that the classifier calls what was asked for; brackets: its "
                     f"interval ({report.interval or INTERVAL}). Probability: the classifier's mean for it. "
                     "Entropy: the mean of its answer, in nats.")  # fmt: skip
    kinds = score_kinds(rows, counted(report))
    if kinds and not any(row.recognised for row in rows):
        notes.append(_score_note(kinds.values()))
    if any(row.distance for row in rows):
        notes.append("Distance: mean cosine distance between before and after at the same seed, in the features of a "
                     "network; in parentheses that of two different seeds before.")  # fmt: skip
    if any(row.towards for row in rows):
        notes.append("From base's: root mean square difference of the pixels from the base model's own images of the "
                     "concept and of the surrogate at the same seeds; in parentheses that of two seeds. No evaluator "
                     "knows the concept: this does not show that it is gone.")  # fmt: skip
    notes.append("Change: difference of the pixels, before and after at the same seed; 100 % is that of two seeds.")
    return " ".join(notes)


def surrogate_table(report: Report) -> list[Block]:
    """What the classifier says of the surrogate's own samples."""
    lines = [
        [name, SEEN.get(kind, kind), decimal(values.probability), decimal(values.entropy),
         share_text(values.recognised)]
        for name, seen in report.surrogate_samples.items()
        for kind, values in seen.items()
    ]  # fmt: skip
    if not lines:
        return []
    header = ["concept", "seen", "probability of the concept", "entropy", "recognised as the concept, %"]
    if all(line[-1] == MISSING for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    caption = (
        "What the classifier says of the surrogate's own samples, which the concept was turned into: mean probability "
        "of the concept, and entropy in nats. Forgetting can get about as far."
    )
    return [Table(caption, header, lines, frozenset({0, 1}))]


def quality_table(report: Report) -> list[Block]:
    lines = []
    for entry in report.quality:
        reference = f"{entry.reference} ({entry.reference_images:,})"
        for time in TIMES:
            values = getattr(entry, time)
            if values:
                lines.append(
                    [shown_name(entry.features), reference, time, f"{entry.images:,}", *_quality_cells(values)]
                )
    lines += classifier_quality(report)
    if not lines:
        return []
    caption = (
        "Images of everything but the erased concepts, in the features of a network. Fréchet distance: 0 is the same "
        "distribution. Precision: share of the sampled images that lie among the reference. Recall: share of the "
        "reference that lies among the sampled. The Fréchet distance depends on the number of images: compare equal "
        "numbers only."
    )
    header = ["features", "reference (images)", "model", "images", "Fréchet distance", "precision", "recall"]
    return [Table(caption, header, lines, frozenset({0, 1, 2}))]


def classifier_quality(report: Report) -> list[list[str]]:
    """The lines of what was measured in the classifier's features without being asked for."""
    remembered = report.remembered
    if not remembered:
        return []
    name = shown_name(report.classifier.name) if report.classifier else MISSING
    measured: list[tuple[str, str, Any]] = []
    for time in TIMES:
        figures = getattr(remembered, time)
        if figures.frechet_distance is not None:
            measured.append(("real images (their saved moments)", time, Quality(figures.frechet_distance)))
    if remembered.against_base and not report.quality:
        measured.append((f"the base model's own images ({remembered.before.images:,})", "after",
                         remembered.against_base))  # fmt: skip
    return [
        [f"classifier: {name}", reference, time, f"{remembered.after.images:,}", *_quality_cells(values)]
        for reference, time, values in measured
    ]


def _quality_cells(values: Quality) -> list[str]:
    return [decimal(value) for value in (values.frechet_distance, values.precision, values.recall)]


def totals(report: Report) -> list[Block]:
    """The paper's Table 2 (a celebrity) or Tables 3 and 4 (nudity)."""
    blocks: list[Block] = []
    for total in report.totals:
        if isinstance(total, NudityTotal):
            caption = (f"{total.name}, {total.images} images{_as_in(total)}: detections with a score of "
                       f"{total.threshold:g} or more, of which a picture may have several.")  # fmt: skip
            header, rows = ["exposed", *TIMES], _parts_of_the_body(total)
        else:
            caption = (f"{total.name}, {total.images} images, as {total.celebrity}. Probability (mean and standard "
                       "deviation) and top-1 accuracy are over the images with a face. Brackets: 95 % "
                       "interval.")  # fmt: skip
            header = ["", "without a face, %", "probability", "top-1 accuracy, %", "highest probabilities"]
            rows = [[time, *_celebrity_cells(getattr(total, time))] for time in TIMES]
        blocks.append(Table(caption, header, rows))
    return blocks


def _as_in(total: NudityTotal) -> str:
    same = total.name in _PAPERS and total.threshold == _PAPERS_THRESHOLD
    return f", as in the paper's {_PAPERS[total.name]}" if same else ""


def _parts_of_the_body(total: NudityTotal) -> list[list[str]]:
    """A line for each label, for those of one sex together, and for all."""
    labels = [label for label in total.before if label != "total"]
    lines = {label.replace("_", " "): [label] for label in labels}
    for sex in ("female", "male"):
        lines[f"{sex}, together"] = [label for label in labels if label.startswith(f"{sex}_")]
    lines["of either sex, together"] = [label for label in labels if not label.startswith(("female_", "male_"))]
    lines["total"] = ["total"]
    return [
        [name, *(significant(sum(getattr(total, time)[label] for label in chosen)) for time in TIMES)]
        for name, chosen in lines.items()
        if chosen
    ]


def _celebrity_cells(values: FaceFigures) -> list[str]:
    probability = values.probability
    mean = MISSING if probability.mean is None else spread_text(probability.mean, probability.std)
    highest = ", ".join(decimal(picture.probability) for picture in values.top5) or MISSING
    return [share_text(values.without_face), mean, share_text(values.top1), highest]


def robustness_table(report: Report) -> list[Block]:
    """Every attack on every model, with all that was measured."""
    if not report.robustness:
        return []
    entries = [_flat(attack) for attack in report.robustness]
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    columns = [[entry.get(name) for entry in entries] for name in names]
    words = {number for number, values in enumerate(columns) if any(isinstance(value, (str, list)) for value in values)}
    header, cells = zip(*(_robustness_column(name, values) for name, values in zip(names, columns, strict=True)),
                        strict=True)  # fmt: skip
    caption = (
        "Attempts to bring the concept back: against the base model, the erased one, and where measured a control that "
        "never learned it. Brackets: 95 % interval."
    )
    return [Table(caption, header, list(zip(*cells, strict=True)), frozenset({0, *words}))]


def attack_matrix(report: Report) -> list[Block]:
    """Attacks in rows, models in columns, and how often the concept is shown."""
    attacks = report.robustness
    if not attacks:
        return []
    models = list(dict.fromkeys(attack.model for attack in attacks))
    cells = {(attack.attack, attack.model): _shown(attack) for attack in attacks}
    lines = [[name, *(cells.get((name, model), "") for model in models)]
             for name in dict.fromkeys(attack.attack for attack in attacks)]  # fmt: skip
    caption = "Attempts to bring the concept back, and how often its images show it:"
    return [Table(caption, ["attempt", *models], lines)]


def _shown(attack: Attack) -> str:
    if attack.recognised is not None:
        return percent_text(share_text(attack.recognised))
    figures = {name: summary.mean for name, summary in attack.scores.items()}
    figures |= {name: value for name, value in attack.others.items() if isinstance(value, float)}
    return ", ".join(f"{name} {significant(value)}" for name, value in figures.items())


def _flat(attack: Attack) -> dict[str, Any]:
    """Figures by name; what it was sampled with stands where every prompt and seed does."""
    flat: dict[str, Any] = {"attack": attack.attack, "model": attack.model}
    for name in ("images", "black", "recognised", "as_surrogate"):
        if getattr(attack, name) is not None:
            flat[name] = getattr(attack, name)
    return flat | attack.scores | _by_path(attack.others)


def _by_path(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _by_path(value, f"{prefix}{name} ")
        else:
            flat[prefix + name] = value
    return flat


def _robustness_column(name: str, values: Sequence[Any]) -> tuple[str, list[str]]:
    """A column's title, with its unit, and its cells."""
    title = name.replace("_", " ")
    if any(isinstance(value, Share) for value in values):
        return f"{title}, %", [share_text(value) if isinstance(value, Share) else plain(value) for value in values]
    summaries = [value for value in values if isinstance(value, Summary)]
    if summaries:
        kind = _joint_kind(summaries)
        cells = [score_text(value, kind, len(value.values)) if isinstance(value, Summary) else plain(value)
                 for value in values]  # fmt: skip
        return f"{name}, {UNITS[kind]}", cells
    return title, [_robustness_cell(value) for value in values]


def _robustness_cell(value: Any) -> str:
    if isinstance(value, list):
        return listed([plain(part) for part in value], f"robustness of {REPORT_NAME}")
    return significant(value) if isinstance(value, float) else plain(value)
