"""The probes of a training: held-out samples, and the small sampled check before it stops."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data.concepts import UNIFORM_NOISE, ErasurePair
from ..data.phrasings import fill_template
from ..data.sample_set import MANIFEST_NAME, SampleSet
from ..families import Objective
from ..identity import Identity
from ..passes import Passes, counted, over_processes, together
from ..seeds import STREAMS, first_seed
from ..training.check import CheckedConcept, SampledCheck
from ..training.controller import refuse_nothing, scheduled_looks, step_cost, steps_between
from ..training.neighbours import comparisons
from ..training.probes import AVERAGED, Probes, ProbeSet
from ..training.settings import global_batch
from .base import Stage
from .neighbours import Neighbourhood
from .samples import ReplayStage
from .subject import Subject, describe, reused

# No training is told of these, and the evaluation has others.
PROBE_TEMPLATES = ("a view of {}", "there is {} here", "{} as it looks today", "look, {}")
_NEIGHBOURS = 5
# Images of the check, times as many where the training would stop by them, and the passes for which there may be more
# of them: a VAE samples in one. Of one in twenty none of 20 is seen every third time, none of 60 every twentieth.
_CHECKED, _TIMES_LAST, _MOST_CHECKED = 20, 3, 200
_CHECK_PASSES = 800
# Seeds for the checks of a concept.
_CHECK_SEEDS = 10_000


class ProbeStage(Stage):
    """What a training measures itself by.

    Args:
        subject: The model and what it is to forget.
        replay: What makes the replay set; the probes remember other prompts, where there are others.
    """

    title = "probe samples"
    depends_on = ReplayStage.depends_on | {"surrogate", "num_probe_images", "num_neighbour_images"}

    def __init__(self, subject: Subject, replay: ReplayStage) -> None:
        self.subject = subject
        self._replay = replay
        self._first = first_seed("probe", subject.config.seed)

    @property
    def is_needed(self) -> bool:
        return self.subject.config.probes

    @property
    def _each(self) -> int:
        """Images of each concept, and of each surrogate."""
        return max(8, self.subject.config.num_probe_images // len(self.subject.pairs))

    def _templates(self, pair: ErasurePair) -> list[str]:
        """Phrasings that neither training nor evaluation has, of those that the model reads to the end."""
        subject = self.subject
        if subject.labels is not None:
            return ["{}"]
        taken = {*subject.config.concept_templates, *subject.eval_templates}
        values = [pair.concept, *([pair.surrogate.value] if pair.surrogate.kind == "prompt" else [])]
        fitting = [
            template for template in PROBE_TEMPLATES
            if template not in taken
            and not any(subject.objective.why_unseen(fill_template(template, value), value) for value in values)
        ]  # fmt: skip
        return fitting or list(subject.eval_templates)

    def _remembered(self) -> list[str]:
        """Prompts to remember that the training does not replay, where there are such."""
        replayed = set(self._replay.prompts)
        count = 2 * self._each
        if self._replay.given is not None or self._replay.are_prompts_given:
            return [prompt for prompt in self._replay.prompts if prompt][:count] or list(self._replay.prompts)[:count]
        # Captions of another draw; those of a short list are the same again, with other seeds.
        wanted = list(dict.fromkeys(self.subject.captions(len(self._replay.prompts) + 2 * count)))
        fresh = [prompt for prompt in wanted if prompt not in replayed]
        prompts = (fresh + [prompt for prompt in wanted if prompt in replayed])[:count]
        return [prompts[place % len(prompts)] for place in range(count)]

    def _requests(self) -> list[tuple[str, str, list[str], list[int]]]:
        """Name, role, prompts and seeds of what is sampled at first."""
        requests = []
        first = self._first
        for pair in self.subject.pairs:
            templates = self._templates(pair)
            seeds = list(range(first, first + self._each))
            kinds = [("concept", pair.concept)]
            if pair.surrogate.kind == "prompt":
                # The same seeds: the check compares images of one with those of the other.
                kinds.append(("surrogate", pair.surrogate.value))
            for role, value in kinds:
                texts = [fill_template(templates[place % len(templates)], value) for place in range(self._each)]
                requests.append((pair.concept, role, texts, seeds))
            first += self._each
        remembered = self._remembered()
        requests.append(("", "remembered", remembered, list(range(first, first + len(remembered)))))
        return requests

    def identity(self) -> Identity:
        # What is remembered here is what the replay set leaves over.
        return Identity("probes", {"samples": self._samples().digest, "replay": self._replay.identity().digest,
                                   "num_neighbour_images": self.subject.config.num_neighbour_images})  # fmt: skip

    def _samples(self) -> Identity:
        requests = self._requests()
        prompts = [text for _, _, texts, _ in requests for text in texts]
        seeds = [seed for *_, own in requests for seed in own]
        return self.subject.generator.identity("probe", prompts, prompts, seeds, self.subject.settings)

    def plan(self) -> list[str]:
        if not self.is_needed:
            return []
        folder = self._samples().folder(self.subject.config.resolved_artifacts_dir)
        lines = [f"          {sum(len(texts) for _, _, texts, _ in self._requests())} held-out images for the probes, "
                 f"{describe(self.subject.settings)}{reused(folder, MANIFEST_NAME)}"]  # fmt: skip
        if self._near:
            lines.append(f"          {self._near} further replay images, of prompts that drift in the first steps")
        return lines

    def cost(self) -> Passes:
        """What sampling takes; the readings belong to the training."""
        subject = self.subject
        folder = self._samples().folder(subject.config.resolved_artifacts_dir)
        if not self.is_needed or (folder / MANIFEST_NAME).is_file():
            return Passes()
        return subject.sampling(sum(len(texts) for _, _, texts, _ in self._requests()), subject.settings)

    @property
    def _near(self) -> int:
        """Further replay images."""
        config = self.subject.config
        return config.num_neighbour_images if config.replays and self._replay.prompts and not config.naive else 0

    @property
    def _few(self) -> int:
        """Images of each neighbour."""
        return max(8, self._each // 4)

    @property
    def searches(self) -> bool:
        """Whether a training begins with some steps that are undone."""
        config = self.subject.config
        is_weighed = config.ewc_weight is not None or not config.consolidates
        return self.is_needed and not (config.naive and is_weighed and config.learning_rate is not None)

    def taken(self, steps: range) -> Passes:
        """About what measuring these steps takes: readings, looks at images, what the first steps show to lie near."""
        subject, config = self.subject, self.subject.config
        if not self.is_needed:
            return Passes()
        requests = self._requests()
        near = 0 if config.naive else _NEIGHBOURS * self._few
        guided = self._predictions(near)
        batch = global_batch(config, subject.accelerator.num_processes) * (2 if self._replay.prompts else 1)
        passes = self.asked()
        passes.forward += near * (2 if subject.objective.unconditional else 1)
        passes.add(Passes(guided * math.ceil(len(steps) / steps_between(guided, step_cost(config, batch)))))
        passes.add(self.looks(steps))
        if steps.start == 0 and self.searches:
            # Neighbours are not known yet.
            passes.forward += self._predictions()
            passes.add(subject.sampling(near, subject.settings))
            passes.add(subject.sampling(self._near, subject.replay_settings))
            if not config.naive:
                passes.forward += comparisons(len(requests[-1][2])) + comparisons(len(self._replay.prompts))
        return passes

    def looks(self, steps: range) -> Passes:
        """About what the images that are looked at meanwhile take, where the training does not stop before."""
        subject = self.subject
        if not subject.config.stops:
            return Passes()
        # Without a classifier they are samples at hand. Each process samples all of them.
        each = self._checked if subject.classifier else min(self._checked, self._each * len(subject.pairs))
        count = scheduled_looks(steps.start + 1, steps.stop) * subject.accelerator.num_processes
        return subject.sampling(count * each, subject.settings)

    def sample(self) -> None:
        """Sample what is probed, which `run` finds kept then."""
        self._sampled([(texts, seeds) for _, _, texts, seeds in self._requests()], "probe")

    def refuse_what_cannot_be_measured(self, surrogates: SampleSet) -> None:
        """What a training would refuse at its beginning, before samples to replay and Fisher information are paid for.

        Raises:
            ValueError: Concept and surrogate are the same to the model, or all remembered prompts are.
        """
        probes, _ = self._probes(surrogates)
        probes.prepare(self.subject.objective.module)
        refuse_nothing(probes)

    def asked(self) -> Passes:
        """About what that takes: the frozen model's predictions."""
        requests = self._requests()
        remembered, *_ = requests[-1][2:]
        # What the surrogate's prompts answer in the concept's place; without an empty prompt, what others do.
        wanted = 2 * sum(len(texts) for _, role, texts, _ in requests if role == "surrogate")
        objective = self.subject.objective
        asks = not (objective.unconditional or objective.shows_means)
        mean = len(remembered) * min(AVERAGED, len({*remembered})) if asks else 0
        return Passes(self._predictions() + wanted + mean)

    def _predictions(self, near: int = 0) -> int:
        """Of one reading of what was sampled at first, and of so many samples of neighbours."""
        subject, requests = self.subject, self._requests()
        sets = sum(len(texts) * (2 if role == "surrogate" else 1) for _, role, texts, _ in requests)
        sets += self._each * sum(pair.surrogate.kind != "prompt" for pair in subject.pairs)
        if not subject.objective.unconditional:
            return sets + near
        return 2 * (sets + near) + len(requests[-1][2]) // 2

    def run(self, *inputs: Any) -> tuple[Probes, SampledCheck, Neighbourhood | None] | None:
        """The probes, the check, and what samples the concept's neighbours; None where there are none.

        Args:
            *inputs: The surrogate set.
        """
        if not self.is_needed:
            return None
        subject = self.subject
        probes, by_role = self._probes(inputs[0])
        start = self._first + STREAMS["probe"].length // 2
        checked = [
            CheckedConcept(
                pair.concept, *by_role[pair.concept, "concept"],
                *by_role.get((pair.concept, "surrogate"), (None, []))[:2],
                self._shown(pair, inputs[0]), start + number * _CHECK_SEEDS,
            )
            for number, pair in enumerate(subject.pairs)
        ]  # fmt: skip
        with counted(subject.objective.module) as looked:
            check = SampledCheck(
                subject.objective,
                subject.settings,
                subject.classifier,
                subject.accelerator,
                checked,
                self._checked,
                self._checked_last,
            )
        self.made = together([self.made, over_processes(looked, subject.accelerator)])
        near = None if subject.config.naive else Neighbourhood(subject, len(self._replay.prompts), self._few)
        return probes, check, near

    def _probes(self, given: SampleSet) -> tuple[Probes, dict[tuple[str, str], Any]]:
        """The probes, and by name and role what they were sampled with: samples, prompts and seeds."""
        subject = self.subject
        sampled = self._sampled([(texts, seeds) for _, _, texts, seeds in self._requests()], "probe")
        sets: list[ProbeSet] = []
        by_role: dict[tuple[str, str], tuple[torch.Tensor, list[str], list[int]]] = {}
        for (name, role, texts, seeds), samples in zip(self._requests(), sampled, strict=True):
            by_role[name, role] = (samples, texts, seeds)
        for pair in subject.pairs:
            samples, texts, _ = by_role[pair.concept, "concept"]
            if pair.surrogate.kind == "prompt":
                surrogates, wanted, _ = by_role[pair.concept, "surrogate"]
                sets.append(ProbeSet(pair.concept, "concept", samples, texts, list(wanted)))
                sets.append(ProbeSet(pair.concept, "surrogate", surrogates, texts, list(wanted)))
                sets.append(ProbeSet(pair.concept, "own", surrogates, wanted, list(wanted)))
            else:
                others = self._unsampled(pair, given)
                sets.append(ProbeSet(pair.concept, "surrogate", others.samples, others.conditions, others.sources))
                if others.sources[0] == UNIFORM_NOISE:
                    # What noise asks for is known everywhere, on the concept's own samples too.
                    sets.append(ProbeSet(pair.concept, "concept", samples, texts, [UNIFORM_NOISE] * len(samples)))
        remembered, prompts, _ = by_role["", "remembered"]
        sets.append(ProbeSet("", "remembered", remembered, prompts, list(prompts)))
        if subject.objective.unconditional:
            empty = [""] * (len(remembered) // 2)
            sets.append(ProbeSet("", "empty", remembered[: len(empty)], empty, list(empty)))
        probes = Probes(
            subject.objective, sets, subject.settings.guidance_scale, subject.config.seed, subject.accelerator,
            max(subject.config.sample_batch_size, subject.config.train_batch_size),
        )  # fmt: skip
        return probes, by_role

    @property
    def _checked(self) -> int:
        """Images of a check."""
        subject = self.subject
        return min(_MOST_CHECKED, max(_CHECKED, _CHECK_PASSES // max(1, subject.sampling(1, subject.settings).forward)))

    @property
    def _checked_last(self) -> int:
        """Images of the check by which the training would stop."""
        return min(_MOST_CHECKED, _TIMES_LAST * self._checked)

    def _shown(self, pair: ErasurePair, surrogates: SampleSet) -> torch.Tensor | None:
        """Surrogates that no prompt samples, as far as the model can show them."""
        if pair.surrogate.kind == "prompt":
            return None
        samples = self._unsampled(pair, surrogates).samples
        means_only = self.subject.objective.shows_means and pair.surrogate.kind == "noise"
        return samples.mean().expand_as(samples[:1]).contiguous() if means_only else samples

    def _sampled(self, requests: Sequence[tuple[list[str], list[int]]], name: str) -> list[torch.Tensor]:
        prompts = [text for texts, _ in requests for text in texts]
        seeds = [seed for _, own in requests for seed in own]
        drawn = self.subject.generator.drawn(name, prompts, prompts, seeds, self.subject.settings, preview=False)
        self.made = drawn.passes
        return list(drawn.samples.split([len(texts) for texts, _ in requests]))

    def _unsampled(self, pair: ErasurePair, surrogates: SampleSet) -> SampleSet:
        """Surrogates that no prompt samples: noise of other seeds, the user's images."""
        template = self._templates(pair)[0]
        prompt = fill_template(template, pair.concept)
        if pair.surrogate.kind == "noise":
            length = STREAMS["probe"].length
            seeds = list(range(self._first + 3 * length // 4, self._first + length))
            noise = self.subject.generator.from_pixels(
                [pair] * self._each, [prompt] * self._each, seeds[: self._each], self.subject.settings
            )  # fmt: skip
            # Where the answer to noise is not known, it is a surrogate as images are.
            known = _knows_noise(self.subject.objective, noise.samples[:1])
            return noise if known else replace(noise, sources=[None] * self._each)
        given = [row for row, source in enumerate(surrogates.sources) if source is None]
        of_pair = [row for row in given if self.subject.mentions(surrogates.conditions[row], pair.concept)]
        # A set that was handed in may be trained under prompts that name no concept.
        rows = (of_pair or given)[: self._each]
        images = surrogates.subset(rows)
        return SampleSet(images.samples, [prompt] * len(rows), images.sources, images.seeds)


def _knows_noise(objective: Objective, samples: torch.Tensor) -> bool:
    """Whether an objective knows what a model answers, on average, whose samples are uniform noise."""
    samples = samples.to(objective.device)
    noise = objective.draw_noise(samples, torch.Generator().manual_seed(0))
    timesteps = torch.full((len(samples),), objective.num_train_timesteps // 2, device=samples.device)
    answers = [of(samples, timesteps, noise).float() for of in (objective.uniform_noise_target, objective.target)]
    return not torch.equal(*answers)
