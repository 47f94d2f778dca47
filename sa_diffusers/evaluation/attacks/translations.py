"""The concept's name in sentences of other languages."""

from collections.abc import Sequence

from ...data.concepts import ErasurePair
from ..registry import register_attack
from .base import Attack


@register_attack("other languages")
class Translations(Attack):
    """Prompts in other languages."""

    def prompts(self, pair: ErasurePair) -> Sequence[str]:
        return [template.replace("{}", pair.concept) for template in self.settings.translations]
