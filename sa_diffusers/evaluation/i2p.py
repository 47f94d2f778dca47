"""Prompts that come with seeds: those that nudity is looked for with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hub import one_line

I2P_NAME = "AIML-TUDA/i2p"


@dataclass(frozen=True)
class PromptSet:
    """Prompts that come with seeds.

    Attributes:
        name: What the set is called in tables.
        source: Where it was read from.
        prompts: One for each image.
        seeds: One for each image.
        categories: Those that were chosen; empty where all were.
    """

    name: str
    source: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    categories: tuple[str, ...] = ()


def read_i2p(source: str | Path = I2P_NAME, categories: Sequence[str] = ()) -> PromptSet:
    """The Inappropriate Image Prompts (Schramowski et al., 2023), each with the seed that it comes with.

    Args:
        source: A name on the Hub, or a CSV or parquet file with columns `prompt` and `sd_seed`.
        categories: Keep only prompts of any of these ("sexual", say). A prompt may be of several; the column
            `categories` holds them with commas between.

    Raises:
        ValueError: There is no such source, it lacks a column, a seed is no whole number from 0 to 2^64 - 1, no prompt
            is of a category, or there are no prompts.
    """
    data = _load(str(source))
    needed = ["prompt", "sd_seed", *(["categories"] if categories else [])]
    missing = [name for name in needed if name not in data.column_names]
    if missing:
        raise ValueError(
            f"{source} has no column {' and no column '.join(missing)}; it has {', '.join(data.column_names)}"
        )
    rows = range(len(data))
    if categories:
        kinds = [{kind.strip() for kind in _text(entry).split(",")} for entry in data["categories"]]
        known = set().union(*kinds) - {""}
        unknown = [kind for kind in categories if kind not in known]
        if unknown:
            raise ValueError(
                f"no prompt of {source} is of the category {', '.join(unknown)}; there are {', '.join(sorted(known))}"
            )
        rows = [row for row in rows if kinds[row] & set(categories)]
    prompts, seeds = list(data["prompt"]), list(data["sd_seed"])
    if not rows:
        raise ValueError(f"{source} holds no prompts")
    return PromptSet(
        "I2P",
        str(source),
        tuple(_text(prompts[row]) for row in rows),
        tuple(_seed(seeds[row], f"{source}, row {row}") for row in rows),
        tuple(categories),
    )


def _text(value: Any) -> str:
    """A cell as text; a column of numbers is read as numbers, and a gap in it as none."""
    return "" if value is None or value != value else str(value)


def _seed(value: Any, place: str) -> int:
    # A column with gaps is read as decimal numbers.
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole or not 0 <= value < 2**64:
        raise ValueError(f"{place}: sd_seed={value} is not a whole number from 0 to 2^64 - 1")
    return int(value)


def _load(source: str) -> Any:
    from datasets import load_dataset

    path = Path(source).expanduser()
    kinds = {".csv": "csv", ".parquet": "parquet"}
    if path.suffix in kinds:
        if not path.is_file():
            raise ValueError(f"the file of prompts {path} does not exist")
        try:
            return load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        except Exception as error:
            raise ValueError(f"{path} could not be read as a {path.suffix[1:]} file ({one_line(error)})") from error
    try:
        return load_dataset(source, split="train")
    except Exception as error:
        raise ValueError(
            f'no dataset "{source}" could be loaded ({one_line(error)}): give a CSV or parquet file with columns '
            f"prompt and sd_seed, or a name on the Hub such as {I2P_NAME}"
        ) from error
