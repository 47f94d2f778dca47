"""Moved to `sa_diffusers.report` and `sa_diffusers.results.figures`."""

from ..moved import forward

__getattr__ = forward(__name__, "report", "results.figures")
