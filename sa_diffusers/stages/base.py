"""What a stage of an erasure is."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from ..identity import Identity
from ..passes import Passes


class Stage(ABC):
    """One step of an erasure, made of finished parts: it says what its product depends on, and what it costs, before
    anything runs.

    Attributes:
        title: What timings call it.
        depends_on: Settings that its product depends on.
        made: Once it has run, what its product took of the network when it was made, in this run or in earlier ones;
            None where that is not on record.
    """

    title: ClassVar[str]
    depends_on: ClassVar[frozenset[str]] = frozenset()
    made: Passes | None = None

    @abstractmethod
    def identity(self) -> Identity:
        """What the product depends on; known before it is made."""

    def plan(self) -> list[str]:
        """What will be made, what that takes, and what is reused: lines of the plan."""
        return []

    def cost(self) -> Passes:
        """About what a run will take of the network; nothing where the product is kept or given."""
        return Passes()

    @abstractmethod
    def run(self, *inputs: Any) -> Any:
        """The product: the kept one where nothing that it depends on has changed, else a new one.

        Args:
            *inputs: Products of earlier stages.
        """
