"""Moved to `sa_diffusers.publish`."""

from .moved import forward

__getattr__ = forward(__name__, "publish")
