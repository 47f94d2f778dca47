"""Ways to bring an erased concept back, one a file: other words for it, and what changes the model for a while."""

from .base import Attack, AttackSettings, Inversion, Prepared

__all__ = ["Attack", "AttackSettings", "Inversion", "Prepared"]
