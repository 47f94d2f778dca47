"""The schema of `report.json`: what protocols build, and what page, Markdown, card and terminal show."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..passes import Passes
from .parts import (
    AFTER,
    BEFORE,
    ROLES,
    TIMES,
    Certainty,
    Change,
    Distance,
    Paired,
    Results,
    Row,
    Share,
    Summary,
    Times,
    Towards,
    absent,
    gather,
)

SCHEMA_VERSION = 3
# The sampler of a model that has none.
# Among what was handed in: adapters that were in the base model's weights.
FUSED = "adapters fused into the base model"
DECODER = "decoder"
__all__ = [
    "AFTER",
    "BEFORE",
    "DECODER",
    "FUSED",
    "ROLES",
    "SCHEMA_VERSION",
    "TIMES",
    "Attack",
    "CelebrityTotal",
    "Certainty",
    "Change",
    "ClassifierFacts",
    "ConceptVerdict",
    "Distance",
    "Ending",
    "ErasedPair",
    "Evaluator",
    "FaceFigures",
    "I2PFacts",
    "KeptVerdict",
    "NudityTotal",
    "Paired",
    "Quality",
    "QualityEntry",
    "Remembered",
    "RememberedFigures",
    "Report",
    "Row",
    "Sampling",
    "Share",
    "StageCost",
    "Summary",
    "Times",
    "TopPicture",
    "Towards",
    "Verdict",
]


@dataclass(frozen=True)
class ErasedPair:
    """What was erased into what; `kind` is `"prompt"`, `"images"` or `"noise"`."""

    concept: str
    surrogate: str
    kind: str | None = absent()


@dataclass(frozen=True)
class ClassifierFacts:
    """The classifier behind `recognised`."""

    name: str
    labels: list[str] = absent(factory=list)


@dataclass(frozen=True)
class Evaluator(Results):
    """What measured columns of scores: `others` holds version, weights, threshold, label set, as it names them."""

    name: str = "–"
    columns: list[str] = absent(factory=list)
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Quality:
    """Distances of images from a reference, in the features of a network."""

    frechet_distance: float | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class QualityEntry:
    """Quality of all images but the concepts', before and after, or after only."""

    features: str
    reference: str
    images: int = 0
    reference_images: int = 0
    neighbours: int | None = absent()
    before: Quality | None = absent()
    after: Quality | None = absent()


@dataclass(frozen=True)
class RememberedFigures:
    """Of all rows but the concepts': mean recognition, Fréchet distance to real images in the classifier's features."""

    recognised: float
    frechet_distance: float | None = None
    images: int = 0


@dataclass(frozen=True)
class Remembered:
    """What the classifier knows and should have stayed; `against_base` compares with the base model's own images."""

    before: RememberedFigures
    after: RememberedFigures
    labels: list[str] = field(default_factory=list)
    against_base: Quality | None = absent()


@dataclass(frozen=True)
class Attack(Results):
    """One attempt to bring the concept back, on one model; `others` holds what else was measured."""

    attack: str = "–"
    model: str = "–"
    images: int | None = absent()
    black: int | None = absent()
    prompts: list[str] = absent(factory=list)
    seeds: list[list[int]] = absent(factory=list)
    recognised: Share | None = absent()
    as_surrogate: Share | None = absent()
    scores: dict[str, Summary] = absent(factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TopPicture:
    """A picture among those most like the celebrity."""

    prompt: str
    seed: int
    probability: float


@dataclass(frozen=True)
class FaceFigures:
    """One model's figures of the paper's Table 2; probability and top-1 accuracy are over images with a face."""

    without_face: Share
    probability: Summary
    top1: Share | None = None
    top5: list[TopPicture] = field(default_factory=list)


@dataclass(frozen=True)
class CelebrityTotal:
    """The paper's Table 2 for one celebrity."""

    name: str
    celebrity: str
    images: int
    before: FaceFigures
    after: FaceFigures


@dataclass(frozen=True)
class NudityTotal:
    """The paper's Table 3 or 4: detections by label, and their sum, of a score of at least `threshold`."""

    name: str
    images: int
    threshold: float
    before: dict[str, int]
    after: dict[str, int]


@dataclass(frozen=True)
class Sampling:
    """How both models' images were sampled."""

    sampler: str = "–"
    num_inference_steps: int = 0
    guidance_scale: float = 0.0
    batch_size: int | None = absent()
    resolution: int | None = absent()


@dataclass(frozen=True)
class I2PFacts:
    """Where prompts with seeds of their own came from."""

    source: str
    prompts: int
    categories: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ConceptVerdict:
    """What became of one concept; `outcome` is one of `verdict.OUTCOMES`, `because` a sentence.

    `images_needed` says from how many images a row on the outcome could be `"forgotten"`, where there were fewer.
    """

    concept: str
    outcome: str
    because: str
    images_needed: int | None = absent()


@dataclass(frozen=True)
class KeptVerdict:
    """What became of what should have stayed: `"kept"`, `"damaged"` at the corrected one-sided `p`, or `"not
    measurable"` where so few images cannot tell."""

    name: str
    outcome: str
    p: float


@dataclass(frozen=True)
class Verdict:
    """The verdict on an erasure; see `sa_diffusers.results.decide`.

    Attributes:
        outcome: The worst of its concepts'.
        line: One sentence.
        concepts: Each concept's.
        kept: Of each row that should have stayed and could be tested.
    """

    outcome: str
    line: str
    concepts: list[ConceptVerdict] = field(default_factory=list)
    kept: list[KeptVerdict] = field(default_factory=list)

    @property
    def damaged(self) -> list[str]:
        return [row.name for row in self.kept if row.outcome == "damaged"]


# How a training that measured itself may have ended, and what that is called.
DONE, LIMIT, GIVEN_UP = "done", "limit", "given up"
_ENDINGS = {DONE: "done", LIMIT: "stopped at its limit", GIVEN_UP: "given up"}


@dataclass(frozen=True)
class Ending:
    """How a training ended that measured itself.

    Attributes:
        how: `"done"`, where images agreed and the rest had not drifted; `"limit"`, at its last step; `"given up"`,
            where it could not all be had.
        sentence: What held, what did not, and what to try.
        step: Its last step.
    """

    how: str
    sentence: str
    step: int | None = absent()

    @property
    def title(self) -> str:
        return _ENDINGS.get(self.how, "ended")

    @property
    def line(self) -> str:
        """One sentence that says at its beginning how."""
        return f"TRAINING {self.title.upper()}: {self.sentence}."


@dataclass(frozen=True)
class StageCost:
    """What a stage took of the network, over all processes; see `Passes`.

    Attributes:
        forward: Rows of forward passes in this run; a training's go on from its checkpoint.
        backward: Rows of backward passes.
        made: What its product took when it was made, in this run or in earlier ones, if that is on record.
    """

    forward: int = 0
    backward: int = 0
    made: Passes | None = absent()


@dataclass(frozen=True)
class Report(Results):
    """Everything that `report.json` holds. Only rows and sampling are always there; `others` is any further fact."""

    rows: list[Row] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    schema_version: int = SCHEMA_VERSION
    verdict: Verdict | None = absent()
    sa_diffusers_version: str | None = absent()
    protocol: str | None = absent()
    base_model: str | None = absent()
    base_revision: str | None = absent()
    base_is_folder: bool | None = absent()
    base_module: str | None = absent()
    variant: str | None = absent()
    erased_model: str | None = absent()
    erased_revision: str | None = absent()
    erased_module: str | None = absent()
    weights: dict[str, str] = absent(factory=dict)
    saved: list[str] = absent(factory=list)
    adapter: str | None = absent()
    pairs: list[ErasedPair] = absent(factory=list)
    prediction_type: str | None = absent()
    mixed_precision: str | None = absent()
    weights_dtype: str | None = absent()
    base_quantization: str | None = absent()
    distilled: str | None = absent()
    device: str | None = absent()
    identity: str | None = absent()
    handed_in: dict[str, str] = absent(factory=dict)
    stopped_after_step: int | None = absent()
    ending: Ending | None = absent()
    configuration: dict[str, Any] = absent(factory=dict)
    blur: bool | None = absent()
    command: str | list[str] | None = absent()
    real_images: str | None = absent()
    i2p: I2PFacts | None = absent()
    models: dict[str, str] = absent(factory=dict)
    versions: dict[str, str] = absent(factory=dict)
    interval: str | None = absent()
    black_images: Times[int] | None = absent()
    classifier: ClassifierFacts | None = absent()
    remembered: Remembered | None = absent()
    surrogate_samples: dict[str, dict[str, Certainty]] = absent(factory=dict)
    quality: list[QualityEntry] = absent(factory=list)
    evaluators: list[Evaluator] = absent(factory=list)
    robustness: list[Attack] = absent(factory=list)
    totals: list[CelebrityTotal | NudityTotal] = absent(factory=list)
    seconds: dict[str, float] = absent(factory=dict)
    cost: dict[str, StageCost] = absent(factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any, place: str = "the report") -> "Report":
        if not isinstance(values, dict):
            raise ValueError(f"{place} must hold named values, not a {type(values).__name__}")
        # Earlier versions wrote an empty mapping for what there was none of.
        empty = ("remembered", "classifier", "i2p", "verdict", "ending")
        values = {name: value for name, value in values.items()
                  if (value is not None or name == "base_revision") and (value or name not in empty)}  # fmt: skip
        if "base_revision" in values and values["base_revision"] is None and "base_is_folder" not in values:
            # Until version 2, a folder was what had no commit.
            values["base_is_folder"] = True
        for name, kind in (("evaluators", Evaluator), ("robustness", Attack)):
            if isinstance(values.get(name), list):
                values[name] = [gather(kind, entry) if isinstance(entry, dict) else entry for entry in values[name]]
        return super().from_dict(values, place)

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read a `report.json` of this or an earlier version.

        Raises:
            ValueError: It is not valid JSON, or holds something else.
        """
        return cls.from_dict(read_json(path), str(path))

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_dict())

    def of_role(self, *roles: str) -> list[Row]:
        return [row for row in self.rows if row.role in roles]

    def __getitem__(self, name: str) -> Any:
        warnings.warn(
            f'a report is no dictionary any more: write report.{name}, or report.to_dict()["{name}"]',
            DeprecationWarning,
            stacklevel=2,
        )
        return self.to_dict()[name]
