"""Moved to `sa_diffusers.training`."""

from .moved import forward

__getattr__ = forward(__name__, "training.trainer", "training.settings", "training.trainable", "environment")
