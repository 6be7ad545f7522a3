"""The 95 % interval of a mean score of answers."""

import math
from collections.abc import Hashable, Iterable, Sequence
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)


def mean_with_interval(
    scores: Sequence[float], rows: Iterable[Hashable]
) -> tuple[float, float, float]:
    """The mean of scores from 0 to 1, and its interval: (mean, low, high). `rows` says of which row
    each score is, for the questions of a row share pictures and history and are not independent.

    Wilson's interval (1927) with the effective number of questions n* in the place of n (Korn and
    Graubard 1998; compared by Franco et al. 2019, J. Surv. Stat. Methodol. 7:334):

        n* = p (1 - p) / v,  v = sum over rows of (sum over its questions of (score - p))^2 / n^2

    at most n; where all are right, or all wrong, as many as there are rows. With one right or wrong
    answer a row it is Wilson's own. There must be a score.
    """
    score = np.asarray(scores, dtype=np.float64)
    n, mean = len(score), float(score.mean())
    residuals: dict[Hashable, float] = {}
    for row, residual in zip(rows, score - mean, strict=True):
        residuals[row] = residuals.get(row, 0.0) + float(residual)
    variance = sum(residual**2 for residual in residuals.values()) / n**2
    spread = mean * (1 - mean)
    effective = float(len(residuals))
    if spread > 1e-12:
        effective = spread / max(variance, spread / n)
    middle = mean + Z**2 / (2 * effective)
    half = Z * math.sqrt(spread / effective + Z**2 / (4 * effective**2))
    scale = 1 + Z**2 / effective
    return mean, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
