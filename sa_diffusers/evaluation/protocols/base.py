"""What a protocol is to `sa-diffusers evaluate`."""

from abc import ABC, abstractmethod
from typing import ClassVar

from ..comparison import Comparison
from ..request import Evaluation, Request
from ..subject import Subject


class Protocol(ABC):
    """What is sampled and measured. Subclasses stand under `@register_protocol("name")`.

    It is made before any model is loaded: what it can know then to be missing or wrong, it refuses, and it reads the
    files and loads the detectors that it needs.

    Attributes:
        takes: `"prompts"` if it needs a model that takes them: one of classes is refused before it is loaded. None if
            it is left to the protocol.

    Raises:
        ValueError: Something that it needs is not given, or not as it should be.
    """

    takes: ClassVar[str | None] = None

    def __init__(self, request: Request) -> None:
        self.request = request

    @abstractmethod
    def run(self, evaluation: Evaluation) -> Comparison | None:
        """Sample, measure, compare; None in all processes but the main one.

        Raises:
            ValueError: The models are not as they should be.
        """


def needs_prompts(subject: Subject, protocol: str) -> None:
    """Refuse a model of classes.

    Raises:
        ValueError: It is one.
    """
    if subject.base.labels is not None:
        raise ValueError(f"the {protocol} protocol needs a model that takes prompts; this one is of classes")
