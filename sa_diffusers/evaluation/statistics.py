"""The old place of `sa_diffusers.results.statistics`; it goes with the next version."""

import warnings

from ..results.statistics import frechet_distance, moments, wilson_interval

__all__ = ["frechet_distance", "moments", "wilson_interval"]
warnings.warn("sa_diffusers.evaluation.statistics is sa_diffusers.results.statistics", DeprecationWarning, stacklevel=2)
