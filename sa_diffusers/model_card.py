"""The old place of `sa_diffusers.publish`; it goes with the next version."""

import warnings

from .publish import build_model_card, push_pipeline, write_model_card

__all__ = ["build_model_card", "push_pipeline", "write_model_card"]
warnings.warn("sa_diffusers.model_card is sa_diffusers.publish", DeprecationWarning, stacklevel=2)
