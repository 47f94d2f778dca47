"""The parts that a report is made of: figures before and after, shares with intervals, rows.

A field marked as absent by default is left out of the JSON where it has no value; every other field is always there.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dacite import Config, DaciteError, from_dict

from .statistics import wilson_interval

BEFORE, AFTER = TIMES = ("before", "after")
ROLES = ("concept", "surrogate", "neighbour", "remembered")
Value = TypeVar("Value")
Kind = TypeVar("Kind", bound="Results")


def absent(default: Any = None, factory: Any = None) -> Any:
    """A field that the JSON leaves out where it has no value."""
    if factory is not None:
        return field(default_factory=factory, metadata={"absent": True})
    return field(default=default, metadata={"absent": True})


class Results:
    """A part of a report that is written as JSON and read again."""

    @classmethod
    def from_dict(cls: type[Kind], values: Any, place: str = "the report") -> Kind:
        """Build it from what `to_dict` gave, now or in an earlier version.

        Raises:
            ValueError: A value is of another kind than the schema has there; the field is named.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{place} must hold named values, not a {type(values).__name__}")
        try:
            return from_dict(cls, gather(cls, values), Config(cast=[tuple]))
        except DaciteError as error:
            told = f"{place} holds other values than a run writes ({error}): restore it or remove it"
            raise ValueError(told) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _plain(self)


def gather(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values whose names a class does not have, under the name of its field for them, if it has one."""
    known = {spec.name: spec for spec in dataclasses.fields(kind)}
    if "others" not in known or "others" in values:
        return values
    own = {name: value for name, value in values.items() if name in known}
    own["others"] = {name: value for name, value in values.items() if name not in known}
    return own


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        written: dict[str, Any] = {}
        for spec in dataclasses.fields(value):
            part = getattr(value, spec.name)
            if spec.metadata.get("absent") and (part is None or (isinstance(part, (list, dict, tuple)) and not part)):
                continue
            if spec.name == "others":
                written |= _plain(part)
            else:
                written[spec.name] = _plain(part)
        return written
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


@dataclass(frozen=True)
class Times(Generic[Value]):
    """A figure of the base model's images and of the erased model's, from the same prompts and seeds."""

    before: Value
    after: Value

    def __getitem__(self, time: str) -> Value:
        return getattr(self, time)

    def __iter__(self) -> Iterator[Value]:
        return iter((self.before, self.after))


@dataclass(frozen=True)
class Share:
    """A share of images in [0, 1], with its 95 % Wilson interval."""

    share: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, hits: int, images: int) -> "Share":
        """The share of `hits` among `images`, at least one."""
        return cls(hits / images, wilson_interval(hits, images))


@dataclass(frozen=True)
class Summary:
    """One figure for each image, summed up.

    Attributes:
        count: How many images have one.
        sum: Over those.
        mean: Over those; None if there are none.
        std: Standard deviation with n - 1; None for fewer than two.
        values: Each of them, None for an image without one.
    """

    count: int = 0
    sum: float = 0.0
    mean: float | None = None
    std: float | None = None
    values: list[float | None] = absent(factory=list)

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Summary":
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else None
        spread = None
        if mean is not None and len(known) > 1:
            spread = math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1))
        rounded = [None if value is None else round(value, 6) for value in values]
        return cls(len(known), sum(known), mean, spread, rounded)

    @property
    def kind(self) -> str | None:
        """`"share"` of yes and no, `"count"`, `"mean"` of anything else, None of nothing."""
        values = {value for value in self.values if value is not None}
        if not values:
            return None
        if values <= {0, 1}:
            return "share"
        return "count" if all(value >= 0 and value == int(value) for value in values) else "mean"

    def as_share(self) -> Share | None:
        """Of a figure that is yes or no; None if no image has one."""
        return Share.of(round(self.sum), self.count) if self.count else None


@dataclass(frozen=True)
class Certainty:
    """What a classifier says of images (paper, Table 1).

    Attributes:
        probability: Its mean for a label.
        entropy: The mean of its answer, in nats.
        recognised: The share of images whose most probable label it is.
    """

    probability: float
    entropy: float
    recognised: Share | None = absent()


@dataclass(frozen=True)
class Change:
    """How far pictures before and after are apart at the same seed, as root mean square over pixels in [0, 1].

    Attributes:
        rmse: Of the same seed.
        rmse_between_seeds: Of two seeds, before; None for one image.
        relative: The former over the latter.
    """

    rmse: float | None = None
    rmse_between_seeds: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class Distance:
    """Mean cosine distance of a network's features at the same seed, and of different seeds before."""

    same_seed: float
    between_seeds: float | None = None


@dataclass(frozen=True)
class Paired:
    """Images that were recognised at the same seed once: only before, or only after."""

    lost: int
    gained: int


@dataclass(frozen=True)
class Towards:
    """How far the erased model's images of a concept are from the base model's own, at the same seeds (as `Change`).

    Attributes:
        concept: From those of the concept.
        surrogate: From those of the surrogate.
        seeds: From those of the concept at other seeds.
    """

    concept: float
    surrogate: float | None = None
    seeds: float | None = None


@dataclass(frozen=True)
class Row(Results):
    """The images of one name.

    Attributes:
        name: What the row is called.
        role: One of `ROLES`: `"neighbour"` is what lies near the concept, `"remembered"` all else.
        images: How many before, and as many after.
        prompts: Those that were asked for, each once.
        seeds: Runs of seeds, each its first and last.
        concept: For a concept's row, which.
        phrasing: For a concept's row: `"trained"`, `"held-out"`, `"evoked"` (it is not named), `"attack"`.
        recognised: What the classifier calls as asked for.
        as_surrogate: For a concept's row, what it calls the surrogate.
        paired: How recognition changed seed by seed.
        probabilities: For a concept's row, the classifier's, image by image.
        scores: Column of a measure -> its figures.
        distance: Network -> distance in its features.
        towards: Without an evaluator, what the concept's images have become like.
        blank: How many images are of one colour all over, black or another.
    """

    name: str
    role: str = "remembered"
    images: int = 0
    prompts: list[str] = field(default_factory=list)
    seeds: list[list[int]] = field(default_factory=list)
    change: Change = field(default_factory=Change)
    black: Times[int] = field(default_factory=lambda: Times(0, 0))
    concept: str | None = absent()
    phrasing: str | None = absent()
    recognised: Times[Share] | None = absent()
    probability: Times[float] | None = absent()
    entropy: Times[float] | None = absent()
    probabilities: Times[list[float]] | None = absent()
    as_surrogate: Times[Share] | None = absent()
    paired: Paired | None = absent()
    distance: dict[str, Distance] = absent(factory=dict)
    scores: dict[str, Times[Summary]] = absent(factory=dict)
    towards: Towards | None = absent()
    blank: Times[int] | None = absent()
