"""Diagonal Fisher information: estimating, saving, loading."""

from .estimator import FisherEstimator, fisher_identity
from .information import FisherInformation

__all__ = ["FisherEstimator", "FisherInformation", "fisher_identity"]
