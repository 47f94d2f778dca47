"""Diagonal Fisher information: estimating, saving, loading."""

from .estimator import FisherEstimator, check_kind, fisher_identity
from .information import FisherInformation

__all__ = ["FisherEstimator", "FisherInformation", "check_kind", "fisher_identity"]
