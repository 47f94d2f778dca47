"""What each figure of a report depends on: settings, commands, evaluators, prompts, seeds, versions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..configuration import CONFIG_NAME, HISTORY_NAME, REPORT_NAME, SelectiveAmnesiaConfig
from ..files import Recorded
from ..hub import shown_name
from ..markup import requoted
from ..results.figures import MISSING, listed, plain, sampling_text, seeds_text
from ..results.schema import DECODER, Report
from .conclusions import role_rank
from .document import Block, Command, Paragraph, Table
from .tables import INTERVAL, classifier_quality, score_kinds

_LABELS = 60
# Facts of a report that stand in a table of their own.
_FACTS = (
    "base_revision", "base_module", "variant", "erased_revision", "erased_module", "real_images", "i2p", "models",
    "prediction_type", "mixed_precision", "weights_dtype", "base_quantization", "device", "identity",
)  # fmt: skip


def path_settings() -> frozenset[str]:
    """The settings that are, or may be, places on the machine of whoever ran it."""
    return frozenset(spec.name for spec in dataclasses.fields(SelectiveAmnesiaConfig) if spec.metadata["path"])


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which places are called by their own name only."""
    places = path_settings()

    def shorter(name: str, value: Any) -> Any:
        if name not in places:
            return value
        if isinstance(value, list):
            return [shorter(name, part) for part in value]
        return shown_name(value) if isinstance(value, str) else value

    return {name: shorter(name, value) for name, value in settings.items()}


def configuration_tables(configuration: dict[str, Any]) -> list[Block]:
    if not configuration:
        return []
    defaults = Recorded(SelectiveAmnesiaConfig().to_dict())
    settings = {name: value for name, value in configuration.items() if name != "sa_diffusers_version"}
    shown = without_places(settings)
    changed = [[name, plain(shown[name]), plain(defaults[name])] for name, value in settings.items()
               if value != defaults[name]]  # fmt: skip
    rest = [[name, plain(shown[name])] for name, value in settings.items() if value == defaults[name]]
    blocks: list[Block] = []
    if changed:
        blocks.append(Table("Settings of the erasure that differ from the defaults", ["setting", "value", "default"],
                            changed, frozenset({0, 1, 2})))  # fmt: skip
    if rest:
        blocks.append(Table("Settings at their defaults", ["setting", "value"], rest, frozenset({0, 1}), folded=True))
    return blocks


def reproduction(report: Report, trained: bool) -> list[Block]:
    """How to have each figure again.

    Args:
        report: Whatever it holds.
        trained: Whether curves of the training are shown too.
    """
    blocks = _how(report)
    blocks.append(
        Table("What measured each figure", ["figure", "measured by", "how"], _origins(report, trained),
              frozenset({0, 1, 2}))
    )  # fmt: skip
    blocks += _evaluators(report)
    rows = []
    for number, row in sorted(enumerate(report.rows), key=lambda entry: role_rank(entry[1])):
        place = f"rows[{number}] of {REPORT_NAME}"
        prompts = listed([f"“{text}”" for text in row.prompts], place)
        rows.append([row.name, row.role, f"{row.images:,}", prompts, seeds_text(row.seeds, place)])
    caption = "Prompts and seeds of every row, the same before and after"
    blocks.append(Table(caption, ["row", "role", "images", "prompts", "seeds"], rows, frozenset({0, 1, 3, 4})))
    blocks += _attacks(report)
    sampling = [[spec.name.replace("_", " "), plain(value)] for spec in dataclasses.fields(report.sampling)
                if (value := getattr(report.sampling, spec.name)) is not None]  # fmt: skip
    if report.sampling.sampler == DECODER:
        sampling = [["sampled with", sampling_text(report.sampling)]]
    blocks.append(Table("How the images were sampled", ["setting", "value"], sampling, frozenset({0, 1})))
    versions = {"sa_diffusers": report.sa_diffusers_version, **report.versions}
    blocks.append(Table("Versions of the packages", ["package", "version"],
                        [[name, value] for name, value in versions.items() if value], frozenset({0, 1})))  # fmt: skip
    facts = {name: getattr(report, name) for name in _FACTS} | report.others
    blocks.append(Table("Provenance", ["field", "value"],
                        [[name.replace("_", " "), _fact(value)] for name, value in facts.items()
                         if value not in (None, {}, [])], frozenset({0, 1})))  # fmt: skip
    return [block for block in blocks if not isinstance(block, Table) or block.rows]


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        value = {name: shown_name(part) if isinstance(part, str) else part for name, part in value.items()}
    return plain(value)


def _how(report: Report) -> list[Block]:
    if report.command:
        return [Paragraph("The command that made this report:"), Command(requoted(report.command))]
    if not_repeatable(report):
        return [Paragraph(not_repeatable(report))]
    if report.configuration:
        text = (
            f"All settings of the run are in {CONFIG_NAME}, beside this report; the erasure and its evaluation run "
            "again with them. A model of one's own takes its own script in place of train_sa.py."
        )
        command = f"accelerate launch examples/train_sa.py --config {CONFIG_NAME} --output_dir reproduced"
        return [Paragraph(text), Command(command)]
    return [Paragraph(f"The command is not recorded in {REPORT_NAME}; what it depends on is below.")]


def not_repeatable(report: Report) -> str:
    """Why no command makes an erasure again, as a sentence; empty if one does."""
    told = []
    if report.handed_in:
        given = ", ".join(f"{name} ({what})" for name, what in report.handed_in.items())
        told.append(f"handed in from Python were {given}")
    if report.stopped_after_step:
        told.append(f"a callback ended the training after step {report.stopped_after_step}")
    return f"The settings alone do not make this erasure again: {', and '.join(told)}." if told else ""


def _attacks(report: Report) -> list[Block]:
    """Prompts and seeds of the attacks; models that were attacked alike share a line."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for number, attack in enumerate(report.robustness):
        if attack.prompts or attack.seeds:
            place = f"robustness[{number}] of {REPORT_NAME}"
            texts = listed([f"“{text}”" for text in attack.prompts], place) or MISSING
            key = (attack.attack, repr(attack.prompts), repr(attack.seeds))
            lines.setdefault(key, [key[0], texts, seeds_text(attack.seeds, place) or MISSING])
    if not lines:
        return []
    caption = "Prompts and seeds of the attacks, the same against every model"
    return [Table(caption, ["attack", "prompts", "seeds"], list(lines.values()), frozenset({0, 1, 2}))]


def _origins(report: Report, trained: bool) -> list[list[str]]:
    """For each kind of figure in the report, what measured it and how."""
    classifier = shown_name(report.classifier.name) if report.classifier else None
    names = [shown_name(evaluator.name) for evaluator in report.evaluators]
    origins = []
    if classifier and any(row.recognised for row in report.rows):
        origins += [
            ["recognised, as its surrogate", classifier, "share of images whose most probable label it is, no "
             f"threshold; interval: {report.interval or INTERVAL}"],
            ["probability, entropy", classifier,
             "means over the images, of the softmax at the label and of its entropy"],
        ]  # fmt: skip
    for column in score_kinds(report.rows):
        owners = [name for name, each in zip(names, report.evaluators, strict=True) if column in each.columns]
        owners = owners or [name for name, each in zip(names, report.evaluators, strict=True) if not each.columns]
        origins.append([column, ", ".join(owners) or MISSING, "one figure an image, in rows[...].scores of "
                        + REPORT_NAME])  # fmt: skip
    for features, neighbours in dict.fromkeys((entry.features, entry.neighbours) for entry in report.quality):
        how = f"torch-fidelity on its features; precision and recall with k = {plain(neighbours)}"
        origins.append(["Fréchet distance, precision, recall", shown_name(features), how])
    if classifier and classifier_quality(report):
        origins.append(["Fréchet distance in the classifier's features", classifier,
                        "means and covariances of the input of its last linear layer"])  # fmt: skip
    if report.robustness:
        scorers = list(dict.fromkeys([*([classifier] if classifier else []), *names]))
        origins.append(
            ["robustness", ", ".join(scorers) or MISSING, f"figures of each attack in {REPORT_NAME}, robustness"]
        )
    for network in dict.fromkeys(network for row in report.rows for network in row.distance):
        origins.append(
            ["distance", shown_name(network), "mean cosine distance of its features, before and after at the same seed"]
        )
    origins.append(["change", "pixels", "root mean square difference of reduced images, before and after at the same "
                    "seed, over that of images before of different seeds"])  # fmt: skip
    origins.append(["black images", "pixels", "images that are black all over"])
    if trained:
        origins.append(["training curves", "the trainer", f"every entry of {HISTORY_NAME}"])
    return origins


def _evaluators(report: Report) -> list[Block]:
    named: list[tuple[str, str, dict[str, Any]]] = []
    if report.classifier:
        named.append(("classifier", report.classifier.name, {"labels": report.classifier.labels}))
    for each in report.evaluators:
        named.append(("evaluators", each.name, {**({"columns": each.columns} if each.columns else {}), **each.others}))
    lines = []
    for place, name, facts in named:
        lines += [
            [shown_name(name), key.replace("_", " "), _label_set(value, f"{place} of {REPORT_NAME}")]
            for key, value in facts.items()
            if value is not None
        ] or [[shown_name(name), MISSING, MISSING]]
    if not lines:
        return []
    return [Table("The evaluators: version, weights, threshold, label set, as they name them",
                  ["evaluator", "field", "value"], lines, frozenset({0, 1, 2}))]  # fmt: skip


def _label_set(value: Any, place: str) -> str:
    """A value in words; of thousands of labels the first."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > _LABELS:
        return listed([plain(part) for part in value], place, _LABELS)
    return plain(value)
