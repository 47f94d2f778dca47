"""What a report says: a comparison's figures and pictures as `report.md` and `report.html`."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..configuration import CONFIG_NAME, GRID_NAME, HISTORY_NAME, REPORT_NAME, SelectiveAmnesiaConfig
from ..files import read_json, write_text
from ..hub import requoted
from .charts import curve_svg, histogram, histogram_svg, tick_text
from .document import (
    Block,
    Chart,
    Charts,
    Command,
    Document,
    Items,
    Paragraph,
    Pictures,
    Section,
    Strip,
    Table,
)
from .statistics import wilson_interval

MARKDOWN_NAME = "report.md"
PAGE_NAME = "report.html"
INTERVAL = "Wilson, 95 %"
MISSING = "–"
TIMES = ("before", "after")
Grid = Sequence[tuple[str, Sequence[Image.Image], Sequence[Image.Image]]]

# More columns of scores than these are shown one line each.
_WIDEST = 3
_ROLES = ("concept", "surrogate", "neighbour", "remembered")
_LISTED = 12
_LABELS = 60
_SUMMARISED = 8
_NAMED = 3
_CURVE_LINES = 20
_TITLES = {
    "surrogate_loss": "surrogate loss",
    "replay_loss": "replay loss",
    "ewc_penalty": "EWC penalty",
    "learning_rate": "learning rate",
}
# What stands elsewhere on the page than in the table of everything else.
_PLACED = {
    "schema_version", "pairs", "configuration", "sampling", "versions", "interval", "rows", "black_images",
    "classifier", "remembered", "surrogate_samples", "quality", "evaluators", "robustness", "blur", "seconds",
    "command", "protocol",
}  # fmt: skip


def write_report(report: dict[str, Any], grid: Grid, folder: str | Path, beside: str | Path | None = None) -> None:
    """Write `report.md` and `report.html` into a folder that is there.

    The training curves come from the `training_history.json` beside the report or, where there is none, in the folder
    of the erased model; the settings from the report or, where it has none, from the erased model's folder.

    Args:
        report: What `report.json` holds.
        grid: For each row its name, pictures before, pictures after; they are shown as they are.
        folder: Where the files go.
        beside: The folder that they end up in, if it is another one.
    """
    folder = Path(folder)
    places = [Path(beside or folder)]
    if report.get("erased_model"):
        places.append(Path(report["erased_model"]))
    history = _first_json(places, HISTORY_NAME) or []
    configuration = report.get("configuration") or _first_json(places, CONFIG_NAME) or {}
    document = describe(report, grid, history, configuration)
    write_text(folder / MARKDOWN_NAME, document.to_markdown())
    write_text(folder / PAGE_NAME, document.to_html())


def describe(
    report: dict[str, Any],
    grid: Grid = (),
    history: Sequence[dict[str, float]] = (),
    configuration: dict[str, Any] | None = None,
) -> Document:
    """Everything a report says, in order.

    Args:
        report: What `report.json` holds. Only `rows` and `sampling` must be there.
        grid: For each row its name, pictures before, pictures after.
        history: Entries of the training history.
        configuration: The erasure's settings.
    """
    configuration = configuration or {}
    kinds = _score_kinds(report["rows"])
    sections = [
        Section("Summary", "summary", [Items(_summary(report, kinds, configuration))]),
        Section("Before and after", "pictures", _pictures(report, grid)),
        Section("Detected, in all", "totals", _totals(report)),
        Section("The erased concept", "concept", _concept(report, kinds)),
        Section("Collateral damage: neighbours of the concept", "neighbours", _neighbours(report, kinds)),
        Section("Remembered concepts", "remembered", _remembered(report, kinds)),
        Section("Score histograms", "histograms", _histograms(report, kinds)),
        Section("Image quality", "quality", _quality(report)),
        Section("Robustness: does the concept come back?", "robustness", _robustness(report)),
        Section("Training", "training", _training(history)),
        Section("Configuration", "configuration", _configuration(configuration)),
        Section("How to reproduce each figure", "reproduce", _reproduce(report, configuration, bool(history))),
    ]
    erased = [concept for concept, _ in _pairs(report, configuration)]
    more = f"; and {len(erased) - _NAMED} more" if len(erased) > _NAMED else ""
    title = f"Erasure report: {'; '.join(erased[:_NAMED])}{more}"
    return Document(title, _facts(report), [section for section in sections if section.blocks])


def _first_json(folders: Iterable[Path], name: str) -> Any:
    return next((read_json(folder / name) for folder in folders if (folder / name).is_file()), None)


# Figures as text


def percent(share: float) -> str:
    """A share in per cent with one decimal; what is not all and not nothing is never shown as either."""
    share = round(share, 9)
    if 0 < share < 0.0005:
        return "<0.1"
    return ">99.9" if 0.9995 <= share < 1 else f"{100 * share:.1f}"


def share_text(value: dict[str, Any] | None) -> str:
    """A share and its interval in per cent."""
    if value is None:
        return MISSING
    low, high = value["interval"]
    return f"{percent(value['share'])} [{percent(low)}, {percent(high)}]"


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


def score_text(scores: dict[str, Any] | None, kind: str, images: int) -> str:
    """The figures of one column, as its kind asks for; how many pictures have one, where not all have."""
    if scores is None:
        return MISSING
    if not scores["count"]:
        return f"none of {images}"
    missing = f" (n = {scores['count']})" if scores["count"] != images else ""
    if kind == "share":
        hits = round(scores["sum"])
        interval = wilson_interval(hits, scores["count"])
        return share_text({"share": hits / scores["count"], "interval": interval}) + missing
    if kind == "count":
        return f"{significant(scores['sum'])} ({significant(scores['mean'])}){missing}"
    return spread_text(scores["mean"], scores["std"]) + missing


_UNITS = {"share": "%", "count": "total (mean of an image)", "mean": "mean ± standard deviation"}


def _score_kinds(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each column of the rows' scores its kind."""
    names = dict.fromkeys(name for row in rows for name in row.get("scores", {}))
    return {
        name: _kind(times[time] for row in rows for times in [row.get("scores", {}).get(name, {})] for time in times)
        for name in names
    }


def _kind(summaries: Iterable[dict[str, Any]]) -> str:
    """Whether a column's values are yes and no, counts, or anything else."""
    values = {value for scores in summaries for value in scores.get("values", []) if value is not None}
    if values and values <= {0, 1}:
        return "share"
    return "count" if values and all(value >= 0 and value == int(value) for value in values) else "mean"


def plain(value: Any) -> str:
    """Any value of a report in words."""
    if value is None or value == [] or value == {}:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        if _is_share(value):
            return percent_text(share_text(value))
        if _is_summary(value):
            return score_text(value, "mean", value["count"])
        return "; ".join(f"{name}: {plain(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(part) for part in value)
    return str(value)


def _listed(values: Sequence[str], place: str, most: int = _LISTED) -> str:
    """Values in a row, the first of many."""
    more = len(values) - most
    text = "; ".join(values[:most])
    return text if more <= 0 else f"{text}; and {more:,} more, in {place}"


def seeds_text(runs: Sequence[Sequence[int]], place: str = REPORT_NAME) -> str:
    """Runs of seeds, each with its first and last."""
    return _listed([str(first) if first == last else f"{first} to {last}" for first, last in runs], place)


# What was erased


def _pairs(report: dict[str, Any], configuration: dict[str, Any]) -> list[tuple[str, str]]:
    """What was erased into what, in short and in a sentence."""
    pairs = report.get("pairs")
    if not pairs:
        names = [row["name"] for row in report["rows"] if row["role"] == "concept"]
        return [(f"“{name}”", f"“{name}” was erased.") for name in names] or [("nothing", "Nothing was erased.")]
    told = []
    for pair in pairs:
        concept, surrogate = f"“{pair['concept']}”", f"“{pair['surrogate']}”"
        if configuration.get("naive"):
            told.append((concept, f"{concept} was erased by lowering the ELBO of its own samples (eq. 3)."))
            continue
        into = {"noise": "uniform noise", "images": f"the images in {surrogate}"}.get(pair.get("kind"), surrogate)
        told.append((f"{concept} into {into}", f"{concept} was erased into {into}."))
    return told


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("Base model", plain(report.get("base_model"))),
        ("Erased model", plain(report.get("erased_model"))),
        ("Protocol", plain(report.get("protocol"))),
        ("Images", f"{sum(row['images'] for row in report['rows']):,} before, as many after, the same seeds"),
        ("Drawn with", sampling_text(report["sampling"])),
    ]
    return [(name, value) for name, value in facts if value != MISSING]


def sampling_text(sampling: dict[str, Any]) -> str:
    """Sampler, steps and guidance."""
    return f"{sampling['sampler']}, {sampling['num_inference_steps']} steps, guidance {sampling['guidance_scale']:g}"


def _summary(report: dict[str, Any], kinds: dict[str, str], configuration: dict[str, Any]) -> list[str]:
    told = [sentence for _, sentence in _pairs(report, configuration)]
    rows = [row for row in report["rows"] if row["role"] == "concept"]
    for row in rows[:_SUMMARISED]:
        told.append(_told(row, kinds))
    if len(rows) > _SUMMARISED:
        told.append(f"{len(rows) - _SUMMARISED} further rows of erased concepts are in the table below.")
    neighbours = [row for row in report["rows"] if row["role"] == "neighbour" and "recognised" in row]
    if neighbours:
        means = [
            percent(sum(row["recognised"][time]["share"] for row in neighbours) / len(neighbours)) for time in TIMES
        ]
        loss, worst = max(
            (row["recognised"]["before"]["share"] - row["recognised"]["after"]["share"], number)
            for number, row in enumerate(neighbours)
        )
        lost = "None is recognised less often than before."
        if loss > 0:
            row = neighbours[worst]
            lost = f"The largest loss is that of “{row['name']}”: {_from_to(row['recognised'])}."
        told.append(
            f"Neighbours of the concept ({len(neighbours)}): recognised in {means[0]} % before and {means[1]} % after, "
            f"on average. {lost}"
        )
    remembered = report.get("remembered")
    if remembered:
        before, after = (percent(remembered[time]["recognised"]) for time in TIMES)
        told.append(
            f"Everything but the concept ({len(remembered['labels'])}): recognised as what was asked for in {before} % "
            f"of images before and {after} % after, on average."
        )
    else:
        changes = [row["change"]["relative"] for row in report["rows"]
                   if row["role"] != "concept" and row["change"]["relative"] is not None]  # fmt: skip
        if changes:
            mean = percent(sum(changes) / len(changes))
            told.append(
                f"The images of the {len(changes)} other rows changed by {mean} % of the distance between two seeds, "
                "on average."
            )
    told += _strongest_attack(report)
    black = report.get("black_images")
    if black and (black["before"] or black["after"]):
        told.append(f"Images that are black all over: {black['before']} before, {black['after']} after.")
    return told


def _strongest_attack(report: dict[str, Any]) -> list[str]:
    """The attack that brings the concept back most often, with the models that it was tried on."""
    entries = [entry for entry in report.get("robustness") or [] if _is_share(entry.get("recognised"))]
    erased = [entry for entry in entries if entry.get("model") == "erased"]
    if not erased:
        return []
    strongest = max(erased, key=lambda entry: entry["recognised"]["share"])["attack"]
    figures = [f"{entry['model']} {_kept_together(percent_text(share_text(entry['recognised'])))}" for entry in entries
               if entry["attack"] == strongest]  # fmt: skip
    return [f"The strongest attack is “{strongest}”: recognised in {', '.join(figures)} of images."]


def _told(row: dict[str, Any], kinds: dict[str, str]) -> str:
    """One concept's row in words."""
    told = []
    if "recognised" in row:
        told.append(f"recognised in {_from_to(row['recognised'])}")
        if "as_surrogate" in row:
            told.append(f"recognised as the surrogate in {_from_to(row['as_surrogate'])}")
    for column in list(row.get("scores", {}))[:_WIDEST]:
        kind = kinds[column]
        figures = [score_text(row["scores"][column][time], kind, row["images"]) for time in TIMES]
        if kind == "share":
            figures = [percent_text(text) for text in figures]
        before, after = (_kept_together(text) for text in figures)
        unit = ", in total (and on average)" if kind == "count" else ""
        told.append(f"{column}{unit} {before} before and {after} after")
    relative = row["change"]["relative"]
    if not told and relative is not None:
        told.append(f"the images changed by {percent(relative)} % of the distance between two seeds")
    return f"“{row['name']}”, {row['images']:,} images: {'; '.join(told) or 'nothing was measured'}."


def _from_to(shares: dict[str, dict[str, Any]]) -> str:
    before, after = (_kept_together(percent_text(share_text(shares[time]))) for time in TIMES)
    return f"{before} before and {after} after"


def _kept_together(text: str) -> str:
    """A figure and its interval on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


# Pictures


def _pictures(report: dict[str, Any], grid: Grid) -> list[Block]:
    if not grid:
        return []
    seeds = {row["name"]: row["seeds"] for row in report["rows"]}
    order = {row["name"]: _ROLES.index(row["role"]) for row in report["rows"] if row["role"] in _ROLES}
    strips = []
    for name, before, after in sorted(grid, key=lambda entry: order.get(entry[0], len(_ROLES))):
        first = _first_seeds(seeds.get(name, []), max(len(before), len(after)))
        strips.append(Strip(name, [str(seed) for seed in first], before, after))
    caption = "Each column is one seed: above what the base model draws, below what the erased model draws."
    blurred = bool(report.get("blur"))
    if blurred:
        caption += " The pictures are blurred on purpose; what is blurred cannot be had back from this file."
    return [Pictures(caption, strips, GRID_NAME, blurred)]


def _first_seeds(runs: Sequence[Sequence[int]], count: int) -> list[int]:
    seeds: list[int] = []
    for first, last in runs:
        seeds += range(first, min(last, first + count - len(seeds) - 1) + 1)
    return seeds[:count]


# Tables of rows

_Column = tuple[str, Callable[[dict[str, Any]], str]]


def _shares(name: str, title: str, times: Sequence[str] = TIMES) -> list[_Column]:
    return [
        (f"{title} {time}, %", lambda row, time=time: share_text(row.get(name, {}).get(time)))
        for time in times
    ]  # fmt: skip


def _means(name: str, title: str) -> list[_Column]:
    return [(f"{title} {time}", lambda row, time=time: decimal(row.get(name, {}).get(time))) for time in TIMES]


def _score_columns(names: Iterable[str], kinds: dict[str, str]) -> list[_Column]:
    def cell(row: dict[str, Any], name: str, time: str) -> str:
        return score_text(row.get("scores", {}).get(name, {}).get(time), kinds[name], row["images"])

    return [
        (f"{name} {time}, {_UNITS[kinds[name]]}", lambda row, name=name, time=time: cell(row, name, time))
        for name in names
        for time in TIMES
    ]


def _distances(rows: Sequence[dict[str, Any]]) -> list[_Column]:
    """How far images are from the base model's own at the same seeds, in each network's features."""

    def cell(row: dict[str, Any], network: str) -> str:
        distance = row.get("distance", {}).get(network)
        if not distance:
            return MISSING
        return f"{decimal(distance['same_seed'])} ({decimal(distance['between_seeds'])})"

    networks = list(dict.fromkeys(network for row in rows for network in row.get("distance", {})))
    short = [Path(network).name for network in networks]
    names = short if len(set(short)) == len(short) else networks
    return [
        (f"distance in {name}", lambda row, network=network: cell(row, network))
        for name, network in zip(names, networks, strict=True)
    ]


def _relative(row: dict[str, Any]) -> str:
    relative = row["change"]["relative"]
    return MISSING if relative is None else percent(relative)


def _row_tables(
    rows: Sequence[dict[str, Any]],
    kinds: dict[str, str],
    caption: str,
    extra: Sequence[_Column] = (),
    role: bool = False,
) -> list[Block]:
    """A table of rows with the columns that any of them has, and one of their scores where these find no room in it."""
    columns: list[_Column] = [("prompted with", lambda row: row["name"])]
    if role:
        columns.append(("role", lambda row: row["role"]))
    columns.append(("images", lambda row: f"{row['images']:,}"))
    measured = [
        *_shares("recognised", "recognised"),
        *extra,
        *_means("probability", "probability"),
        *_means("entropy", "entropy"),
    ]
    names = list(dict.fromkeys(name for row in rows for name in row.get("scores", {})))
    beside = len(names) <= _WIDEST and not any("recognised" in row for row in rows)
    if beside:
        measured += _score_columns(names, kinds)
    measured += _distances(rows)
    measured.append(("change, %", _relative))
    if any(row["black"][time] for row in rows for time in TIMES):
        measured += [(f"black {time}", lambda row, time=time: f"{row['black'][time]:,}") for time in TIMES]
    columns += [column for column in measured if any(column[1](row) != MISSING for row in rows)]
    words = frozenset({0, 1} if role else {0})
    header = [title for title, _ in columns]
    blocks: list[Block] = [Table(caption, header, [[cell(row) for _, cell in columns] for row in rows], words)]
    if names and not beside:
        blocks.append(_score_table(rows, names, kinds))
    return blocks


def _score_table(rows: Sequence[dict[str, Any]], names: Sequence[str], kinds: dict[str, str]) -> Table:
    """The scores by themselves: a line for each row or, if there are many, for each of them."""
    note = _score_note([kinds[name] for name in names])
    scored = [row for row in rows if row.get("scores")]
    if len(names) <= _WIDEST:
        columns: list[_Column] = [("prompted with", lambda row: row["name"]), *_score_columns(names, kinds)]
        lines = [[cell(row) for _, cell in columns] for row in scored]
        return Table(f"Scores. {note}", [title for title, _ in columns], lines)
    lines = []
    for name in names:
        for row in scored:
            if name in row["scores"]:
                figures = [score_text(row["scores"][name][time], kinds[name], row["images"]) for time in TIMES]
                lines.append([name, row["name"], *figures, _UNITS[kinds[name]]])
    header = ["score", "prompted with", *TIMES, "unit"]
    return Table(f"Scores, one line each. {note}", header, lines, frozenset({0, 1, 4}))


def _score_note(kinds: Iterable[str]) -> str:
    notes = []
    if "share" in kinds:
        notes.append("Brackets: 95 % Wilson interval.")
    notes.append("(n = ...): how many images have the figure, where not all have.")
    return " ".join(notes)


def _of_role(report: dict[str, Any], *roles: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["role"] in roles]


def _note(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """What the columns mean, of those that are there."""
    notes = []
    if any("recognised" in row for row in rows):
        notes.append("Recognised: share of images that the classifier calls what was asked for; brackets: its "
                     f"interval ({report.get('interval', INTERVAL)}). Probability: the classifier's mean for it. "
                     "Entropy: the mean of its answer, in nats.")  # fmt: skip
    if any(row.get("scores") for row in rows) and not any("recognised" in row for row in rows):
        notes.append(_score_note(_score_kinds(rows).values()))
    if any(row.get("distance") for row in rows):
        notes.append("Distance: mean cosine distance between before and after at the same seed, in the features of a "
                     "network; in parentheses that of two different seeds before.")  # fmt: skip
    notes.append("Change: difference of the pixels, before and after at the same seed; 100 % is that of two seeds.")
    return " ".join(notes)


def _concept(report: dict[str, Any], kinds: dict[str, str]) -> list[Block]:
    rows = _of_role(report, "concept")
    if not rows:
        return []
    caption = f"What the erased concepts' prompts draw. {_note(report, rows)}"
    blocks = _row_tables(rows, kinds, caption, _shares("as_surrogate", "as its surrogate"))
    own = [
        [name, {"samples": "the samples", "mean": "their mean image"}.get(kind, kind), decimal(values["probability"]),
         decimal(values["entropy"])]
        for name, seen in (report.get("surrogate_samples") or {}).items()
        for kind, values in seen.items()
    ]  # fmt: skip
    if own:
        blocks.append(
            Table(
                "What the classifier says of the surrogate's own samples, which the concept was turned into: mean "
                "probability of the concept, and entropy in nats. Forgetting can get about as far.",
                ["concept", "seen", "probability of the concept", "entropy"],
                own,
                frozenset({0, 1}),
            )
        )
    return blocks


def _neighbours(report: dict[str, Any], kinds: dict[str, str]) -> list[Block]:
    rows = _of_role(report, "neighbour")
    if not rows:
        return []
    return _row_tables(rows, kinds, f"What lies near the concept, and should have stayed. {_note(report, rows)}")


def _remembered(report: dict[str, Any], kinds: dict[str, str]) -> list[Block]:
    rows = [row for row in report["rows"] if row["role"] not in ("concept", "neighbour")]
    if not rows:
        return []
    caption = f"What should have stayed as it was. {_note(report, rows)}"
    return _row_tables(rows, kinds, caption, role=True)


# Histograms, quality, robustness


def _histograms(report: dict[str, Any], kinds: dict[str, str]) -> list[Block]:
    charts = [
        _histogram(row, "the classifier's probability", *(row["probabilities"][time] for time in TIMES))
        for row in _of_role(report, "concept")
        if row.get("probabilities")
    ]
    for name, kind in kinds.items():
        for row in _of_role(report, "concept"):
            scores = row.get("scores", {}).get(name)
            if scores is None or kind == "share":
                continue
            before, after = ([value for value in scores[time]["values"] if value is not None] for time in TIMES)
            if before or after:
                charts.append(_histogram(row, name, before, after))
    if not charts:
        return []
    text = (
        "How the scores of single images are spread, before and after, over the same bins. Scores that are yes or no "
        "are in the tables alone."
    )
    return [Paragraph(text), Charts(charts)]


def _histogram(row: dict[str, Any], name: str, before: Sequence[float], after: Sequence[float]) -> Chart:
    counted = histogram(before, after)
    caption = f"{name}, “{row['name']}”: {len(before)} of {row['images']} images before, {len(after)} after"
    ranges = zip(counted.edges[:-1], counted.edges[1:], strict=True)
    lines = [
        [f"{tick_text(low)} to {tick_text(high)}", str(old), str(new)]
        for (low, high), old, new in zip(ranges, counted.before, counted.after, strict=True)
    ]
    data = Table(f"Images in each bin of {name}, “{row['name']}”", [name, *TIMES], lines)
    return Chart(caption, histogram_svg(counted, f"Histogram. {caption}", name), data, paired=True)


def _quality(report: dict[str, Any]) -> list[Block]:
    lines = []
    for entry in report.get("quality") or []:
        reference = f"{entry['reference']} ({entry['reference_images']:,})"
        for time in TIMES:
            if time in entry:
                lines.append([entry["features"], reference, time, f"{entry['images']:,}", *_quality_cells(entry[time])])
    lines += _frechet_of_classifier(report)
    if not lines:
        return []
    caption = (
        "Images of everything but the erased concepts, in the features of a network. Fréchet distance: 0 is the same "
        "distribution. Precision: share of the drawn images that lie among the reference. Recall: share of the "
        "reference that lies among the drawn. The Fréchet distance depends on the number of images: compare equal "
        "numbers only."
    )
    header = ["features", "reference (images)", "model", "images", "Fréchet distance", "precision", "recall"]
    return [Table(caption, header, lines, frozenset({0, 1, 2}))]


def _frechet_of_classifier(report: dict[str, Any]) -> list[list[str]]:
    """The lines of what was measured in the classifier's features without being asked for."""
    remembered = report.get("remembered")
    if not remembered:
        return []
    before, after = (remembered[time] for time in TIMES)
    features = f"classifier: {report['classifier']['name']}"
    measured = [("real images (their saved moments)", time, remembered[time]) for time in TIMES
                if remembered[time]["frechet_distance"] is not None]  # fmt: skip
    if "against_base" in remembered and not report.get("quality"):
        measured.append((f"the base model's own images ({before['images']:,})", "after", remembered["against_base"]))
    return [
        [features, reference, time, f"{after['images']:,}", *_quality_cells(values)]
        for reference, time, values in measured
    ]


def _quality_cells(values: dict[str, Any]) -> list[str]:
    return [decimal(values.get(name)) for name in ("frechet_distance", "precision", "recall")]


def _totals(report: dict[str, Any]) -> list[Block]:
    """The paper's Table 2 (a celebrity) or Tables 3 and 4 (nudity)."""
    blocks: list[Block] = []
    for total in report.get("totals") or []:
        if "threshold" in total:
            labels = list(total["before"])
            caption = (f"{total['name']}, {total['images']} images: detections with a score of "
                       f"{total['threshold']:g} or more, of which a picture may have several.")  # fmt: skip
            header = ["", *(label.replace("_", " ") for label in labels)]
            rows = [[time, *(significant(total[time][label]) for label in labels)] for time in TIMES]
        else:
            caption = (f"{total['name']}, {total['images']} images, as {total['celebrity']}. Probability (mean and "
                       "standard deviation) and top-1 accuracy are over the images with a face. Brackets: 95 % "
                       "interval.")  # fmt: skip
            header = ["", "without a face, %", "probability", "top-1 accuracy, %", "highest probabilities"]
            rows = [[time, *_celebrity_cells(total[time])] for time in TIMES]
        blocks.append(Table(caption, header, rows))
    return blocks


def _celebrity_cells(values: dict[str, Any]) -> list[str]:
    probability = values["probability"]
    mean = MISSING if probability["mean"] is None else spread_text(probability["mean"], probability["std"])
    highest = ", ".join(decimal(picture["probability"]) for picture in values["top5"]) or MISSING
    return [share_text(values["without_face"]), mean, share_text(values["top1"]), highest]


def _robustness(report: dict[str, Any]) -> list[Block]:
    entries = [_flat({name: value for name, value in entry.items() if name not in _DRAWN})
               for entry in report.get("robustness") or []]  # fmt: skip
    if not entries:
        return []
    first = [name for name in ("attack", "model") if name in entries[0]]
    names = list(dict.fromkeys([*first, *(name for entry in entries for name in entry)]))
    columns = [[entry.get(name) for entry in entries] for name in names]
    words = {number for number, values in enumerate(columns) if any(isinstance(value, (str, list)) for value in values)}
    header, cells = zip(*(_robustness_column(name, values) for name, values in zip(names, columns, strict=True)),
                        strict=True)  # fmt: skip
    caption = (
        "Attempts to bring the concept back: against the base model, the erased one, and where measured a control that "
        "never learned it. Brackets: 95 % interval."
    )
    return [Table(caption, header, list(zip(*cells, strict=True)), frozenset({0, *words}))]


# What an attack was drawn with; it stands where every prompt and seed does.
_DRAWN = ("prompts", "seeds")


def _flat(entry: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Figures by their path; shares and summaries stay whole."""
    flat: dict[str, Any] = {}
    for name, value in entry.items():
        if not isinstance(value, dict) or _is_share(value) or _is_summary(value):
            flat[prefix + name] = value
        else:
            flat |= _flat(value, prefix if name == "scores" else f"{prefix}{name} ")
    return flat


def _is_share(value: Any) -> bool:
    return isinstance(value, dict) and {"share", "interval"} <= value.keys()


def _is_summary(value: Any) -> bool:
    return isinstance(value, dict) and {"count", "sum", "mean", "std"} <= value.keys()


def _robustness_column(name: str, values: Sequence[Any]) -> tuple[str, list[str]]:
    """A column's title, with its unit, and its cells."""
    title = name.replace("_", " ")
    if any(_is_share(value) for value in values):
        return f"{title}, %", [share_text(value) if _is_share(value) else plain(value) for value in values]
    if any(_is_summary(value) for value in values):
        kind = _kind(value for value in values if _is_summary(value))
        cells = [score_text(value, kind, len(value.get("values", []))) if _is_summary(value) else plain(value)
                 for value in values]  # fmt: skip
        return f"{name}, {_UNITS[kind]}", cells
    return title, [_robustness_cell(value) for value in values]


def _robustness_cell(value: Any) -> str:
    if isinstance(value, list):
        return _listed([plain(part) for part in value], f"robustness of {REPORT_NAME}")
    return significant(value) if isinstance(value, float) else plain(value)


# Training and configuration


def _training(history: Sequence[dict[str, float]]) -> list[Block]:
    if not history:
        return []
    names = [name for name in history[0] if name not in ("step", "learning_rate")]
    charts = []
    # The last entry always; so many others that a table of them can be read.
    stride = math.ceil(len(history) / _CURVE_LINES)
    kept = [entry for number, entry in enumerate(reversed(history)) if number % stride == 0][::-1]
    for name in names:
        title = _TITLES.get(name, name.replace("_", " "))
        points = [(entry["step"], entry[name]) for entry in history]
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
    return [Paragraph(text), Charts(charts)]


def _configuration(configuration: dict[str, Any]) -> list[Block]:
    if not configuration:
        return []
    defaults = {}
    for spec in dataclasses.fields(SelectiveAmnesiaConfig):
        factory = spec.default_factory
        defaults[spec.name] = factory() if factory is not dataclasses.MISSING else spec.default
    settings = {name: value for name, value in configuration.items() if name != "sa_diffusers_version"}
    changed = [[name, plain(value), plain(defaults.get(name))] for name, value in settings.items()
               if value != defaults.get(name)]  # fmt: skip
    rest = [[name, plain(value)] for name, value in settings.items() if value == defaults.get(name)]
    blocks: list[Block] = []
    if changed:
        blocks.append(Table("Settings of the erasure that differ from the defaults", ["setting", "value", "default"],
                            changed, frozenset({0, 1, 2})))  # fmt: skip
    if rest:
        blocks.append(Table("Settings at their defaults", ["setting", "value"], rest, frozenset({0, 1}), folded=True))
    return blocks


# How to reproduce


def _reproduce(report: dict[str, Any], configuration: dict[str, Any], trained: bool) -> list[Block]:
    blocks: list[Block] = []
    command = report.get("command")
    if command:
        blocks += [Paragraph("The command that made this report:"),
                   Command(requoted(command))]  # fmt: skip
    elif report.get("configuration"):
        blocks += [
            Paragraph(
                f"All settings of the run are in {CONFIG_NAME}, beside this report; the erasure and its evaluation run "
                "again with them. A model of one's own takes its own script in place of train_sa.py."
            ),
            Command(
                f"accelerate launch examples/train_sa.py --config {CONFIG_NAME} --output_dir reproduced"
            ),
        ]  # fmt: skip
    else:
        blocks.append(Paragraph(f"The command is not recorded in {REPORT_NAME}; what it depends on is below."))
    blocks.append(
        Table("What measured each figure", ["figure", "measured by", "how"], _origins(report, trained),
              frozenset({0, 1, 2}))
    )  # fmt: skip
    blocks += _evaluators(report)
    rows = []
    for number, row in enumerate(report["rows"]):
        place = f"rows[{number}] of {REPORT_NAME}"
        prompts = _listed([f"“{text}”" for text in row["prompts"]], place)
        rows.append([row["name"], row["role"], f"{row['images']:,}", prompts, seeds_text(row["seeds"], place)])
    caption = "Prompts and seeds of every row, the same before and after"
    blocks.append(Table(caption, ["row", "role", "images", "prompts", "seeds"], rows, frozenset({0, 1, 3, 4})))
    blocks += _attacks(report)
    sampling = [
        [name.replace("_", " "), plain(value)] for name, value in report["sampling"].items() if value is not None
    ]
    blocks.append(Table("How the images were drawn", ["setting", "value"], sampling, frozenset({0, 1})))
    versions = {"sa_diffusers": report.get("sa_diffusers_version"), **report.get("versions", {})}
    blocks.append(Table("Versions of the packages", ["package", "version"],
                        [[name, value] for name, value in versions.items() if value], frozenset({0, 1})))  # fmt: skip
    placed = _PLACED | {"sa_diffusers_version"}
    others = [[name.replace("_", " "), plain(value)] for name, value in report.items()
              if name not in placed and value is not None]  # fmt: skip
    if others:
        blocks.append(Table("Provenance", ["field", "value"], others, frozenset({0, 1})))
    if report.get("seconds"):
        times = [[name, f"{value:,.1f}"] for name, value in report["seconds"].items()]
        blocks.append(Table("Wall-clock time of each stage, in seconds", ["stage", "seconds"], times))
    return [block for block in blocks if not isinstance(block, Table) or block.rows]


def _attacks(report: dict[str, Any]) -> list[Block]:
    """Prompts and seeds of the attacks; models that were attacked alike share a line."""
    lines = {}
    for number, entry in enumerate(report.get("robustness") or []):
        if any(entry.get(name) for name in _DRAWN):
            place = f"robustness[{number}] of {REPORT_NAME}"
            prompts, seeds = (entry.get(name) or [] for name in _DRAWN)
            texts = _listed([f"“{text}”" for text in prompts], place) or MISSING
            key = (str(entry.get("attack", MISSING)), repr(prompts), repr(seeds))
            lines.setdefault(key, [key[0], texts, seeds_text(seeds, place) or MISSING])
    if not lines:
        return []
    caption = "Prompts and seeds of the attacks, the same against every model"
    return [Table(caption, ["attack", "prompts", "seeds"], list(lines.values()), frozenset({0, 1, 2}))]


def _origins(report: dict[str, Any], trained: bool) -> list[list[str]]:
    """For each kind of figure in the report, what measured it and how."""
    rows, classifier = report["rows"], report.get("classifier")
    origins = []
    if classifier and any("recognised" in row for row in rows):
        name, interval = classifier["name"], report.get("interval", INTERVAL)
        origins += [
            ["recognised, as its surrogate", name,
             f"share of images whose most probable label it is, no threshold; interval: {interval}"],
            ["probability, entropy", name, "means over the images, of the softmax at the label and of its entropy"],
        ]  # fmt: skip
    evaluators = report.get("evaluators") or []
    for name in _score_kinds(rows):
        owners = [entry for entry in evaluators if name in entry.get("columns", [])]
        owners = owners or [entry for entry in evaluators if "columns" not in entry]
        told = ", ".join(str(entry.get("name", MISSING)) for entry in owners) or MISSING
        origins.append([name, told, "one figure an image, in rows[...].scores of " + REPORT_NAME])
    for features, neighbours in dict.fromkeys(
        (entry["features"], entry.get("neighbours")) for entry in report.get("quality") or []
    ):
        how = f"torch-fidelity on its features; precision and recall with k = {plain(neighbours)}"
        origins.append(["Fréchet distance, precision, recall", features, how])
    if classifier and _frechet_of_classifier(report):
        origins.append(["Fréchet distance in the classifier's features", classifier["name"],
                        "means and covariances of the input of its last linear layer"])  # fmt: skip
    if report.get("robustness"):
        scorers = dict.fromkeys([classifier["name"]] if classifier else [])
        scorers |= dict.fromkeys(str(entry.get("name", MISSING)) for entry in evaluators)
        origins.append(
            ["robustness", ", ".join(scorers) or MISSING, f"figures of each attack in {REPORT_NAME}, robustness"]
        )
    for network in dict.fromkeys(network for row in rows for network in row.get("distance", {})):
        origins.append(["distance", network, "mean cosine distance of its features, before and after at the same seed"])
    origins.append(["change", "pixels", "root mean square difference of reduced images, before and after at the same "
                    "seed, over that of images before of different seeds"])  # fmt: skip
    origins.append(["black images", "pixels", "images that are black all over"])
    if trained:
        origins.append(["training curves", "the trainer", f"every entry of {HISTORY_NAME}"])
    return origins


def _evaluators(report: dict[str, Any]) -> list[Block]:
    named = [("classifier", report["classifier"])] if report.get("classifier") else []
    named += [("evaluators", entry) for entry in report.get("evaluators") or []]
    lines = []
    for place, entry in named:
        name = str(entry.get("name", MISSING))
        lines += [
            [name, key.replace("_", " "), _label_set(value, f"{place} of {REPORT_NAME}")]
            for key, value in entry.items()
            if key != "name" and value is not None
        ] or [[name, MISSING, MISSING]]
    if not lines:
        return []
    return [Table("The evaluators: version, weights, threshold, label set, as they name them",
                  ["evaluator", "field", "value"], lines, frozenset({0, 1, 2}))]  # fmt: skip


def _label_set(value: Any, place: str) -> str:
    """A value in words; of thousands of labels the first."""
    if isinstance(value, (list, tuple)) and len(value) > _LABELS:
        return _listed([plain(part) for part in value], place, _LABELS)
    return plain(value)
