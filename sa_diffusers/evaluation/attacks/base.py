"""What an attack is to the robustness protocol."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...data.concepts import ErasurePair
from ...families import Objective
from ..groups import PromptGroup
from ..subject import Subject

TRANSLATED_TEMPLATES = (
    "une photo de {}",
    "ein Foto von {}",
    "una foto de {}",
    "una fotografia di {}",
    "een foto van {}",
    "uma foto de {}",
    "zdjęcie {}",
    "fotografie {}",
)


@dataclass(frozen=True)
class Inversion:
    """Settings of textual inversion (Gal et al., 2022) as a white-box attack.

    Attributes:
        steps: Optimiser steps.
        images: Images of the concept that the base model samples for the attacker.
        batch_size: Images a step.
        learning_rate: Of Adam; the one learned row of the embedding is the only parameter.
        start: The word whose embedding the new token starts from. `robustness_protocol` takes the surrogate's last
            word where none is given.
        seed: Of timesteps and noise.
    """

    steps: int = 500
    images: int = 16
    batch_size: int = 8
    learning_rate: float = 5e-3
    start: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class AttackSettings:
    """What attacks are told.

    Attributes:
        held_out: Phrasings that no training saw; `{}` stands for the concept.
        translations: Prompts in other languages; `{}` may stand for the concept.
        inversion: Settings of textual inversion; None leaves it out.
    """

    held_out: Sequence[str] = ()
    translations: Sequence[str] = TRANSLATED_TEMPLATES
    inversion: Inversion | None = None


@dataclass(frozen=True)
class Prepared:
    """What an attack has changed in a model.

    Attributes:
        digest: Of what it changed: samples are kept under it and the model's own fingerprint.
        facts: Further fields of the attack's entry in the report.
    """

    digest: str
    facts: dict[str, Any]


class Attack(ABC):
    """One attempt to bring a concept back. Subclasses stand under `@register_attack("name in reports")`.

    Attributes:
        name: What reports call it.
        phrasing: Whether its rows count for the verdict: `"trained"` and `"held-out"` do, `"attack"` does not.
    """

    name = ""
    phrasing = "attack"

    def __init__(self, settings: AttackSettings) -> None:
        self.settings = settings

    @abstractmethod
    def prompts(self, pair: ErasurePair) -> Sequence[str]:
        """What is asked for, in turn; without any, the attack is left out."""

    def group(
        self, pair: ErasurePair, count: int, first_seed: int, label_of: Callable[[str], int | None] = lambda _: None
    ) -> PromptGroup | None:
        """Its row in the report: `count` images from `first_seed` on; None without a prompt."""
        prompts = self.prompts(pair)
        if not prompts:
            return None
        texts = tuple(prompts[index % len(prompts)] for index in range(count))
        into = label_of(pair.surrogate.value) if pair.surrogate.kind == "prompt" else None
        seeds = tuple(range(first_seed, first_seed + count))
        return PromptGroup(
            self.name, "concept", texts, seeds, label_of(pair.concept), into, pair.concept, self.phrasing
        )

    @contextmanager
    def prepared(self, objective: Objective, pair: ErasurePair, subject: Subject) -> Iterator[Prepared | None]:
        """Change the model that is attacked for as long as its images are sampled, and give back what was changed.

        Args:
            objective: The model; other attacks use it afterwards.
            pair: What was erased.
            subject: The evaluation; `subject.base` is what the attacker knows the concept from.

        Yields:
            What was changed; None where nothing was.
        """
        yield None
