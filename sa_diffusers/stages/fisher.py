"""The Fisher information, and the samples that it is estimated from."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.generation import surrogate_requests
from ..data.sample_set import SampleSet
from ..environment import precision_in_use
from ..files import DamagedArtefact, load_kept
from ..fisher import FisherEstimator, FisherInformation, check_kind, fisher_identity
from ..fisher.information import FISHER_CONFIG_NAME, FORMAT_VERSION, digest_of_values
from ..identity import Identity, fingerprint
from ..passes import Passes, together
from ..processes import finishing, wait_until
from ..seeds import first_seed
from .base import Stage
from .samples import PromptedSamples, ReplayStage
from .subject import Subject, reused


class FisherStage(Stage):
    """The Fisher information: given, kept, or estimated.

    Args:
        subject: The model and what it is to forget.
        replay: Its replay samples, which are used for this too.
        given: Information, or where it is, in place of that of the settings.

    Raises:
        ValueError: The given information does not fit the model.
    """

    title = "fisher"
    depends_on = ReplayStage.depends_on | {"concept_templates", "fisher_kind", "num_fisher_samples",
                                           "fisher_timesteps", "fisher_concept_share", "train_method", "snr_gamma",
                                           "noise_offset", "fisher_form"}  # fmt: skip

    def __init__(
        self, subject: Subject, replay: ReplayStage, given: FisherInformation | str | Path | None = None
    ) -> None:
        self.subject = subject
        self.replay = replay
        self._prompted = PromptedSamples(subject)
        self._first = first_seed("concept", subject.config.seed)
        check_kind(subject.config.fisher_kind, subject.objective)
        own = fisher_identity(subject.objective, subject.module, subject.config.train_method, subject.base)
        self.facts = {**own, "fisher_kind": subject.config.fisher_kind}
        self._parameters: Mapping[str, torch.Tensor] = subject.parameters
        if subject.layers and subject.config.fisher_form == "rows_by_columns":
            # The diagonal is the same for weights and adapters; of rows and columns only these have a use.
            self.facts["fisher_form"] = subject.config.fisher_form
            names = [f"{name}.weight" for name in subject.layers.sizes]
            self._parameters = {name: subject.parameters[name] for name in names}
        self.given: FisherInformation | None = None
        self._source = given if given is not None else subject.config.fisher
        if self._source is not None and self.is_needed:
            self.given = self._loaded(self._source)
            self.given.check(self.facts, self._parameters)

    def _loaded(self, source: FisherInformation | str | Path) -> FisherInformation:
        if isinstance(source, FisherInformation):
            return source
        if not isinstance(source, (str, Path)):
            raise ValueError(
                f"fisher: what is of type {type(source).__name__} will not do: give a FisherInformation, its folder or "
                "its name on the Hub"
            )
        return FisherInformation.from_pretrained(source, cache_dir=self.subject.config.cache_dir)

    @property
    def is_needed(self) -> bool:
        return self.subject.config.consolidates

    def _parts(self) -> tuple[list[str], int, list[str]]:
        """What the samples are: prompts of the concepts, how many of the replay set, and further prompts."""
        subject, config, prompts = self.subject, self.subject.config, self.replay.prompts
        total, share = config.num_fisher_samples, config.fisher_concept_share
        if share is None:
            share = len(subject.pairs) / len(subject.labels) if subject.labels else 0.0
        count = min(total, max(len(subject.pairs), round(total * share))) if share else 0
        _, concepts, _ = surrogate_requests(subject.pairs, config.concept_templates, count)
        from_replay = min(total - count, len(prompts))
        others = prompts or subject.captions(total - count)
        further = [others[place % len(others)] for place in range(from_replay, total - count)]
        return concepts, from_replay, further

    def samples(self, replay: SampleSet | None = None) -> SampleSet:
        """Samples of all prompts, the concepts' included.

        Args:
            replay: The replay set, if it is at hand.
        """
        concepts, from_replay, further = self._parts()
        parts = [self._prompted.made("concept", concepts, self._first)] if concepts else []
        if from_replay:
            kept = replay if replay is not None else self.replay.run()
            assert kept is not None
            part = kept.subset(list(range(from_replay)))
            # A replay set that is at hand has its cost under its own stage.
            part.passes = kept.passes if replay is None else Passes()
            parts.append(part)
        if further:
            parts.append(self._prompted.made("fisher-samples", further, self._first + len(concepts)))
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        return whole

    def _timesteps(self) -> int | None:
        """None for all: also where the model has no more of them than are asked for (a VAE has one)."""
        asked = self.subject.config.fisher_timesteps
        return asked if asked and asked < self.subject.objective.num_train_timesteps else None

    def identity(self) -> Identity:
        """What an estimate depends on."""
        subject = self.subject
        concepts, from_replay, further = self._parts()
        facts = {
            **self.facts,
            "timesteps": self._timesteps(),
            "seed": subject.config.seed,
            "precision": precision_in_use(subject.accelerator),
            "concepts": self._prompted.identity("concept", concepts, self._first).digest,
            "replay": [self.replay.identity().digest, from_replay],
            "further": self._prompted.identity("fisher-samples", further, self._first + len(concepts)).digest,
            "format": FORMAT_VERSION,
        }
        return Identity("fisher", facts)

    def digest(self) -> str | None:
        """What a training depends on of it; None where it needs none."""
        if not self.is_needed:
            return None
        if self.given is None:
            return self.identity().digest
        # What is in memory may be other than what its record says.
        held = isinstance(self._source, FisherInformation)
        return fingerprint([self.given.config, digest_of_values(self.given.values)] if held else self.given.config)

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.identity().folder(self.subject.config.resolved_artifacts_dir)

    def plan(self) -> list[str]:
        if not self.is_needed:
            return ["fisher    none: there is no EWC term"]
        if self.given is not None:
            return ["fisher    given" if isinstance(self._source, FisherInformation) else
                    f"fisher    reused: {self._source}"]  # fmt: skip
        steps = self._timesteps() or self.subject.objective.num_train_timesteps
        note = reused(self.folder, FISHER_CONFIG_NAME)
        config = self.subject.config
        form = ", rows by columns" if "fisher_form" in self.facts else ""
        return [f"fisher    {config.num_fisher_samples} samples x {steps} timesteps, {config.fisher_kind}{form}{note}"]

    def cost(self) -> Passes:
        config = self.subject.config
        if not self.is_needed or self.given is not None or (self.folder / FISHER_CONFIG_NAME).is_file():
            return Passes()
        concepts, from_replay, further = self._parts()
        rows = config.num_fisher_samples * (self._timesteps() or self.subject.objective.num_train_timesteps)
        passes = Passes(rows, rows)
        passes.add(self._prompted.cost("concept", concepts, self._first))
        passes.add(self._prompted.cost("fisher-samples", further, self._first + len(concepts)))
        if from_replay and not config.replays:
            # Else they are sampled for the replay loss first.
            passes.add(self.replay.cost())
        return passes

    def run(self, *inputs: Any) -> FisherInformation | None:
        """The Fisher information; None where none is needed.

        Args:
            *inputs: The replay set, if it is at hand.
        """
        information = self._information(*inputs)
        self.made = information.passes if information is not None else Passes()
        return information

    def _information(self, *inputs: Any) -> FisherInformation | None:
        if not self.is_needed or self.given is not None:
            return self.given
        subject, wanted = self.subject, self.identity()
        folder = wanted.folder(subject.config.resolved_artifacts_dir)

        def load(place: Path) -> FisherInformation:
            found = FisherInformation.from_pretrained(place)
            if found.config.get("identity") != wanted.digest:
                raise DamagedArtefact(f"{place} holds other Fisher information than its name says")
            return found

        information = load_kept(folder, load, subject.is_main)
        if information is not None and subject.is_main:
            # A run that died between its arrival and the removal of its parts.
            shutil.rmtree(_partial(folder), ignore_errors=True)
        # The estimate takes all processes, or none.
        found = torch.tensor(float(information is not None), device=subject.accelerator.device)
        if subject.accelerator.reduce(found, reduction="sum") < subject.accelerator.num_processes:
            information = self._estimated(folder, wanted, *inputs)
        assert information is not None
        information.check(self.facts, self._parameters)
        return information

    def _estimated(self, folder: Path, identity: Identity, *inputs: Any) -> FisherInformation:
        subject, config = self.subject, self.subject.config
        estimator = FisherEstimator(
            subject.objective, self._parameters, self._timesteps(), config.fisher_batch_size, config.seed,
            subject.accelerator, config.fisher_kind, config.fisher_on_cpu, self.facts.get("fisher_form", "diagonal"),
            config.gradient_checkpointing,
        )  # fmt: skip
        recorded = {"base_model": config.pretrained_model_name_or_path, "revision": subject.revision, **self.facts,
                    "identity": identity.digest}  # fmt: skip
        partial = _partial(folder)
        samples = self.samples(*inputs)
        information = estimator.estimate(samples, recorded, partial)
        information.passes = together([information.passes, samples.passes])
        if subject.is_main:
            with finishing():
                information.save_pretrained(folder)
                shutil.rmtree(partial, ignore_errors=True)
        else:
            wait_until(folder.is_dir)
        return FisherInformation.from_pretrained(folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".part-{folder.name}")
