"""A saved pipeline against its base: what changed, with the figures' provenance."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn.functional import cosine_similarity

from ..configuration import GRID_NAME, REPORT_NAME
from ..data.concepts import ErasurePair
from ..data.generation import SampleGenerator, count_black
from ..data.phrasings import fill_template
from ..families import Objective, SamplingSettings
from ..files import write_json
from ..hub import visible
from ..processes import check_stop
from .classification import Classification, ImageClassifier
from .memory import in_batches
from .pictures import before_after_grid, blurred
from .quality import NEIGHBOURS, FeatureNetwork, image_quality
from .report import MARKDOWN_NAME, PAGE_NAME, write_report
from .statistics import frechet_distance, moments, wilson_interval

SCHEMA_VERSION = 2
GRID_COLUMNS = 6
CHANGE_PIXELS = 64
_CHUNK = 128
_STAGING = ".report-writing"
_PACKAGES = ("torch", "diffusers", "transformers")


class Measure(Protocol):
    """Scores pictures one by one."""

    def provenance(self) -> dict[str, Any]:
        """What a figure depends on: the evaluator's `"name"`, its version or weights, threshold, label set."""
        ...

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float | None]]:
        """Columns of figures, each with one for each picture; None where a picture has none (no face, say)."""
        ...


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that are evaluated together, one row of the table.

    Attributes:
        name: What the row is called.
        role: `"concept"`, `"surrogate"`, `"neighbour"` (what lies near the concept) or `"remembered"`.
        prompts: One for each image.
        seeds: One for each image, the same before and after.
        label: The classifier's label that the prompts ask for, if it has one.
        surrogate_label: For a concept, its surrogate's label.
    """

    name: str
    role: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    label: int | None = None
    surrogate_label: int | None = None


@dataclass
class Drawn:
    """What is known of one model's images for one group.

    Attributes:
        shown: The first pictures.
        black: How many pictures are black all over.
        small: `[n, h, w, 3]` in [0, 1], at most `CHANGE_PIXELS` wide, for the change between before and after.
        scores: What the classifier says.
        measured: Column -> a figure for each picture.
        features: Network -> `[n, d]`.
    """

    shown: list[Image.Image]
    black: int
    small: np.ndarray
    scores: Classification | None = None
    measured: dict[str, list[float | None]] = field(default_factory=dict)
    features: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Comparison:
    """The outcome: rows of a table, and everything that they depend on."""

    report: dict[str, Any]
    grid: list[tuple[str, list[Image.Image], list[Image.Image]]] = field(default_factory=list)

    def save(self, folder: str | Path) -> None:
        """Write `before_after.png`, `report.md`, `report.html` and `report.json` into a folder that is there.

        Where the report's `blur` is true, every picture in them is blurred. `report.json` arrives last: where it is,
        the others are of the same comparison.

        Raises:
            OSError: The disk is full or the folder cannot be written; what was there before is unchanged.
        """
        folder = Path(folder)
        grid = self.grid
        if self.report.get("blur"):
            grid = [(name, *([blurred(picture) for picture in side] for side in sides)) for name, *sides in grid]
        staging = folder / _STAGING
        try:
            # A run that was killed here may have left one.
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            with (staging / GRID_NAME).open("wb") as file:
                before_after_grid(grid, file)
                file.flush()
                os.fsync(file.fileno())
            write_report(self.report, grid, staging, folder)
            write_json(staging / REPORT_NAME, self.report)
            # From here on the pages may be new: no earlier figures may vouch for them.
            (folder / REPORT_NAME).unlink(missing_ok=True)
            for name in (GRID_NAME, MARKDOWN_NAME, PAGE_NAME, REPORT_NAME):
                (staging / name).replace(folder / name)
        except OSError as error:
            raise OSError(
                f"the report could not be written into {folder} ({error}): free some space on that disk or choose "
                "another folder, and run the same command again; the images that were sampled are kept"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def table(self) -> str:
        """The rows as aligned text."""
        return format_table(self.report)


def label_groups(
    labels: Sequence[str],
    pairs: Sequence[ErasurePair],
    label_of: Any,
    concept_templates: Sequence[str],
    eval_templates: Sequence[str],
    count: int,
    first_seed: int,
) -> list[PromptGroup]:
    """A group for each of a classifier's labels, and one for each concept in the phrasings it was trained on.

    Args:
        labels: The classifier's.
        pairs: What was erased.
        label_of: Text -> index of a label, or None.
        concept_templates: Phrasings of the training.
        eval_templates: Phrasings of the evaluation.
        count: Images for each group.
        first_seed: The first group's; each group has seeds of its own.
    """
    concepts = {label_of(pair.concept): pair for pair in pairs}
    surrogates = {label_of(pair.surrogate.value) for pair in pairs}
    groups = []
    for index, label in enumerate(labels):
        pair = concepts.get(index)
        role = "concept" if pair else "surrogate" if index in surrogates else "remembered"
        groups.append(
            PromptGroup(
                name=label,
                role=role,
                prompts=_spread(eval_templates, label, count),
                seeds=_seeds(first_seed, index, count),
                label=index,
                surrogate_label=label_of(pair.surrogate.value) if pair else None,
            )
        )
    for number, pair in enumerate(pairs):
        if list(concept_templates) == list(eval_templates):
            break
        groups.append(
            PromptGroup(
                name=f"{pair.concept} (trained phrasings)",
                role="concept",
                prompts=_spread(concept_templates, pair.concept, count),
                seeds=_seeds(first_seed, len(labels) + number, count),
                label=label_of(pair.concept),
                surrogate_label=label_of(pair.surrogate.value),
            )
        )
    return groups


def prompt_groups(
    pairs: Sequence[ErasurePair], remembered: Sequence[str], templates: Sequence[str], count: int, first_seed: int
) -> list[PromptGroup]:
    """Groups where there is no classifier: concepts, surrogates, and remembered prompts, one row each."""
    entries: list[tuple[str, str, tuple[str, ...]]] = []
    for pair in pairs:
        entries.append((pair.concept, "concept", _spread(templates, pair.concept, count)))
    for value in dict.fromkeys(pair.surrogate.value for pair in pairs if pair.surrogate.kind == "prompt"):
        entries.append((value, "surrogate", _spread(templates, value, count)))
    entries += [(prompt, "remembered", (prompt,) * count) for prompt in remembered]
    return [
        PromptGroup(name, role, prompts, _seeds(first_seed, number, count))
        for number, (name, role, prompts) in enumerate(entries)
    ]


def _seeds(first_seed: int, number: int, count: int) -> tuple[int, ...]:
    """Each group has seeds of its own."""
    return tuple(range(first_seed + number * count, first_seed + (number + 1) * count))


def _spread(templates: Sequence[str], concept: str, count: int) -> tuple[str, ...]:
    return tuple(fill_template(templates[number % len(templates)], concept) for number in range(count))


def draw_groups(
    objective: Objective,
    groups: Sequence[PromptGroup],
    settings: SamplingSettings,
    artifacts_dir: str | Path,
    accelerator: Accelerator,
    classifier: ImageClassifier | None = None,
    measures: Sequence[Measure] = (),
    networks: Sequence[FeatureNetwork] = (),
) -> list[Drawn]:
    """Sample every group's images from one model, and score them; see `sample_groups` and `score_groups`.

    Every process scores. With several, sample first and let one of them score, so that none waits for it.

    Args:
        objective: The model.
        groups: What to draw.
        settings: Sampler, steps, guidance.
        artifacts_dir: Where samples are kept.
        accelerator: The processes that share the drawing.
        classifier: Scores the images if given.
        measures: Score them too.
        networks: Give their features.
    """
    kept = sample_groups(objective, groups, settings, artifacts_dir, accelerator)
    return score_groups(objective, groups, kept, classifier, measures, networks)


def sample_groups(
    objective: Objective,
    groups: Sequence[PromptGroup],
    settings: SamplingSettings,
    artifacts_dir: str | Path,
    accelerator: Accelerator,
) -> list[list[torch.Tensor]]:
    """Sample every group's images from one model: the part in which processes wait for each other.

    Samples go to disk in parts, and what was drawn before is read: a run that was killed goes on where it stopped.

    Returns:
        For each group its samples, set by set, in the main process: another run may delete what is on disk.
    """
    generator = SampleGenerator(objective, artifacts_dir, accelerator)
    kept = []
    for group in groups:
        parts = []
        for part in _parts(group):
            prompts, seeds = group.prompts[part], group.seeds[part]
            # No clear pictures on disk: they may be of what nobody wants to see.
            samples = generator.drawn("evaluation", prompts, prompts, seeds, settings, preview=False).samples
            parts.append(samples if accelerator.is_main_process else samples[:0])
        kept.append(parts)
    return kept


def _parts(group: PromptGroup) -> list[slice]:
    """A set of samples each, whatever the batch size is: that may be another when a killed run goes on."""
    return [slice(start, start + _CHUNK) for start in range(0, len(group.prompts), _CHUNK)]


def score_groups(
    objective: Objective,
    groups: Sequence[PromptGroup],
    kept: Sequence[Sequence[torch.Tensor]],
    classifier: ImageClassifier | None = None,
    measures: Sequence[Measure] = (),
    networks: Sequence[FeatureNetwork] = (),
) -> list[Drawn]:
    """Decode and score what `sample_groups` has kept; no process waits for another.

    Args:
        objective: The model that drew the samples.
        groups: What was drawn.
        kept: For each group its samples, as `sample_groups` gives them.
        classifier: Scores the images if given.
        measures: Score them too.
        networks: Give their features.
    """
    drawn = []
    for group, sets in zip(groups, kept, strict=True):
        scored = []
        for part, samples in zip(_parts(group), sets, strict=True):
            check_stop()
            decoded = in_batches(samples, len(samples), lambda batch: objective.decode(batch.to(objective.device)))
            pictures = [picture for batch in decoded for picture in batch]
            scored.append(look_at(pictures, group.prompts[part], classifier, measures, networks))
        drawn.append(_joined(scored))
    return drawn


def look_at(
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    classifier: ImageClassifier | None = None,
    measures: Sequence[Measure] = (),
    networks: Sequence[FeatureNetwork] = (),
) -> Drawn:
    """Score pictures, and keep of them what a comparison needs."""
    measured: dict[str, list[float | None]] = {}
    for measure in measures:
        measured |= measure(pictures, prompts)
    scores = classifier(pictures) if classifier else None
    features = {classifier.name: scores.features} if classifier and scores else {}
    for network in networks:
        if network.name not in features:
            features[network.name] = network(pictures)
    small = np.stack([_small(picture) for picture in pictures])
    return Drawn(list(pictures[:GRID_COLUMNS]), count_black(pictures), small, scores, measured, features)


def _small(picture: Image.Image) -> np.ndarray:
    picture = picture.convert("RGB")
    if max(picture.size) > CHANGE_PIXELS:
        picture.thumbnail((CHANGE_PIXELS, CHANGE_PIXELS), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32) / 255


def _joined(parts: Sequence[Drawn]) -> Drawn:
    first = parts[0]
    scores = None
    if first.scores is not None:
        scores = Classification(*(torch.cat([getattr(part.scores, name) for part in parts])
                                  for name in ("probabilities", "features")))  # fmt: skip
    return Drawn(
        [picture for part in parts for picture in part.shown][:GRID_COLUMNS],
        sum(part.black for part in parts),
        np.concatenate([part.small for part in parts]),
        scores,
        {name: [value for part in parts for value in part.measured[name]] for name in first.measured},
        {name: torch.cat([part.features[name] for part in parts]) for name in first.features},
    )


def compare(
    groups: Sequence[PromptGroup],
    before: Sequence[Drawn],
    after: Sequence[Drawn],
    settings: SamplingSettings,
    classifier: ImageClassifier | None = None,
    provenance: dict[str, Any] | None = None,
    surrogates: Mapping[int, Mapping[str, Classification]] | None = None,
) -> Comparison:
    """Compare the same groups' images before and after.

    Args:
        groups: What was drawn.
        before: The base model's images, one entry for each group.
        after: The erased model's, from the same seeds.
        settings: Sampler and guidance that drew both.
        classifier: What scored them, if anything did.
        provenance: Further fields of the report (base model, configuration, timings).
        surrogates: For each concept, by its label, what the classifier says of its surrogate's own `"samples"` and,
            where a model shows means, of their `"mean"`.
    """
    rows = [_row(group, *images) for group, *images in zip(groups, before, after, strict=True)]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **(provenance or {}),
        "sampling": settings.to_dict(),
        "versions": {name: version(name) for name in _PACKAGES},
        "interval": "Wilson, 95 %",
        "rows": rows,
        "black_images": {"before": sum(image.black for image in before), "after": sum(image.black for image in after)},
    }
    if classifier is not None:
        report["classifier"] = {"name": classifier.name, "labels": classifier.labels}
        report["remembered"] = _remembered(groups, before, after, classifier)
        report["surrogate_samples"] = {
            group.name: {name: _certainty(seen, group.label) for name, seen in surrogates[group.label].items()}
            for group in groups
            if group.role == "concept" and surrogates and group.label in surrogates
        }
    grid = [(group.name, old.shown, new.shown) for group, old, new in zip(groups, before, after, strict=True)]
    return Comparison(report, grid)


def _row(group: PromptGroup, before: Drawn, after: Drawn) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": group.name,
        "role": group.role,
        "images": len(group.prompts),
        "prompts": list(dict.fromkeys(group.prompts)),
        "seeds": _ranges(group.seeds),
        "change": _change(before.small, after.small),
        "black": {"before": before.black, "after": after.black},
    }
    if before.scores is not None and after.scores is not None and group.label is not None:
        row["recognised"] = {
            "before": share_of(before.scores, group.label),
            "after": share_of(after.scores, group.label),
        }
        certainty = {"before": _certainty(before.scores, group.label), "after": _certainty(after.scores, group.label)}
        for name in ("probability", "entropy"):
            row[name] = {time: values[name] for time, values in certainty.items()}
        if group.role == "concept":
            # One by one, for a mean hides whether all images changed or half of them.
            row["probabilities"] = {
                time: [round(value, 6) for value in scores.probabilities[:, group.label].tolist()]
                for time, scores in (("before", before.scores), ("after", after.scores))
            }
        if group.surrogate_label is not None:
            row["as_surrogate"] = {
                "before": share_of(before.scores, group.surrogate_label),
                "after": share_of(after.scores, group.surrogate_label),
            }
    if before.features:
        row["distance"] = {name: _distance(before.features[name], after.features[name]) for name in before.features}
    if before.measured:
        row["scores"] = {name: {"before": summary(before.measured[name]), "after": summary(after.measured[name])}
                         for name in before.measured}  # fmt: skip
    return row


def _distance(before: torch.Tensor, after: torch.Tensor) -> dict[str, float | None]:
    """Mean cosine distance of features at the same seed, and of different seeds before."""
    return {
        "same_seed": float(1 - cosine_similarity(before, after).mean()),
        "between_seeds": float(1 - cosine_similarity(before, before.roll(1, 0)).mean()) if len(before) > 1 else None,
    }


def _ranges(seeds: Sequence[int]) -> list[list[int]]:
    """Seeds as runs of first and last."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return runs


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Figures of one column: how many pictures have one, their sum, mean and standard deviation, and each of them."""
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else None
    spread = None
    if mean is not None and len(known) > 1:
        spread = math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return {
        "count": len(known),
        "sum": sum(known),
        "mean": mean,
        "std": spread,
        "values": [None if value is None else round(value, 6) for value in values],
    }


def share_of(scores: Classification, label: int) -> dict[str, Any]:
    """The share of pictures that a classifier gives a label, with its 95 % interval."""
    hits = int((scores.probabilities.argmax(-1) == label).sum())
    total = len(scores.probabilities)
    return {"share": hits / total, "interval": list(wilson_interval(hits, total))}


def _certainty(scores: Classification, label: int) -> dict[str, float]:
    """Mean probability of a label and mean entropy in nats (paper, Table 1)."""
    probabilities = scores.probabilities.double()
    return {
        "probability": float(probabilities[:, label].mean()),
        "entropy": float(-torch.xlogy(probabilities, probabilities).sum(-1).mean()),
    }


def _change(before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
    """How far pictures of the same seed are apart, and how far those of different seeds are, before."""
    same = float(np.sqrt(((before - after) ** 2).mean()))
    other = float(np.sqrt(((before - np.roll(before, 1, axis=0)) ** 2).mean())) if len(before) > 1 else None
    return {"rmse": same, "rmse_between_seeds": other, "relative": same / other if other else None}


def _remembered(
    groups: Sequence[PromptGroup], before: Sequence[Drawn], after: Sequence[Drawn], classifier: ImageClassifier
) -> dict[str, Any]:
    """Of all labels but the concepts': mean recognition, Fréchet distance to real images, and how far the images are
    from the base model's own. Empty where the classifier knows none of them."""
    chosen = [number for number, group in enumerate(groups) if group.role != "concept" and group.label is not None]
    if not chosen:
        return {}
    labels = [groups[number].label for number in chosen]
    reference = classifier.reference_moments([label for label in labels if label is not None])
    result: dict[str, Any] = {"labels": [groups[number].name for number in chosen]}
    seen = {}
    for name, images in (("before", before), ("after", after)):
        scores = [images[number].scores for number in chosen]
        hits = [share_of(score, label)["share"] for score, label in zip(scores, labels, strict=True)]
        features = seen[name] = torch.cat([score.features for score in scores])
        result[name] = {
            "recognised": sum(hits) / len(hits),
            "frechet_distance": frechet_distance(moments(features), reference) if reference else None,
            "images": len(features),
        }
    if len(seen["after"]) > NEIGHBOURS:
        result["against_base"] = image_quality(seen["after"], seen["before"])
    return result


def format_table(report: dict[str, Any]) -> str:
    """A report's rows as aligned text."""
    scored = any("recognised" in row for row in report["rows"])
    if scored:
        header = ["prompted with", "recognised before", "recognised after", "as its surrogate", "change"]
    else:
        header = ["prompted with", "role", "images", "change", "black before/after"]
    lines = [header]
    for row in report["rows"]:
        relative = row["change"]["relative"]
        change = "-" if relative is None else f"{100 * relative:.0f} %"
        if scored:
            shares = [format_share(row.get("recognised", {}).get(time)) for time in ("before", "after")]
            lines.append([row["name"], *shares, format_share(row.get("as_surrogate", {}).get("after")), change])
        else:
            black = f"{row['black']['before']}/{row['black']['after']}"
            lines.append([row["name"], row["role"], str(row["images"]), change, black])
    text = aligned(lines)
    sampling = report["sampling"]
    text.append("")
    if scored:
        for row in report["rows"]:
            if row["role"] == "concept" and "entropy" in row:
                before, after = ((row["probability"][time], row["entropy"][time]) for time in ("before", "after"))
                line = (f'"{row["name"]}": probability {before[0]:.3f} before, {after[0]:.3f} after; entropy '
                        f"{before[1]:.2f} before, {after[1]:.2f} after")  # fmt: skip
                own = report["surrogate_samples"].get(row["name"], {})
                for name, value in own.items():
                    subject = {"samples": "the surrogate's own samples", "mean": "their mean image"}[name]
                    line += f"; {subject}: {value['probability']:.3f} and {value['entropy']:.2f}"
                text.append(line)
    remembered = report.get("remembered")
    if remembered:
        old, new = remembered["before"], remembered["after"]
        text.append(
            f"All but the concept: recognised {100 * old['recognised']:.1f} % before, "
            f"{100 * new['recognised']:.1f} % after"
        )
        if old["frechet_distance"] is not None:
            text.append(
                f"Fréchet distance to real images, in the classifier's features: {old['frechet_distance']:.2f} before, "
                f"{new['frechet_distance']:.2f} after ({new['images']} images each)"
            )
        if "against_base" in remembered:
            values = remembered["against_base"]
            text.append(
                f"Against the base model's own images, in the classifier's features: Fréchet distance "
                f"{values['frechet_distance']:.2f}, precision {values['precision']:.2f}, recall {values['recall']:.2f}"
            )
    text.append(
        f"{report['rows'][0]['images']} images a row, the same seeds before and after; {sampling['sampler']}, "
        f"{sampling['num_inference_steps']} steps, guidance {sampling['guidance_scale']}"
        + ("; brackets: 95 % interval" if scored else "")
    )
    text.append("change: distance between before and after at the same seed; 100 % is that of two different seeds")
    return "\n".join(text)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells, the header first, as lines of text with a rule under the header."""
    lines = [[visible(cell) for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in ruled]


def format_scores(report: dict[str, Any]) -> str:
    """The mean of each scored column, row by row, before and after, as aligned text. Empty where nothing was scored."""
    rows = [row for row in report["rows"] if row.get("scores")]
    if not rows:
        return ""
    columns = list(rows[0]["scores"])
    lines = [["prompted with", *columns]]
    for row in rows:
        cells = []
        for column in columns:
            before, after = (row["scores"][column][time]["mean"] for time in ("before", "after"))
            cells.append(" -> ".join("none" if value is None else f"{value:.3g}" for value in (before, after)))
        lines.append([row["name"], *cells])
    return "\n".join(aligned(lines))


def format_share(share: dict[str, Any] | None) -> str:
    if share is None:
        return ""
    low, high = share["interval"]
    return f"{100 * share['share']:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
