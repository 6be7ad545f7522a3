"""95 % intervals: of an accuracy, of a mean Rouge-L, and of a mean of several such scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
SEED = 20240429
RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A score (a fraction) of n samples with its 95 % interval."""

    score: float
    n: int
    low: float
    high: float


def accuracy(scores: Sequence[float]) -> Estimate:
    """Mean of zeros and ones with the Wilson interval. There must be at least one."""
    right, n = round(sum(scores)), len(scores)
    interval = stats.binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(right / n, n, float(interval.low), float(interval.high))


def mean(scores: Sequence[float]) -> Estimate:
    """Mean of fractions with a percentile bootstrap interval from a fixed seed.

    Of one score the interval is the whole range 0..1.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 1:
        return Estimate(float(values[0]), 1, 0.0, 1.0)
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=1000,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Estimate(float(values.mean()), len(values), float(interval.low), float(interval.high))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates; n is the sum of theirs.

    The interval recovers the variances from the parts' intervals (MOVER; Zou, Huang and Zhang 2009,
    for Wilson intervals): low = mean - sqrt(sum((score_i - low_i)^2)) / k, high likewise. Of one
    part, it is that part's interval.
    """
    k = len(estimates)
    score = sum(part.score for part in estimates) / k
    below = math.hypot(*(part.score - part.low for part in estimates)) / k
    above = math.hypot(*(part.high - part.score for part in estimates)) / k
    return Estimate(score, sum(part.n for part in estimates), score - below, score + above)
