"""Intervals and distances."""

import math
from collections.abc import Sequence

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
    # Of equal ones rounding may leave less than nothing.
    return float(distance.clamp(min=0))


def images_for(share: float, bound: float) -> int | None:
    """From how many images on the Wilson interval of a share ends at or below a bound; None if at no number.

    Args:
        share: In [0, 1].
        bound: In (0, 1].
    """
    if share >= bound:
        return None
    count = 1
    while wilson_interval(min(count, math.ceil(share * count - 1e-9)), count)[1] > bound:
        count += 1 if count < 1000 else count // 100
    return count


def sign_test(lost: int, gained: int) -> float:
    """One-sided sign test of pairs that differ: the probability of so many losses, or more, if neither were likelier.

    Args:
        lost: Pairs that were a success only before.
        gained: Pairs that were a success only after.
    """
    pairs = lost + gained
    return sum(math.comb(pairs, count) for count in range(lost, pairs + 1)) / 2**pairs


def holm(probabilities: Sequence[float]) -> list[float]:
    """Probabilities of several tests, corrected for their number (Holm, 1979), in the order given."""
    corrected, largest = [0.0] * len(probabilities), 0.0
    order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * probabilities[index]))
        corrected[index] = largest
    return corrected
