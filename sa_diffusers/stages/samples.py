"""The samples that an erasure trains on, all from the frozen model itself or handed in."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.generation import knows_noise, surrogate_requests, takes_concept
from ..data.given import Samples, are_prompts, content_identity, given_prompts, given_samples
from ..data.sample_set import MANIFEST_NAME, SampleSet, is_prompt
from ..families import SamplingSettings
from ..identity import Identity
from ..messages import shown
from ..passes import Passes
from ..seeds import first_seed
from .base import Stage
from .subject import MODEL, SAMPLING, Subject, describe, reused


class SurrogateStage(Stage):
    """The surrogate set: q(x | c_f) of eq. 4; for eq. 3 the concept's own samples.

    Under the frozen target a share of them are the concept's own. What is to be predicted on them is known as well:
    what the frozen model predicts under the surrogate's prompt, or the mean that noise has. Such samples are where a
    model goes that still knows the concept, and surrogates alone tell it nothing of them.

    Args:
        subject: The model and what it is to forget.
        given: Samples in place of those that would be made; prompts among them are sampled with.
    """

    title = "surrogate samples"
    depends_on = frozenset((*MODEL, *SAMPLING, "surrogate", "concept_templates", "num_surrogate_images", "naive",
                            "surrogate_guidance_scale", "concept_share", "target"))  # fmt: skip

    def __init__(self, subject: Subject, given: Samples | None = None) -> None:
        self.subject = subject
        self._first = first_seed("surrogate", subject.config.seed)
        self.given: SampleSet | None = None
        self._prompts: list[str] | None = None
        if given is None:
            return
        prompts = given_prompts("surrogates", given)
        if not isinstance(given, SampleSet):
            self._check_texts(prompts or [], are_prompts(given))
        if are_prompts(given):
            self._prompts = prompts
            return
        if prompts is None and len({pair.surrogate for pair in subject.pairs}) > 1:
            raise ValueError(
                "surrogates: which of the concepts do the images belong to? Give dictionaries of an image and its "
                '"text", the concept\'s prompt'
            )
        conditions = prompts or self._requests(len(given))[0]
        resolution = subject.config.resolution
        self.given = given_samples("surrogates", given, subject.objective, conditions, resolution)
        own = sum(self.given.are_own)
        if own and subject.config.target != "frozen":
            raise ValueError(
                f"surrogates: {own} of {len(self.given)} samples are the concept's own, which the noise of "
                f'target="{subject.config.target}" would teach anew. Choose target="frozen", or hand in the others'
            )

    def _check_texts(self, texts: Sequence[str], are_sampled: bool) -> None:
        """Prompts to sample with name no concept; texts of images are prompts of one."""
        concepts = [pair.concept for pair in self.subject.pairs]
        wrong = next(
            (text for text in texts if any(self.subject.mentions(text, each) for each in concepts) == are_sampled), None
        )
        if wrong is None:
            return
        if are_sampled:
            raise ValueError(f'surrogates: "{shown(wrong)}" names the concept, which would turn into itself')
        raise ValueError(
            f'surrogates: the text "{shown(wrong)}" of an image names no concept: it is the prompt to train the image '
            f'under, such as "{shown(concepts[0])}"'
        )

    @property
    def count(self) -> int:
        """How many samples there are or will be."""
        if self.given is not None:
            return len(self.given)
        return len(self._prompts or ()) or self.subject.config.num_surrogate_images

    def _requests(self, count: int) -> tuple[list[str], list[str]]:
        """Prompts to train under, and what each is sampled with."""
        config = self.subject.config
        _, conditions, sources = surrogate_requests(self.subject.pairs, config.concept_templates, count)
        if self._prompts:
            sources = self._prompts
        return conditions, conditions if config.naive else sources

    @cached_property
    def _own(self) -> list[bool]:
        """Which samples are the concept's own: a share, where it is known what the surrogate asks for on them."""
        subject, config = self.subject, self.subject.config
        if config.naive or self._prompts or config.target != "frozen" or not config.concept_share:
            return [False] * self.count
        known = {"prompt": True, "images": False, "noise": knows_noise(subject.objective)}
        own = takes_concept(subject.pairs, config.concept_templates, self.count, config.concept_share)
        chosen, _, _ = surrogate_requests(subject.pairs, config.concept_templates, self.count)
        return [is_own and known[pair.surrogate.kind] for is_own, pair in zip(own, chosen, strict=True)]

    def identity(self) -> Identity:
        subject, config, settings = self.subject, self.subject.config, self.subject.surrogate_settings
        if self.given is not None:
            return content_identity("surrogates", self.given)
        if config.naive or self._prompts:
            conditions, sources = self._requests(self.count)
            seeds = list(range(self._first, self._first + len(sources)))
            return subject.generator.identity(self._name, conditions, sources, seeds, settings)
        return subject.generator.surrogate_identity(
            subject.pairs, config.concept_templates, self.count, config.seed, settings, self._own
        )

    @property
    def _name(self) -> str:
        return "naive" if self.subject.config.naive else "surrogate"

    def plan(self) -> list[str]:
        if self.given is not None:
            return [f"sample    {self.count} surrogate images are given"]
        folder = self._folder(self._drawn())
        note = reused(folder, MANIFEST_NAME) if folder else ""
        own = f", {sum(self._own)} of them the concept's own" if any(self._own) else ""
        return [f"sample    {self.count} surrogate images{own}, {describe(self.subject.surrogate_settings)}{note}"]

    def _drawn(self) -> list[int]:
        """Places of the samples that a prompt draws."""
        are_all = self._prompts or self.subject.config.naive
        return [i for i in range(self.count) if are_all or self._own[i] or self._kind(i) == "prompt"]

    def _kind(self, place: int) -> str:
        return self.subject.pairs[place % len(self.subject.pairs)].surrogate.kind

    def _folder(self, drawn: Sequence[int]) -> Path | None:
        """Where those samples are kept; None if there are none."""
        if not drawn:
            return None
        conditions, sources = self._requests(self.count)
        return self.subject.generator.folder(
            self._name, [conditions[i] for i in drawn], [(conditions if self._own[i] else sources)[i] for i in drawn],
            [self._first + i for i in drawn], self.subject.surrogate_settings,
        )  # fmt: skip

    @property
    def taught(self) -> float:
        """The share of the samples whose target the frozen model can say."""
        if self.subject.config.naive or not self.count:
            return 0.0
        if self.given is not None:
            return sum(map(is_prompt, self.given.sources)) / self.count
        return sum(bool(self._prompts) or self._kind(place) == "prompt" for place in self._drawn()) / self.count

    def cost(self) -> Passes:
        drawn = [] if self.given is not None else self._drawn()
        folder = self._folder(drawn)
        if folder is None or (folder / MANIFEST_NAME).is_file():
            return Passes()
        return self.subject.sampling(len(drawn), self.subject.surrogate_settings)

    def run(self, *inputs: Any) -> SampleSet:
        samples = self._samples()
        self.made = samples.passes
        return samples

    def _samples(self) -> SampleSet:
        subject, config, settings = self.subject, self.subject.config, self.subject.surrogate_settings
        if self.given is not None:
            return self.given
        if not config.naive and not self._prompts:
            return subject.generator.surrogates(
                subject.pairs, config.concept_templates, self.count, config.seed, settings, self._own
            )
        conditions, sources = self._requests(self.count)
        samples = subject.generator.prompted(self._name, conditions, sources, self._first, settings)
        if not config.naive:
            return samples
        # It goes away from the noise under either target: a teacher draws no one away from what it knows.
        return replace(samples, sources=[None] * len(samples))


class PromptedSamples:
    """Samples of prompts to remember, which replay and the Fisher information share."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @property
    def settings(self) -> SamplingSettings:
        return self.subject.replay_settings

    def made(self, name: str, prompts: Sequence[str], first: int) -> SampleSet:
        return self.subject.generator.prompted(name, prompts, prompts, first, self.settings)

    def identity(self, name: str, prompts: Sequence[str], first: int) -> Identity:
        seeds = list(range(first, first + len(prompts)))
        return self.subject.generator.identity(name, prompts, prompts, seeds, self.settings)

    def folder(self, name: str, prompts: Sequence[str], first: int) -> Path:
        return self.identity(name, prompts, first).folder(self.subject.config.resolved_artifacts_dir)

    def cost(self, name: str, prompts: Sequence[str], first: int) -> Passes:
        """About what the samples that are not kept yet take of the network."""
        if not prompts or (self.folder(name, prompts, first) / MANIFEST_NAME).is_file():
            return Passes()
        return self.subject.sampling(len(prompts), self.settings)


class ReplayStage(Stage):
    """The replay set: p(x | theta*, c_r) of eq. 4, without the concepts.

    Args:
        subject: The model, and what it is to remember.
        given: Samples in place of those that would be made. Prompts have come into the subject already.
    """

    title = "replay samples"
    depends_on = frozenset((*MODEL, *SAMPLING, "num_replay_images", "replay_prompts", "drop_naming_prompts",
                            "replay_unconditional_share", "replay_guidance_scale"))  # fmt: skip

    def __init__(self, subject: Subject, given: Samples | None = None) -> None:
        self.subject = subject
        self._first = first_seed("replay", subject.config.seed)
        self._prompted = PromptedSamples(subject)
        self.given: SampleSet | None = None
        self.are_prompts_given = given is not None and are_prompts(given)
        if given is not None and not self.are_prompts_given:
            self.given = given_samples(
                "replay", given, subject.objective, subject.replay_prompts, subject.config.resolution
            )

    @property
    def prompts(self) -> list[str]:
        return self.subject.replay_prompts

    def identity(self) -> Identity:
        if self.given is not None:
            return content_identity("replay", self.given)
        return self._prompted.identity("replay", self.prompts, self._first)

    def plan(self) -> list[str]:
        prompts = self.prompts
        if not prompts:
            return []
        if self.given is not None:
            return [f"          {len(prompts)} replay images of {len(set(prompts))} prompts are given"]
        folder = self._prompted.folder("replay", prompts, self._first)
        source = "classes" if self.subject.labels else self.subject.config.replay_prompts
        if self.are_prompts_given:
            source = "given"
        return [f"          {len(prompts)} replay images of {len(set(prompts))} prompts ({source}), "
                f"{describe(self._prompted.settings)}{reused(folder, MANIFEST_NAME)}"]  # fmt: skip

    def cost(self) -> Passes:
        return Passes() if self.given is not None else self._prompted.cost("replay", self.prompts, self._first)

    def run(self, *inputs: Any) -> SampleSet | None:
        if self.given is not None or not self.prompts:
            self.made = self.given.passes if self.given is not None else Passes()
            return self.given
        samples = self._prompted.made("replay", self.prompts, self._first)
        self.made = samples.passes
        return samples
