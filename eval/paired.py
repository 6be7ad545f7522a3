"""Scores of the same questions under different conditions: estimates and paired differences.

The design is crossed: every run of a row (one training seed each) answers the same questions. A
bootstrap replicate draws runs and, independently, units of questions (a row with all its turns),
both with replacement, so an interval covers the choice of questions and, where there are several
runs, of training seeds. Shape names: C conditions, S runs, U units of one task, Q questions, R
replicates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from eval import intervals
from eval.intervals import CONFIDENCE, RESAMPLES, SEED, Estimate

OVERALL = "overall"
CHUNK = 500  # replicates at a time
LARGEST = 20_000  # sum of absolute differences up to which all sign flips are counted


@dataclass(frozen=True)
class QuestionsOfTask:
    """The questions of one task: the index of each one's unit, 0 .. units - 1."""

    name: str
    unit: np.ndarray

    @property
    def counts_U(self) -> np.ndarray:
        """Questions of each unit."""
        return np.bincount(self.unit)

    def sums(self, scores_SQ: np.ndarray) -> np.ndarray:
        """Scores added up by unit [S, U]."""
        return np.stack([np.bincount(self.unit, weights=row) for row in np.atleast_2d(scores_SQ)])


@dataclass(frozen=True)
class Comparison:
    """Scores A minus scores B on the same questions.

    better, worse: on how many questions (times runs) A scores more, or less. p: of the two-sided
    sign-flip test, which for zeros and ones and one question a unit is McNemar's exact test.
    """

    difference: float
    low: float
    high: float
    better: int
    worse: int
    p: float
    n: int


Scores = Mapping[str, np.ndarray]  # {task: [S, questions]}


def replicates(
    tasks: Sequence[QuestionsOfTask],
    conditions: Sequence[Scores],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, np.ndarray]:
    """{task, or "overall": bootstrap replicates of each condition's mean score [C, R]}.

    A condition is a score, or a difference of scores, for every task, run and question. "overall"
    is the mean of the tasks. All conditions see the same draws, so replicates of a difference are
    differences of replicates.
    """
    rng = np.random.default_rng(seed)
    runs = max(max(_runs(scores)) for scores in conditions)
    drawn_RS = rng.multinomial(runs, [1 / runs] * runs, size=resamples) / runs
    by_task, total = {}, np.zeros((len(conditions), resamples))
    for task in tasks:
        units = len(task.counts_U)
        sums_SU = [task.sums(scores[task.name]) for scores in conditions]
        sums_CSU = np.stack([np.broadcast_to(sums, (runs, units)) for sums in sums_SU])
        means = np.empty((len(conditions), resamples))
        for begin in range(0, resamples, CHUNK):
            end = min(begin + CHUNK, resamples)
            weights_RU = rng.multinomial(units, [1 / units] * units, size=end - begin)
            weights_RU = weights_RU.astype(np.float64)
            sums_CSR = sums_CSU @ weights_RU.T
            sums_CR = np.einsum("csr,rs->cr", sums_CSR, drawn_RS[begin:end])
            means[:, begin:end] = sums_CR / (weights_RU @ task.counts_U)
        by_task[task.name] = means
        total += means
    return {**by_task, OVERALL: total / len(tasks)}


def _runs(scores: Scores) -> list[int]:
    """How many runs each task has."""
    return [scores_SQ.shape[0] for scores_SQ in scores.values()]


def interval(replicates_R: np.ndarray) -> tuple[float, float]:
    """The percentile interval."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(replicates_R, [tail, 1 - tail])
    return float(low), float(high)


def estimate(task: QuestionsOfTask, scores_SQ: np.ndarray, replicates_R: np.ndarray) -> Estimate:
    """Mean score of one task with its interval; n counts questions, not runs.

    One run and independent questions: Wilson for zeros and ones. Otherwise the bootstrap; where all
    scores are 0, or all 1, which leaves it nothing to vary, Wilson for as many questions as there
    are units.
    """
    score, questions, units = float(scores_SQ.mean()), scores_SQ.shape[1], len(task.counts_U)
    binary = bool(np.isin(scores_SQ, (0, 1)).all())
    if binary and scores_SQ.shape[0] == 1 and units == questions:
        return intervals.accuracy(scores_SQ[0])
    if binary and score in (0.0, 1.0):
        few = intervals.accuracy([score] * units)
        return Estimate(score, questions, few.low, few.high)
    return Estimate(score, questions, *interval(replicates_R))


def estimates(
    tasks: Sequence[QuestionsOfTask], scores: Scores, replicates_by_task: Mapping[str, np.ndarray]
) -> dict[str, Estimate]:
    """{task, or "overall": estimate} of one condition.

    Overall is the mean of the tasks: of one run with the interval from those of the tasks (MOVER),
    of several with the bootstrap's.
    """
    estimates = {}
    for task in tasks:
        estimates[task.name] = estimate(task, scores[task.name], replicates_by_task[task.name])
    overall = intervals.average(list(estimates.values()))
    varied = any(part.score not in (0.0, 1.0) for part in estimates.values())
    if varied and max(_runs(scores)) > 1:
        overall = Estimate(overall.score, overall.n, *interval(replicates_by_task[OVERALL]))
    return {**estimates, OVERALL: overall}


def difference(a: Scores, b: Scores) -> dict[str, np.ndarray]:
    """A minus B, question by question and run by run [S, Q].

    A single run is paired with each of the other's.
    """
    return {name: np.atleast_2d(a[name]).astype(np.float64) - np.atleast_2d(b[name]) for name in a}


def compare(
    tasks: Sequence[QuestionsOfTask],
    differences: Scores,
    replicates_by_task: Mapping[str, np.ndarray],
) -> dict[str, Comparison]:
    """{task, or "overall": comparison} from the differences and their bootstrap replicates [R]."""
    comparisons, means, flips = {}, [], []
    questions = math.lcm(*(differences[task.name].shape[1] for task in tasks))
    for task in tasks:
        d_SQ = differences[task.name]
        better, worse, n = int((d_SQ > 0).sum()), int((d_SQ < 0).sum()), d_SQ.shape[1]
        d_U = task.sums(d_SQ).sum(0)
        means.append(float(d_SQ.mean()))
        flips.append(d_U * (questions // n))
        low, high = interval(replicates_by_task[task.name])
        p = sign_flip_p(d_U)
        comparisons[task.name] = Comparison(means[-1], low, high, better, worse, p, n)
    better = sum(comparison.better for comparison in comparisons.values())
    worse = sum(comparison.worse for comparison in comparisons.values())
    n = sum(comparison.n for comparison in comparisons.values())
    p = sign_flip_p(np.concatenate(flips))
    low, high = interval(replicates_by_task[OVERALL])
    comparisons[OVERALL] = Comparison(sum(means) / len(means), low, high, better, worse, p, n)
    return comparisons


def sign_flip_p(d_U: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> float:
    """Two-sided p of the null hypothesis that a difference is as likely to have the other sign.

    p = P(|sum of e_u d_u| >= |sum of d_u|) over random signs e_u of the units: counted exactly
    where all differences are whole numbers of a moderate sum, otherwise over `resamples` random
    draws, the observed one among them. With differences of -1, 0 and 1 it is the exact binomial
    test on the discordant pairs, McNemar's. Several runs of a question are one unit, so that their
    dependence is respected; the runs themselves are taken as given.
    """
    sizes, observed = np.abs(d_U[np.abs(d_U) > 1e-12]), abs(float(d_U.sum()))
    if len(sizes) == 0:
        return 1.0
    whole = np.rint(sizes).astype(np.int64)
    if np.allclose(sizes, whole, atol=1e-9):
        divisor = int(np.gcd.reduce(whole))
        if whole.sum() // divisor <= LARGEST:
            return _all_flips(whole // divisor, round(observed) // divisor)
    rng, extreme = np.random.default_rng(seed), 0
    for begin in range(0, resamples, CHUNK):
        signs = 2.0 * rng.integers(0, 2, size=(min(CHUNK, resamples - begin), len(sizes))) - 1.0
        extreme += int((np.abs(signs @ sizes) >= observed - 1e-9).sum())
    return (1 + extreme) / (1 + resamples)


def _all_flips(sizes: np.ndarray, observed: int) -> float:
    """P(|sum| >= observed).

    The distribution of the sum is that of binomials, one for each size, convolved.
    """
    chance = np.ones(1)
    for size, count in zip(*np.unique(sizes, return_counts=True)):
        part = np.zeros(2 * int(size) * int(count) + 1)
        part[:: 2 * int(size)] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chance = np.convolve(chance, part)
    sums = np.abs(np.arange(len(chance)) - len(chance) // 2)
    return min(1.0, float(chance[sums >= observed].sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm).

    The chance of any false one among them stays below the level.
    """
    return [float(p) for p in multipletests(ps, method="holm")[1]] if ps else []
