"""The concept's name in phrasings that no training saw."""

from collections.abc import Sequence

from ...data.concepts import ErasurePair
from ...data.phrasings import fill_template
from ..registry import register_attack
from .base import Attack


@register_attack("paraphrases")
class Paraphrases(Attack):
    """Held-out phrasings."""

    phrasing = "held-out"

    def prompts(self, pair: ErasurePair) -> Sequence[str]:
        return [fill_template(template, pair.concept) for template in self.settings.held_out]
