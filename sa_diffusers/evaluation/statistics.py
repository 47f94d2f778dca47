"""Moved to `sa_diffusers.results.statistics`."""

from ..moved import forward

__getattr__ = forward(__name__, "results.statistics")
