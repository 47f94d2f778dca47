"""Intervals and distances."""

import math

import torch


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share (95 % by default).

    Raises:
        ValueError: There are no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials: need 0 <= successes <= trials, trials >= 1")
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `[d]` and covariance `[d, d]` of features `[n, d]`, in float64."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / max(len(features) - 1, 1)


def frechet_distance(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The Fréchet distance of two Gaussians, each given by mean `[d]` and covariance `[d, d]`.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); the trace of the root comes from the eigenvalues of
    C1^(1/2) C2 C1^(1/2), which is symmetric.
    """
    (mean1, covariance1), (mean2, covariance2) = first, second
    values, vectors = torch.linalg.eigh(covariance1.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ covariance2.double() @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * shared
    return float(distance)
