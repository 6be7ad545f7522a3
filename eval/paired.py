"""Scores of the same questions under different conditions: means and paired differences.

The design is crossed: every run of a row (one training seed each) answers the same questions. The
units that are drawn at random are rows of data (a row with all its questions) and training seeds,
so a score, or a difference of scores, of seed s on unit u has three random parts:

    z_su = mean + seed_s + unit_u + rest_su

With S seeds, U units and the mean squares of the two-way table, three terms say how much the mean
varies as seen from the seeds, the units and the rest:

    by seed  MS_seed / (S U) = sum_s (z_s. - z..)^2 / (S (S - 1))
    by unit  MS_unit / (S U) = sum_u (z_.u - z..)^2 / (U (U - 1))
    rest     MS_rest / (S U) = sum_su (z_su - z_s. - z_.u + z..)^2 / (S U (S - 1) (U - 1))

    Var(z..) = by seed + by unit - rest

with Satterthwaite's (1946) degrees of freedom; test and interval are Student's. The formula is that
of random effects in a crossed design (Cornfield and Tukey 1956; Searle, Casella and McCulloch,
Variance Components, 1992, ch. 4). `python -m eval.coverage` says how often the intervals cover.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from eval import intervals
from eval.intervals import CONFIDENCE, Estimate

OVERALL = "overall"


@dataclass(frozen=True)
class QuestionsOfTask:
    """The questions of one task: the index of each one's unit, 0 .. units - 1."""

    name: str
    unit: np.ndarray

    @property
    def counts_U(self) -> np.ndarray:
        """Questions of each unit."""
        return np.bincount(self.unit)

    def by_unit(self, scores_SQ: np.ndarray) -> np.ndarray:
        """z [S, U], with the mean over questions of each run as the mean of its line.

        A unit's value is its mean score, weighted by how many questions it has: the linear form of
        the ratio (sum of scores) / (number of questions), where units are of different sizes.
        """
        counts_U, mean = self.counts_U, scores_SQ.mean()
        sums_SU = np.stack([np.bincount(self.unit, weights=row) for row in scores_SQ])
        return mean + (sums_SU - mean * counts_U) / counts_U.mean()


@dataclass(frozen=True)
class Mean:
    """A mean over runs, units and tasks with its standard error.

    units: of all tasks.
    """

    value: float
    error: float
    freedom: float
    units: int

    def interval(self) -> tuple[float, float]:
        half = self.error * float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom))
        return self.value - half, self.value + half

    def p(self) -> float:
        """Two-sided p of a mean of zero.

        Where nothing varies, it is that of as many signs as there are units, all alike.
        """
        if self.error < 1e-12:
            return 1.0 if abs(self.value) < 1e-12 else 0.5 ** (self.units - 1)
        return float(2 * stats.t.sf(abs(self.value) / self.error, self.freedom))


@dataclass(frozen=True)
class Comparison:
    """Scores A minus scores B on the same questions.

    better, worse: on how many questions (times runs) A scores more, or less. by_run: the difference
    of each run. error, freedom: of the t test.
    """

    difference: float
    low: float
    high: float
    better: int
    worse: int
    p: float
    n: int
    error: float
    freedom: float
    by_run: list[float]


Scores = Mapping[str, np.ndarray]  # {task: [S, questions]}


def mean(tasks: Sequence[QuestionsOfTask], scores: Scores) -> Mean:
    """The mean of the tasks' means.

    Units of different tasks are independent; a seed is the same in all tasks, so the tasks are
    averaged within a seed before seeds are compared. A component that is estimated below zero
    counts as zero. Of one run only the units vary: the training seed is taken as given. One unit
    alone says nothing: its standard error is 1.
    """
    values = {task.name: task.by_unit(scores[task.name]) for task in tasks}
    runs = len(next(iter(values.values())))
    means_S = sum(z_SU.mean(1) for z_SU in values.values()) / len(tasks)
    units, value = sum(z_SU.shape[1] for z_SU in values.values()), float(means_S.mean())
    if any(z_SU.shape[1] < 2 for z_SU in values.values()):
        return Mean(value, 1.0, 1.0, units)
    by_unit, rest = [], []  # of each task: its part of the variance, and degrees of freedom
    for z_SU in values.values():
        count = z_SU.shape[1]
        share = 1 / (len(tasks) ** 2 * count)
        by_unit.append((share * z_SU.mean(0).var(ddof=1), count - 1))
        if runs > 1:
            rest_SU = z_SU - z_SU.mean(0) - z_SU.mean(1, keepdims=True) + z_SU.mean()
            freedom = (runs - 1) * (count - 1)
            rest.append((share * (rest_SU**2).sum() / freedom / runs, freedom))
    by_seed = [(means_S.var(ddof=1) / runs, runs - 1)] if runs > 1 else []
    sums = [sum(part for part, _ in parts) for parts in (by_seed, by_unit, rest)]
    seed_varies, unit_varies = sums[0] > sums[2], sums[1] > sums[2]
    signs = [seed_varies, unit_varies, 1 - seed_varies - unit_varies]
    variance = sum(sign * part for sign, part in zip(signs, sums))
    spread = 0.0
    for sign, parts in zip(signs, (by_seed, by_unit, rest)):
        spread += sum((sign * part) ** 2 / freedom for part, freedom in parts)
    return Mean(value, math.sqrt(variance), variance**2 / spread if spread else 1.0, units)


def estimate(tasks: Sequence[QuestionsOfTask], scores: Scores) -> Estimate:
    """Mean score of the tasks with its interval; n counts questions, not runs.

    One run and independent questions: Wilson for zeros and ones, and of several tasks the interval
    from theirs (MOVER). Otherwise Student's, within 0..1; where all scores are 0, or all 1, which
    leaves it nothing to vary, Wilson for as many questions as there are units.
    """
    wilson = []
    for task in tasks:
        scores_SQ, units = scores[task.name], len(task.counts_U)
        binary = bool(np.isin(scores_SQ, (0, 1)).all())
        if binary and len(scores_SQ) == 1 and units == scores_SQ.shape[1]:
            wilson.append(intervals.accuracy(scores_SQ[0]))
        elif binary and scores_SQ.min() == scores_SQ.max():
            few = intervals.accuracy([float(scores_SQ.mean())] * units)
            wilson.append(Estimate(few.score, scores_SQ.shape[1], few.low, few.high))
    student = mean(tasks, scores)
    if len(wilson) == len(tasks) and (len(scores[tasks[0].name]) == 1 or student.error == 0):
        return intervals.average(wilson)
    low, high = student.interval()
    n = sum(len(task.unit) for task in tasks)
    return Estimate(student.value, n, max(low, 0.0), min(high, 1.0))


def by_run(tasks: Sequence[QuestionsOfTask], scores: Scores) -> list[float]:
    """The mean of the tasks' means, of each run."""
    return [float(value) for value in sum(scores[task.name].mean(1) for task in tasks) / len(tasks)]


def difference(a: Scores, b: Scores) -> dict[str, np.ndarray]:
    """A minus B, question by question and run by run [S, Q].

    A single run is paired with each of the other's.
    """
    return {name: np.atleast_2d(a[name]).astype(np.float64) - np.atleast_2d(b[name]) for name in a}


def compare(tasks: Sequence[QuestionsOfTask], differences: Scores) -> Comparison:
    """The comparison of the mean of the tasks."""
    average, better, worse, n = mean(tasks, differences), 0, 0, 0
    for task in tasks:
        d_SQ = differences[task.name]
        better, worse = better + int((d_SQ > 0).sum()), worse + int((d_SQ < 0).sum())
        n += d_SQ.shape[1]
    low, high = average.interval()
    return Comparison(
        difference=average.value,
        low=max(low, -1.0),
        high=min(high, 1.0),
        better=better,
        worse=worse,
        p=average.p(),
        n=n,
        error=average.error,
        freedom=average.freedom,
        by_run=by_run(tasks, differences),
    )


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm).

    The chance of any false one among them stays below the level.
    """
    return [float(p) for p in multipletests(ps, method="holm")[1]] if ps else []
