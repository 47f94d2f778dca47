"""One reader for everything that holds prompts: text, tables, JSON, parquet, datasets."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..messages import did_you_mean, near_paths, shown, shown_error
from ..names import names_concept
from ..texts import read_text

FORMS = (
    "a text file with one a line, a CSV, TSV, JSON, JSON lines or parquet file as FILE or FILE:COLUMN, or a dataset "
    "as NAME:COLUMN or NAME:COLUMN:SPLIT"
)
_OBVIOUS = ("prompt", "prompts", "text", "texts", "caption", "captions")
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")


def split_source(source: str) -> tuple[str, str | None, str | None]:
    """File or dataset, column and split of `FILE`, `FILE:COLUMN`, `NAME:COLUMN` or `NAME:COLUMN:SPLIT`.

    A file that is there is never taken apart, and neither is a drive's letter (`C:\\prompts.txt`).
    """
    if _is_file(source):
        return source, None, None
    drive = source[:2] if re.match(r"[A-Za-z]:[\\/]", source) else ""
    name, *rest = source[len(drive) :].split(":")
    # A file's name may hold colons, its column's seldom does.
    for parts in range(len(rest), 0, -1):
        file = drive + ":".join([name, *rest[: parts - 1]])
        if _is_file(file):
            return file, ":".join(rest[parts - 1 :]), None
    column, split = (rest + [None, None])[:2]
    return drive + name, column, ":".join(rest[1:]) if split else None


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def read_texts(source: str | Path, place: str) -> list[str]:
    """The prompts of a file or a dataset, each in one line; what is empty or null does not count, lists are spread.

    Args:
        source: As `FORMS` says. Where no column is named, it is the only one called prompt, text or caption.
        place: What the source is called in an error, such as `replay_prompts="prompts.csv"`.

    Raises:
        ValueError: There is no such source, it is not text in UTF-8 or UTF-16, it has no such column, or the column
            holds something other than text.
    """
    name, column, split = split_source(str(source))
    try:
        path = Path(name).expanduser()
        is_file, is_folder, is_else = path.is_file(), path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError):
        raise ValueError(f"{place}: there is no such file: give {FORMS}") from None
    if is_file:
        rows = _rows_of_file(path, column, place)
    elif is_folder or (column and not _is_path(name)):
        rows = _dataset_column(name if not is_folder else str(path), column, split, place)
    else:
        what = "it is a device or a pipe" if is_else else f"there is no such file{near_paths(path)}"
        raise ValueError(f"{place}: {what}: give {FORMS}")
    texts = (" ".join(text.replace("\ufeff", "").split()) for text in rows)
    found = [text for text in texts if text]
    for text in found:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{place}: {shown(text)} holds half of a character, as of an emoji cut in two: remove it")
    return found


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or Path(name).suffix.lower() in (*_TABLES, ".txt")


def _rows_of_file(path: Path, column: str | None, place: str) -> Iterator[str]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet_column(path, column, place)
    text = read_text(path, place)
    if kind in (".csv", ".tsv"):
        columns = _csv_columns(text, "\t" if kind == ".tsv" else ",", place)
        chosen = choose_column(list(columns), column, place)
        return _texts(columns[chosen], chosen, place, numbers=False)
    if kind in (".json", ".jsonl", ".ndjson"):
        return _json_texts(_read_json(text, kind, place), column, place)
    if column is not None:
        raise ValueError(
            f'{place}: {shown(path.name)} is a text file, which has no column "{shown(column)}": leave it out, or give '
            f"a {', '.join(_TABLES)} file"
        )
    return iter(re.split(r"\r\n|\n|\r", text))


def choose_column(columns: Sequence[str], column: str | None, place: str) -> str:
    """The column that was asked for, or the obvious one.

    Raises:
        ValueError: There is no such column, or none or several that are obvious.
    """
    known = ", ".join(shown(name, 40) for name in columns[:20]) + (", ..." if len(columns) > 20 else "")
    if column is not None:
        if column in columns:
            return column
        raise ValueError(
            f'{place}: there is no column "{shown(column)}"; it has {known or "none"}{did_you_mean(column, columns)}'
        )
    obvious = [name for name in columns if name.strip().casefold() in _OBVIOUS]
    if len(obvious) != 1:
        reason = (
            "more than one column may hold the prompts" if obvious else "no column is called prompt, text or caption"
        )
        raise ValueError(f"{place}: {reason}; it has {known or 'none'}: name one behind a colon, as in FILE:COLUMN")
    return obvious[0]


def _texts(values: Any, column: str | None, place: str, numbers: bool = True) -> Iterator[str]:
    """The texts among values, lists spread; a table's cells are all text, so that numbers there are told by sight."""
    place = f'{place}, column "{shown(column)}"' if column else place
    values = list(values)
    if (
        not numbers
        and any(value.strip() for value in values)
        and all(_is_number(value) for value in values if value.strip())
    ):
        raise ValueError(f"{place} holds numbers: name a column of text")
    for row, value in enumerate(values):
        yield from _spread(value, f"{place}, row {row}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _spread(value: Any, place: str, depth: int = 0) -> Iterator[str]:
    if value is None or (isinstance(value, float) and value != value):
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)) and depth < 20:
        for item in value:
            yield from _spread(item, place, depth + 1)
    else:
        raise ValueError(f"{place}: {shown(value, 40)} is not text, but of type {type(value).__name__}: name a column "
                         "of text")  # fmt: skip


def _csv_columns(text: str, delimiter: str, place: str) -> dict[str, list[str]]:
    first = text.partition("\n")[0]
    if delimiter == "," and "," not in first and ";" in first:
        delimiter = ";"
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    except csv.Error as error:
        raise ValueError(f"{place} is not a valid table ({shown_error(error)}): put quotes around its cells") from error
    if not rows:
        return {}
    header = rows[0]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ValueError(f'{place}: the column "{shown(twice[0])}" stands twice in the first row, the header')
    for number, row in enumerate(rows[1:], 2):
        if len(row) > len(header):
            raise ValueError(
                f"{place}: row {number} has {len(row)} cells, the header {len(header)}: put quotes around cells that "
                "hold the delimiter"
            )
    return {name: [row[index] for row in rows[1:] if index < len(row)] for index, name in enumerate(header)}


def _read_json(text: str, kind: str, place: str) -> Any:
    if kind == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
                return _read_json(text, ".jsonl", place)
            raise ValueError(f"{place} is not valid JSON ({shown_error(error)})") from None
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}, line {number}, is not valid JSON ({shown_error(error)})") from None
    return values


def _json_texts(values: Any, column: str | None, place: str) -> Iterator[str]:
    """A list of texts, a list of objects, or an object of lists."""
    if isinstance(values, dict):
        chosen = choose_column([name for name in values if isinstance(name, str)], column, place)
        return _texts(values[chosen] if isinstance(values[chosen], list) else [values[chosen]], chosen, place)
    if not isinstance(values, list):
        raise ValueError(f"{place} holds neither a list nor columns: give a list of prompts or of objects")
    objects = [value for value in values if isinstance(value, dict)]
    if not objects:
        if column is not None:
            raise ValueError(f'{place} is a list without columns, so that none is called "{shown(column)}"')
        return _texts(values, None, place)
    if any(not isinstance(value, dict) and value is not None for value in values):
        raise ValueError(f"{place} holds objects and other things in one list: give one kind")
    columns = list(dict.fromkeys(name for value in objects for name in value))
    chosen = choose_column(columns, column, place)
    return _texts([value.get(chosen) for value in objects], chosen, place)


def _parquet_column(path: Path, column: str | None, place: str) -> Iterator[str]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        file = parquet.ParquetFile(path)
        chosen = choose_column(file.schema_arrow.names, column, place)
        return _texts(file.read([chosen]).column(0).to_pylist(), chosen, place)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{place}: {path} is not a readable parquet file ({shown_error(error)})") from error


def _dataset_column(name: str, column: str | None, split: str | None, place: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:  # each kind of source fails in ways of its own
        raise ValueError(
            f'{place}: the dataset "{shown(name)}" could not be loaded ({shown_error(error)}){near_paths(name)}'
        ) from error
    chosen = choose_column(list(dataset.column_names or []), column, place)
    return _texts(dataset[chosen], chosen, place)


def read_prompts(path: str | Path, concepts: Sequence[str] = (), stands_for: str | None = None) -> list[str]:
    """Prompts of a file or a dataset.

    Args:
        path: `FILE`, `FILE:COLUMN`, `NAME:COLUMN` or `NAME:COLUMN:SPLIT`.
        concepts: What no prompt may name.
        stands_for: What `{}` stands for in the prompts, if for anything; it is told where the file is empty.

    Raises:
        ValueError: There is no such file, it cannot be read as text, it is empty, or a prompt names a concept.
    """
    name = shown(str(path), 200)
    file, column, _ = split_source(str(path))
    if column is None and not is_there(file):
        raise ValueError(
            f"the file of prompts {name} does not exist and could not be read{near_paths(file)}: give {FORMS}"
        )
    try:
        prompts = read_texts(path, name)
    except ValueError as error:
        raise ValueError(f"the file of prompts could not be read: {error}") from error
    if not prompts:
        form = f", with {{}} for the {stands_for}" if stands_for else ""
        raise ValueError(f"the file of prompts {name} is empty: give one prompt a line{form}")
    for prompt in prompts:
        for concept in concepts:
            if names_concept(prompt, concept):
                raise ValueError(f'{name}: "{shown(prompt)}" names "{shown(concept)}", which these prompts must not')
    return prompts


def is_there(name: str) -> bool:
    """Whether a text is the path of something."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
