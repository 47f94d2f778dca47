"""What a stage of an erasure is."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from ..identity import Identity


class Stage(ABC):
    """One step of an erasure, made of finished parts: it says what its product depends on, and what it costs, before
    anything runs.

    Attributes:
        title: What timings call it.
        depends_on: Settings that its product depends on.
    """

    title: ClassVar[str]
    depends_on: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def identity(self) -> Identity:
        """What the product depends on; known before it is made."""

    def plan(self) -> list[str]:
        """What will be made, what that takes, and what is reused: lines of the plan."""
        return []

    @abstractmethod
    def run(self, *inputs: Any) -> Any:
        """The product: the kept one where nothing that it depends on has changed, else a new one.

        Args:
            *inputs: Products of earlier stages.
        """
