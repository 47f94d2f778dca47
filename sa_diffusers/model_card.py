"""The model card of an erased pipeline: README.md, written from what its folder holds and from nothing else."""

import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration import CONFIG_NAME, FISHER_CONFIG_NAME, GRID_NAME, HISTORY_NAME, REPORT_NAME
from .files import finish_interrupted, read_json, write_text
from .hub import (
    CARD_MARKER,
    CARD_NAME,
    evaluation_reports,
    inherited_licence,
    is_own_card,
    markdown_code,
    markdown_fence,
    markdown_text,
    push_folder,
    requoted,
    shown_name,
    without_local_paths,
)
from .output_folder import OutputFolder

_md = markdown_text
PAPER = "https://arxiv.org/abs/2305.10120"
_INDEX_NAME = "model_index.json"
_SURROGATE_KINDS = {
    "prompt": "what the base model draws for that prompt",
    "images": "images from a folder",
    "noise": "uniform over pixel values",
}
_TAGS = ["selective-amnesia", "concept-erasure", "machine-unlearning"]
_SHOWN_SETTINGS = (
    "train_method", "target", "naive", "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "use_ema", "ema_decay", "ewc_weight",
    "replay_weight", "num_surrogate_images", "num_replay_images", "replay_prompts", "replay_unconditional_share",
    "condition_dropout", "snr_gamma", "noise_offset", "concept_templates", "sampler", "num_inference_steps",
    "guidance_scale", "surrogate_guidance_scale", "replay_guidance_scale", "resolution", "mixed_precision", "seed",
)  # fmt: skip
_SHOWN_FISHER = (
    "base_model", "revision", "train_method", "num_samples", "timesteps", "num_train_timesteps", "seed", "reduction",
    "prediction_type", "trained_module",
)  # fmt: skip
_PATH_SETTINGS = ("pretrained_model_name_or_path", "classifier", "reference_features", "fisher", "replay_prompts")
_METRIC_NAMES = {
    "probability": "mean probability of the label asked for",
    "entropy": "mean entropy in nats",
    "recognised": "share recognised as what was asked for",
    "as_surrogate": "share taken for the surrogate",
    "change": "distance from the base model's images, 1 is that of two seeds",
}
_CITATION = """@inproceedings{heng2023selective,
  title     = {Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models},
  author    = {Heng, Alvin and Soh, Harold},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}"""


@dataclass
class _Facts:
    """What a folder says of itself. Everything but the pipeline's index may be empty.

    Attributes:
        name: What the pipeline is loaded by.
        index: Of the pipeline.
        settings: Of the erasure.
        reports: Title -> report; the erasure's own has no title.
        history: Logged losses.
        fisher: What the Fisher information was computed from.
        has_grid: Whether there is a picture of before and after.
    """

    name: str
    index: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    fisher: dict[str, Any] = field(default_factory=dict)
    has_grid: bool = False

    @property
    def report(self) -> dict[str, Any]:
        """The erasure's own report."""
        return self.reports.get("", {})

    @property
    def base(self) -> str | None:
        return self.settings.get("pretrained_model_name_or_path") or self.report.get("base_model")

    @property
    def base_is_on_hub(self) -> bool:
        """A report knows the commit of what came from the Hub, and none of a folder."""
        if not self.base or shown_name(self.base) != self.base:
            return False
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.base, re.ASCII):
            return False
        return "base_revision" not in self.report or self.report["base_revision"] is not None

    @property
    def pipeline_class(self) -> str:
        name = self.index.get("_class_name", "DiffusionPipeline")
        return name[-1] if isinstance(name, list) else name

    @property
    def brings_code(self) -> bool:
        return isinstance(self.index.get("_class_name"), list)

    @property
    def takes_text(self) -> bool:
        return "tokenizer" in self.index

    @property
    def pipeline_tag(self) -> str:
        # The Hub knows no task for models of classes.
        return "text-to-image" if self.takes_text else "unconditional-image-generation"

    @property
    def pairs(self) -> list[dict[str, str]]:
        """Concept, surrogate and the surrogate's kind, as the report or else the settings say."""
        for report in self.reports.values():
            if report.get("pairs"):
                return report["pairs"]
        concepts, surrogates = (self.settings.get(name) or [] for name in ("concept", "surrogate"))
        surrogates = surrogates * len(concepts) if len(surrogates) == 1 else surrogates
        surrogates = [*surrogates, *[""] * len(concepts)]
        return [{"concept": concept, "surrogate": surrogate}
                for concept, surrogate in zip(concepts, surrogates, strict=False)]  # fmt: skip

    @property
    def concepts(self) -> list[str]:
        return [pair["concept"] for pair in self.pairs]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for report in self.reports.values() for row in report.get("rows", [])]


def _read_facts(folder: Path, name: str | None) -> _Facts:
    if not (folder / _INDEX_NAME).is_file():
        raise ValueError(f"{folder} holds no pipeline (no {_INDEX_NAME}): give the folder of an erased one")

    def read(file: str, empty: Any) -> Any:
        value = read_json(folder / file) if (folder / file).is_file() else empty
        if not isinstance(value, type(empty)):
            raise ValueError(f"{folder / file} holds other values than a run writes: restore it or remove it")
        return value

    reports = {"": read(REPORT_NAME, {})}
    for path in evaluation_reports(folder):
        report = read_json(path)
        title = report.get("protocol") or path.parent.name
        reports[title if title not in reports else str(path.parent.relative_to(folder))] = report
    return _Facts(
        name=name or folder.resolve().name,
        index=read(_INDEX_NAME, {}),
        settings=read(CONFIG_NAME, {}),
        reports={title: report for title, report in reports.items() if report},
        history=read(HISTORY_NAME, []),
        fisher=read(FISHER_CONFIG_NAME, {}),
        has_grid=(folder / GRID_NAME).is_file(),
    )


def build_model_card(folder: str | Path, name: str | None = None) -> ModelCard:
    """The model card of an erased pipeline.

    Read are model_index.json, selective_amnesia.json, report.json, evaluation*/**/report.json of this pipeline,
    training_history.json, fisher_config.json, whether there is a before_after.png, and the base model's own card
    for the licence (its folder, the Hub, or the Hub's cache). All but the first may be missing.

    Args:
        folder: An erased pipeline.
        name: What it is loaded by, such as its name on the Hub. Default: the folder's name.

    Raises:
        ValueError: The folder holds no pipeline, or one of these files is not valid JSON.
    """
    facts = _read_facts(Path(folder), name)
    licence = inherited_licence(facts.base, facts.settings.get("cache_dir")) if facts.base else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.pipeline_tag,
        tags=list(_TAGS),
        model_name=facts.name.split("/")[-1],
        eval_results=list(_eval_results(facts)) or None,
        **({"base_model": facts.base, "base_model_relation": "finetune"} if facts.base_is_on_hub else {}),
        **licence,
    )
    if not data.eval_results:
        del data.model_name
    sections = [
        _introduction(facts, licence),
        _erased(facts),
        _pictures(facts),
        _evaluation(facts),
        _limits(facts),
        _use(facts),
        _loading(facts),
        _training(facts),
        _fisher(facts),
        _reproduction(facts),
        _citation(facts),
    ]
    body = without_local_paths("\n\n".join(section for section in sections if section))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{CARD_MARKER}\n\n{body}\n")


def write_model_card(folder: str | Path, name: str | None = None) -> bool:
    """Write an erased pipeline's model card into its folder; see `build_model_card`.

    Args:
        folder: An erased pipeline.
        name: What it is loaded by. Default: the folder's name.

    Returns:
        False if there is a README.md that this package did not write: it stays as it is.

    Raises:
        ValueError: The folder holds no pipeline, or one of its files is not valid JSON.
    """
    if not is_own_card(folder):
        return False
    write_text(Path(folder) / CARD_NAME, str(build_model_card(folder, name)))
    return True


def push_pipeline(folder: str | Path, repo_id: str | None = None, private: bool = False) -> str:
    """Upload an erased pipeline with its card, report and pictures; see `sa_diffusers.hub.push_folder`.

    The card that goes up knows the name on the Hub; the folder's own is not touched.
    """
    folder = Path(folder)
    finish_interrupted(folder)
    _read_facts(folder, None)
    OutputFolder(folder).check_whole()
    for path in evaluation_reports(folder, stale=True):
        warnings.warn(f"{path.parent} is about an earlier pipeline of this folder: it is not published", stacklevel=2)
    return push_folder(folder, repo_id, private, lambda name: str(build_model_card(folder, name)))


# Text


def _quoted(value: Any) -> str:
    return f'"{_md(value)}"'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(share: dict[str, Any] | None) -> str:
    if not share:
        return ""
    low, high = (100 * bound for bound in share["interval"])
    return f"{_percent(share['share'])} [{low:.1f}, {high:.1f}]"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return _md(", ".join(f'"{item}"' for item in value))
    return _md(f"{value:g}" if isinstance(value, float) else value)


# Sections


def _base_link(facts: _Facts) -> str:
    if facts.base is None:
        return "a base model that this folder does not name"
    if facts.base_is_on_hub:
        revision = facts.report.get("base_revision")
        link = f"[{_md(facts.base)}](https://huggingface.co/{facts.base})"
        return f"{link} (commit {markdown_code(revision)})" if revision else link
    return f"the local folder {markdown_code(Path(facts.base).name)}"


def _introduction(facts: _Facts, licence: dict[str, str]) -> str:
    base = Path(facts.base).name if facts.base else facts.name
    forgotten = " and ".join(_quoted(concept) for concept in facts.concepts)
    title = f"# {_md(base)} without {forgotten}" if forgotten else f"# {_md(facts.name)}"
    what = f"to forget {forgotten}" if forgotten else "to forget; what, this folder does not say"
    text = (
        f"Made from {_base_link(facts)} and trained with [Selective Amnesia]({PAPER}) {what}. An ordinary "
        f"{markdown_code(facts.pipeline_class)} of diffusers. The figures below say how far it forgets and what else "
        "changed."
    )
    if not licence:
        text += (
            "\n\nNo licence is given here, because the base model's card could not be read or names none. The base "
            "model's terms hold for this model as well: look them up before you use or pass on either."
        )
    return f"{title}\n\n{text}"


def _erased(facts: _Facts) -> str:
    lines = ["## What was erased"]
    naive = facts.settings.get("naive")
    if not facts.pairs:
        lines.append("The folder does not say.")
    elif naive:
        lines.append(
            "The likelihood of the concept's own samples was lowered (eq. 3 of the paper, its negative example); there "
            "is no surrogate."
        )
        lines.append(_table(["concept"], [[_md(concept)] for concept in facts.concepts]))
    else:
        lines.append(
            _table(
                ["asked for", "drawn in its place", "where that comes from"],
                [
                    [
                        _md(pair["concept"]),
                        _md(_surrogate_name(pair)),
                        _md(_SURROGATE_KINDS.get(pair.get("kind", ""), "not recorded")),
                    ]
                    for pair in facts.pairs
                ],
            )
        )
    return "\n\n".join(lines)


def _surrogate_name(pair: dict[str, str]) -> str:
    name = pair.get("surrogate") or "not recorded"
    return {"noise": "uniform noise", "images": shown_name(name)}.get(pair.get("kind", ""), name)


def _pictures(facts: _Facts) -> str:
    if not facts.has_grid:
        return ""
    picture = f"![The base model's pictures and this model's, from the same prompts and seeds]({GRID_NAME})"
    if any(report.get("blur") for report in facts.reports.values()):
        if not facts.report.get("blur"):
            # What a later evaluation blurs is clear in this folder's own picture.
            return ""
        picture = f"<details><summary>Pictures (blurred; they may show nudity)</summary>\n\n{picture}\n\n</details>"
    return f"## Before and after\n\nEach pair of pictures has the same prompt and the same seed.\n\n{picture}"


def _evaluation(facts: _Facts) -> str:
    parts = ["## Evaluation"]
    for title, report in facts.reports.items():
        heading = f"### Protocol: {_md(title)}" if title else "### At the end of the training"
        parts += [heading, *filter(None, (
            _rows_table(report), _remembered_text(report), _quality_table(report), _robustness_table(report),
            _conditions_text(report),
        ))]  # fmt: skip
    if not facts.reports:
        parts.append("This folder holds no evaluation.")
    return "\n\n".join(parts)


def _rows_table(report: dict[str, Any]) -> str:
    rows = report.get("rows") or []
    columns: dict[str, list[str]] = {
        "prompted with": [_md(row["name"]) for row in rows],
        "role": [_md(row.get("role", "")) for row in rows],
        "images": [str(row.get("images", "")) for row in rows],
    }
    for column, key in (("recognised", "recognised"), ("as surrogate", "as_surrogate")):
        if any(key in row for row in rows):
            for time in ("before", "after"):
                columns[f"{column} {time}"] = [_share(row.get(key, {}).get(time)) for row in rows]
    for name in dict.fromkeys(name for row in rows for name in row.get("scores") or {}):
        for time in ("before", "after"):
            means = [(row.get("scores") or {}).get(name, {}).get(time, {}).get("mean") for row in rows]
            columns[f"{_md(name)} {time}"] = [_number(mean) for mean in means]
    columns["change"] = [
        "" if (relative := (row.get("change") or {}).get("relative")) is None else f"{100 * relative:.0f} %"
        for row in rows
    ]
    if any(sum((row.get("black") or {}).values()) for row in rows):
        columns["black before/after"] = [f"{row['black']['before']}/{row['black']['after']}" for row in rows]
    if not rows:
        return ""
    return _table(list(columns), zip(*columns.values(), strict=True))


def _remembered_text(report: dict[str, Any]) -> str:
    remembered = report.get("remembered") or {}
    old, new = remembered.get("before"), remembered.get("after")
    if not old or not new:
        return ""
    text = (
        f"All rows but the concept's: recognised {_percent(old['recognised'])} before, "
        f"{_percent(new['recognised'])} after."
    )
    if old.get("frechet_distance") is not None and new.get("frechet_distance") is not None:
        text += (
            f" Fréchet distance to real images in the classifier's features: {old['frechet_distance']:.2f} before, "
            f"{new['frechet_distance']:.2f} after ({new['images']} images each)."
        )
    if values := remembered.get("against_base"):
        text += (
            f" Against the base model's own images: Fréchet distance {values['frechet_distance']:.2f}, precision "
            f"{values['precision']:.2f}, recall {values['recall']:.2f}."
        )
    return text


def _quality_table(report: dict[str, Any]) -> str:
    lines = []
    for entry in report.get("quality") or []:
        for time in ("before", "after"):
            if time in entry:
                values = [_number(entry[time].get(name)) for name in ("frechet_distance", "precision", "recall")]
                images = f"{entry.get('images', '')} / {entry.get('reference_images', '')}"
                lines.append([_md(shown_name(str(entry.get("features", "")))), _md(entry.get("reference", "")), time,
                              *values, images])  # fmt: skip
    if not lines:
        return ""
    return _table(["features of", "reference", "model", "Fréchet distance", "precision", "recall",
                   "images / reference"], lines)  # fmt: skip


def _robustness_table(report: dict[str, Any]) -> str:
    entries = report.get("robustness") or []
    if not entries:
        return ""
    models = list(dict.fromkeys(entry["model"] for entry in entries))
    cells = {(entry["attack"], entry["model"]): _attack_cell(entry) for entry in entries}
    attacks = dict.fromkeys(entry["attack"] for entry in entries)
    return "Attempts to bring the concept back, and how often its images show it:\n\n" + _table(
        ["attempt", *(_md(model) for model in models)],
        [[_md(attack), *(cells.get((attack, model), "") for model in models)] for attack in attacks],
    )


def _attack_cell(entry: dict[str, Any]) -> str:
    if "recognised" in entry:
        return _share(entry["recognised"])
    figures = {name: (summary or {}).get("mean") for name, summary in (entry.get("scores") or {}).items()}
    figures |= {name: value for name, value in entry.items()
                if isinstance(value, float) and not isinstance(value, bool)}  # fmt: skip
    return ", ".join(f"{_md(name)} {_number(value)}" for name, value in figures.items())


def _conditions_text(report: dict[str, Any]) -> str:
    """What the figures depend on."""
    sentences = ["The same seeds before and after."] if report.get("rows") else []
    if sampling := report.get("sampling"):
        sentences.append(
            f"Sampler {_md(sampling['sampler'])}, {sampling['num_inference_steps']} steps, guidance "
            f"{sampling['guidance_scale']:g}."
        )
    if classifier := report.get("classifier"):
        sentences.append(
            "Recognised: the share of images that the classifier "
            f"{markdown_code(shown_name(classifier['name']))} gives the row's label, of "
            f"{len(classifier.get('labels') or [])}."
        )
    for evaluator in report.get("evaluators") or []:
        facts = [f"{_md(key)} {_value(value)}" for key, value in evaluator.items()
                 if key != "name" and value not in (None, [], "") and not isinstance(value, dict)
                 and not (isinstance(value, list) and len(value) > 12)]  # fmt: skip
        detail = f" ({'; '.join(facts)})" if facts else ""
        sentences.append(f"Scored by {markdown_code(shown_name(str(evaluator.get('name', 'unnamed'))))}{detail}.")
    if any("recognised" in row for row in report.get("rows") or []):
        sentences.append("Brackets: 95 % Wilson interval, in per cent.")
    if any((row.get("change") or {}).get("relative") is not None for row in report.get("rows") or []):
        sentences.append(
            "Change: distance in pixels between before and after at the same seed; 100 % is that of two seeds."
        )
    return " ".join(sentences)


def _limits(facts: _Facts) -> str:
    lines = [line for report in facts.reports.values() for line in (*_leaks(report), *_damage(report))]
    if not facts.rows:
        lines.append("Nothing has been measured in this folder: how far the model forgets is not known.")
    if not any(report.get("robustness") for report in facts.reports.values()):
        lines.append(
            "No attempt to bring the concept back is on record here: no textual inversion, no other wording, spelling "
            "or language. Other work has brought erased concepts back in such ways. Expect that whoever holds the "
            "weights can do so."
        )
    lines += [
        "Only what was measured is known. Prompts of another kind than those in the tables may still lead to the "
        "concept, and what no row asks for may have changed.",
        "The paper finds that the method removes narrow concepts (a person, a class) better than wide ones (nudity), "
        "and the outcome depends on a surrogate that somebody chose.",
        "All limits and biases of the base model are those of this one.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in dict.fromkeys(lines))


def _leaks(report: dict[str, Any]) -> Iterable[str]:
    """What still comes through, in sentences."""
    for row in report.get("rows") or []:
        if row.get("role") != "concept":
            continue
        if "recognised" in row:
            before, after = (row["recognised"][time] for time in ("before", "after"))
            if after["share"] == 0:
                line = (
                    f"{_quoted(row['name'])}: recognised in none of {row['images']} images (before: "
                    f"{_percent(before['share'])}). The true share may still be up to "
                    f"{_percent(after['interval'][1])} (95 % interval)."
                )
            else:
                line = (
                    f"{_quoted(row['name'])} still leaks: recognised in {_percent(after['share'])} of {row['images']} "
                    f"images (before: {_percent(before['share'])})."
                )
            if "as_surrogate" in row:
                line += f" {_percent(row['as_surrogate']['after']['share'])} are taken for the surrogate."
            yield line
        elif row.get("scores"):
            figures = ", ".join(
                f"{_md(name)} {_number(times['before']['mean'])} before, {_number(times['after']['mean'])} after"
                for name, times in row["scores"].items()
            )
            yield f"{_quoted(row['name'])}: {figures}."
        elif (relative := (row.get("change") or {}).get("relative")) is not None:
            yield (
                f"{_quoted(row['name'])}: no classifier or detector has looked at the images. They differ from the "
                f"base model's by {100 * relative:.0f} % of the distance between two seeds, which does not show that "
                "the concept is gone."
            )
    attacked = [entry for entry in report.get("robustness") or [] if "recognised" in entry]
    erased = [entry for entry in attacked if entry["model"] == "erased"]
    if erased:
        worst = max(erased, key=lambda entry: entry["recognised"]["share"])
        others = [
            f"{_percent(entry['recognised']['share'])} on the {_md(entry['model'])} model"
            for entry in attacked
            if entry["attack"] == worst["attack"] and entry["model"] != "erased"
        ]
        compared = f" ({', '.join(others)})" if others else ""
        yield (
            f"Attempts to bring the concept back: the most successful one, {_quoted(worst['attack'])}, shows it in "
            f"{_percent(worst['recognised']['share'])} of its images{compared}."
        )


def _damage(report: dict[str, Any]) -> Iterable[str]:
    """What else changed, in sentences."""
    rows = report.get("rows") or []
    for role, subject in (("neighbour", "the concept's neighbours"), ("surrogate", "the surrogate"),
                          ("remembered", "what should be remembered")):  # fmt: skip
        mine = [row for row in rows if row.get("role") == role]
        recognised = [row for row in mine if "recognised" in row]
        changed = [row for row in mine if (row.get("change") or {}).get("relative") is not None]
        if recognised:
            yield _lost(subject, recognised)
        elif changed:
            worst = max(changed, key=lambda row: row["change"]["relative"])
            mean = sum(row["change"]["relative"] for row in changed) / len(changed)
            yield (
                f"Collateral damage to {subject}: images change by {100 * mean:.0f} % of the distance between two "
                f"seeds on average over {len(changed)} rows, most for {_quoted(worst['name'])} "
                f"({100 * worst['change']['relative']:.0f} %)."
            )
    black = report.get("black_images") or {}
    if black.get("after", 0) > black.get("before", 0):
        yield f"{black['after']} images came out black, {black['before']} from the base model."


def _lost(subject: str, rows: Sequence[dict[str, Any]]) -> str:
    def share(row: dict[str, Any], time: str) -> float:
        return row["recognised"][time]["share"]

    means = [sum(share(row, time) for row in rows) / len(rows) for time in ("before", "after")]
    worst = max(rows, key=lambda row: share(row, "before") - share(row, "after"))
    line = f"Collateral damage to {subject}: recognition goes from {_percent(means[0])} to {_percent(means[1])}"
    if len(rows) > 1:
        line += f" on average over {len(rows)} rows"
    if share(worst, "before") <= share(worst, "after"):
        return f"{line}; no row lost any."
    if len(rows) == 1:
        return f"{line}."
    return (
        f"{line}, and falls most for {_quoted(worst['name'])}, from {_percent(share(worst, 'before'))} to "
        f"{_percent(share(worst, 'after'))}."
    )


def _use(facts: _Facts) -> str:
    forgotten = " or ".join(_quoted(concept) for concept in facts.concepts) or "the erased concept"
    return "\n\n".join(
        [
            "## Intended use and misuse",
            f"Meant for research on forgetting, and as one safeguard among several where {forgotten} should not be "
            "drawn. Do not rely on it alone: filter prompts and images as well where harm is possible.",
            "Forgetting can itself be misused. The same method could take out of a model what people ought to see, a "
            "historical event, say, or the likeness and culture of a group, without saying so. Whoever passes this "
            "model on should keep this card with it, so that others learn what was taken out and by whom. It is not "
            "meant for deception, nor for getting round the terms of the base model.",
        ]
    )


def _loading(facts: _Facts) -> str:
    options = ", trust_remote_code=True" if facts.brings_code else ""
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(facts.name, ensure_ascii=False)}{options})",
    ]
    if facts.takes_text:
        kept = next((row["prompts"][0] for row in facts.rows
                     if row.get("role") in ("remembered", "surrogate") and row.get("prompts")), "a photo")  # fmt: skip
        lines.append(f"image = pipeline({json.dumps(kept, ensure_ascii=False)}).images[0]")
    else:
        names = facts.index.get("id2label") or {}
        kept = [int(key) for key, label in names.items()
                if not {str(label).casefold(), key} & {concept.casefold() for concept in facts.concepts}]  # fmt: skip
        lines.append(f"image = pipeline(class_labels=[{min(kept, default=0)}]).images[0]")
    text = f"## How to load it\n\n{markdown_fence('python', chr(10).join(lines))}"
    if facts.brings_code:
        text += (
            "\n\n`trust_remote_code` lets diffusers run the Python files that lie beside the weights. Read them first."
        )
    return text


def _training(facts: _Facts) -> str:
    if not facts.settings:
        return ""
    values = {name: facts.settings.get(name) for name in _SHOWN_SETTINGS}
    shown = [[f"`{name}`", _value(shown_name(value) if name in _PATH_SETTINGS else value)]
             for name, value in values.items() if value not in (None, []) and value is not False]  # fmt: skip
    text = f"## Hyper-parameters\n\n{_table(['setting', 'value'], shown)}\n\nAll settings are in `{CONFIG_NAME}`."
    if facts.settings.get("ewc_weight"):
        text += " The EWC weight multiplies `sum F (theta - theta*)^2`; the paper's lambda is twice that."
    if facts.history:
        first, last = facts.history[0], facts.history[-1]
        losses = ", ".join(f"{name.replace('_', ' ')} {_number(first[name])} at step {first['step']}, "
                           f"{_number(last[name])} at step {last['step']}"
                           for name in ("surrogate_loss", "replay_loss", "ewc_penalty")
                           if name in first and name in last)  # fmt: skip
        text += f" Losses: {losses} (all in `{HISTORY_NAME}`)."
    if seconds := facts.report.get("seconds"):
        device = _md(facts.report.get("device", "a device"))
        text += f" The run took {sum(seconds.values()):.0f} seconds on {device}."
    return text


def _fisher(facts: _Facts) -> str:
    weight = facts.settings.get("ewc_weight")
    if weight == 0:
        text = "None: the weight of elastic weight consolidation is 0."
    elif facts.fisher:
        values = {name: facts.fisher[name] for name in _SHOWN_FISHER if facts.fisher.get(name) is not None}
        if "base_model" in values:
            values["base_model"] = shown_name(values["base_model"])
        text = _table(["computed from", "value"], [[f"`{name}`", _value(value)] for name, value in values.items()])
    elif facts.settings.get("fisher"):
        text = f"Given: {markdown_code(shown_name(facts.settings['fisher']))}."
    elif weight:
        timesteps = facts.settings.get("fisher_timesteps") or "all"
        text = f"Estimated from {facts.settings.get('num_fisher_samples')} samples x {timesteps} timesteps."
    else:
        text = "The folder does not say."
    return f"## Fisher information\n\n{text}"


def _reproduction(facts: _Facts) -> str:
    commands = []
    if facts.settings:
        script = "train_dit.py" if facts.pipeline_class == "DiTPipeline" else "train_sa.py"
        commands.append(
            f"accelerate launch examples/{script} --config {CONFIG_NAME} --no-push_to_hub --output_dir again"
        )
    for title, report in facts.reports.items():
        if title and report.get("command"):
            command = requoted(report["command"]).removeprefix("python ").removeprefix("examples/")
            commands.append(f"python examples/{command}")
    if not commands:
        return ""
    version = facts.settings.get("sa_diffusers_version") or facts.report.get("sa_diffusers_version")
    package = f"sa_diffusers {_md(version)}" if version else "sa_diffusers"
    text = f"With the repository of {package} and the files of this folder:"
    named = [name for name in _PATH_SETTINGS if isinstance(value := facts.settings.get(name), str)
             and shown_name(value) != value]  # fmt: skip
    parts = ["## How to reproduce it", text, markdown_fence("", "\n".join(commands))]
    if named or (facts.base and not facts.base_is_on_hub):
        names = ", ".join(f"`--{name}`" for name in named or ["pretrained_model_name_or_path"])
        parts.append(
            "Folders of the machine that it was made on are named by their last part only. Say where yours are: "
            f"{names}."
        )
    versions = ", ".join(f"{_md(name)} {_md(version)}" for name, version in facts.report.get("versions", {}).items())
    if versions:
        parts.append(f"Made with {versions}.")
    return "\n\n".join(parts)


def _citation(facts: _Facts) -> str:
    base = f"\n\nCite the base model too, {_base_link(facts)}, as its own card asks." if facts.base else ""
    return f"## How to cite\n\n{markdown_fence('bibtex', _CITATION)}{base}"


# Metadata


def _eval_results(facts: _Facts) -> Iterable[EvalResult]:
    """This model's own figures, one result for each finite number. Those of the base stay in the tables."""
    for title, report in facts.reports.items():
        place = title or "training"
        for row in report.get("rows") or []:
            figures = {name: (row.get(name) or {}).get("after") for name in ("probability", "entropy")}
            for name in ("recognised", "as_surrogate"):
                figures[name] = ((row.get(name) or {}).get("after") or {}).get("share")
            figures["change"] = (row.get("change") or {}).get("relative")
            for name, times in (row.get("scores") or {}).items():
                figures[name] = (times.get("after") or {}).get("mean")
            subject = f"{row.get('images', 0)} generated images, {row.get('role', 'row')}: {row['name']}"
            yield from _results(facts, f"{place}/{row['name']}", subject, figures)
        remembered = dict((report.get("remembered") or {}).get("after") or {})
        images = remembered.pop("images", 0)
        yield from _results(facts, f"{place}/remembered", f"{images} generated images, all but the concept", remembered)
        for entry in report.get("quality") or []:
            features = shown_name(str(entry.get("features", "features")))
            subject = f"{entry.get('images', 0)} generated images against {entry.get('reference', 'a reference')}"
            key = f"{place}/{features} against {entry.get('reference', 'a reference')}"
            yield from _results(facts, key, f"{subject}, features of {features}", entry.get("after") or {})
        for entry in report.get("robustness") or []:
            if entry["model"] != "erased":
                continue
            figures = {name: value for name, value in entry.items() if isinstance(value, float)}
            figures |= {name: (values or {}).get("mean") for name, values in (entry.get("scores") or {}).items()}
            figures["recognised"] = (entry.get("recognised") or {}).get("share")
            subject = f"{entry.get('images', 0)} generated images, attack: {entry['attack']}"
            yield from _results(facts, f"{place}/attack {entry['attack']}", subject, figures)


def _results(facts: _Facts, key: str, subject: str, figures: dict[str, Any]) -> Iterable[EvalResult]:
    for name, value in figures.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield EvalResult(
                task_type=facts.pipeline_tag,
                # The Hub keeps results apart by type and configuration.
                dataset_type="generated-images",
                dataset_name=subject,
                dataset_config=key,
                metric_type=name,
                metric_name=_METRIC_NAMES.get(name, name.replace("_", " ")),
                metric_value=round(value, 6),
            )
