"""Whether a forgotten concept can be brought back: every attack on every model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...data.concepts import ErasurePair
from ...data.prompt_files import read_prompts
from ...families import Objective, load_pipeline, objective_for
from ...identity import fingerprint
from ...results.schema import Attack as Entry
from ...results.schema import Summary
from ..attacks import Attack, AttackSettings, Inversion
from ..attacks.base import TRANSLATED_TEMPLATES
from ..classification import ImageClassifier
from ..comparison import Comparison, compare, share_of
from ..groups import PromptGroup
from ..measures.clip import Clip
from ..registry import ATTACKS, register_protocol
from ..request import Evaluation, Request
from ..scoring import Drawn, Measure, score_groups
from ..subject import Subject
from .base import Protocol, needs_prompts
from .concept import NOTHING_SCORES, check_something_scores

# Seeds of a pair: so many rows, or as many as there are attacks.
_ROWS = 10


@register_protocol("robustness")
class RobustnessProtocol(Protocol):
    """See `robustness_protocol`."""

    takes = "prompts"

    def __init__(self, request: Request) -> None:
        check_something_scores(request)
        args = request.args
        self.held_out = request.held_out()
        self.translations = read_prompts(args.translations) if args.translations else TRANSLATED_TEMPLATES
        self.inversion = Inversion(
            args.inversion_steps, args.inversion_images, args.inversion_batch_size, args.inversion_learning_rate
        ) if args.inversion_steps else None  # fmt: skip
        self.clip = Clip.from_request(request)

    def run(self, evaluation: Evaluation) -> Comparison | None:
        args = evaluation.args
        models = {"base": args.base, "erased": args.erased, **({"control": args.control} if args.control else {})}
        return robustness_protocol(
            evaluation.subject, models, self.held_out, self.translations, self.inversion, evaluation.classifier,
            self.clip, evaluation.provenance, evaluation.load, evaluation.measures,
        )  # fmt: skip


def robustness_protocol(
    subject: Subject,
    models: Mapping[str, str],
    held_out: Sequence[str],
    translations: Sequence[str] = TRANSLATED_TEMPLATES,
    inversion: Inversion | None = None,
    classifier: ImageClassifier | None = None,
    clip: Clip | None = None,
    provenance: dict[str, Any] | None = None,
    load: Callable[[str, str], Objective] | None = None,
    measures: Sequence[Measure] = (),
) -> Comparison | None:
    """Every attack on every model: the base, the erased one, and one that never saw the concept, if there is one.

    Args:
        subject: What was erased, and how images are sampled.
        models: Name in the report -> folder or Hub name: `"base"`, `"erased"`, and `"control"` if there is one, which
            is loaded; an attack that changes a model gives back what it changed.
        held_out: Phrasings that no training saw.
        translations: Prompts in other languages.
        inversion: Settings of textual inversion; None leaves it out.
        classifier: Says whether an image shows the concept.
        clip: Says so too.
        provenance: Further fields of the report.
        load: From a name in the report and a folder or Hub name to the model. Default: by the latter alone.
        measures: Score the images too.

    Returns:
        A comparison of base and erased, with an entry for each attack and model in the report's `robustness`.

    Raises:
        ValueError: The model's conditions are classes, or there is nothing to score with.
    """
    needs_prompts(subject, "robustness")
    if clip is None and classifier is None and not measures:
        raise ValueError(NOTHING_SCORES)
    every: list[Measure] = list(measures)
    if clip is not None:
        surrogates = [pair.surrogate.value for pair in subject.pairs if pair.surrogate.kind == "prompt"]
        clip.choose_among([pair.concept for pair in subject.pairs], surrogates, [])
        every.insert(0, clip)
    tries = attempts(subject, AttackSettings(held_out, translations, inversion), classifier)
    groups = [each.group for each in tries]
    load = load or (lambda _, name: objective_for(load_pipeline(name)))
    loaded = {"base": subject.base, "erased": subject.erased}
    for model, name in models.items():
        if model not in loaded:
            loaded[model] = load(model, name).to(subject.accelerator.device)
    kept: dict[str, list[list[torch.Tensor]]] = {model: [] for model in models}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for model, samples in kept.items():
        objective = loaded[model]
        own = subject.digests(objective).whole
        for each in tries:
            with each.attack.prepared(objective, each.pair, subject) as changed:
                facts[each.group.name, model] = changed.facts if changed else {}
                digest = fingerprint([own, changed.digest]) if changed else own
                samples += subject.sample(objective, [each.group], digest)
    if not subject.accelerator.is_main_process:
        return None
    seen = {model: score_groups(loaded[model], groups, kept[model], classifier, every) for model in models}
    told = {"evaluators": [measure.provenance() for measure in every], **(provenance or {})}
    comparison = compare(groups, seen["base"], seen["erased"], subject.sampling, classifier, told)
    entries = [
        _entry(group, model, seen[model][number], facts[group.name, model])
        for number, group in enumerate(groups)
        for model in models
    ]
    return replace(comparison, report=replace(comparison.report, models=dict(models), robustness=entries))


@dataclass(frozen=True)
class Attempt:
    """An attack on one concept."""

    attack: Attack
    pair: ErasurePair
    group: PromptGroup


def attempts(subject: Subject, settings: AttackSettings, classifier: ImageClassifier | None = None) -> list[Attempt]:
    """Every registered attack on every concept, each with seeds of its own."""
    label_of = classifier.label_of if classifier else lambda _: None
    attacks = [ATTACKS[name](settings) for name in ATTACKS]
    rows = max(_ROWS, len(attacks))
    found = []
    for number, pair in enumerate(subject.pairs):
        for row, attack in enumerate(attacks):
            first = subject.first_seed + (number * rows + row) * subject.count
            group = attack.group(pair, subject.count, first, label_of)
            if group is not None and len(subject.pairs) > 1:
                group = replace(group, name=f"{pair.concept}: {group.name}")
            if group is not None:
                found.append(Attempt(attack, pair, group))
    return found


def _entry(group: PromptGroup, model: str, drawn: Drawn, others: dict[str, Any]) -> Entry:
    entry = Entry(
        group.name,
        model,
        len(group.prompts),
        drawn.black,
        list(dict.fromkeys(group.prompts)),
        [[group.seeds[0], group.seeds[-1]]],
        scores={name: Summary.of(values) for name, values in drawn.measured.items()},
        others=others,
    )
    if drawn.scores is None or group.label is None:
        return entry
    into = share_of(drawn.scores, group.surrogate_label) if group.surrogate_label is not None else None
    return replace(entry, recognised=share_of(drawn.scores, group.label), as_surrogate=into)
