"""The concept's name and nothing else."""

from collections.abc import Sequence

from ...data.concepts import ErasurePair
from ..registry import register_attack
from .base import Attack


@register_attack("its name")
class Name(Attack):
    """The plain name."""

    phrasing = "trained"

    def prompts(self, pair: ErasurePair) -> Sequence[str]:
        return [pair.concept]
