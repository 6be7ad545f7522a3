"""Paired statistics against cases by hand, against statsmodels and scipy, and slow loops."""

import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from eval import paired
from eval.held_out import Question
from eval.intervals import accuracy, average
from eval.matrix import analysis
from eval.matrix.analysis import MatrixRow
from eval.paired import OVERALL, QuestionsOfTask


def task(questions: int, per_unit: int = 1, name: str = "t") -> QuestionsOfTask:
    return QuestionsOfTask(name, np.arange(questions) // per_unit)


def coins(seed: int, *shape: int, p: float = 0.5) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) < p).astype(float)


# --- p-values -------------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    """Three discordant pairs, all one way: both tails of the binomial, 2 / 2^3.

    Five against one: 2 (1 + 6) / 2^6.
    """
    assert paired.sign_flip_p(np.array([1, 1, 1, 0, 0])) == pytest.approx(0.25)
    assert paired.sign_flip_p(np.array([1, 1, 1, 1, 1, -1])) == pytest.approx(14 / 64)
    assert paired.sign_flip_p(np.array([0, 0])) == 1.0
    assert paired.sign_flip_p(np.array([1, -1])) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_mcnemar_is_that_of_statsmodels(seed):
    a, b = coins(seed, 200, p=0.6), coins(seed + 100, 200, p=0.5)
    table = [[((a == i) & (b == j)).sum() for j in (1, 0)] for i in (1, 0)]
    assert paired.sign_flip_p(a - b) == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)


@pytest.mark.parametrize("sizes", [[3, 1, -2, 2], [2, 2, 2], [4, -1, -1, -1, 3], [1, 2, 3, -3, -2]])
def test_several_runs_of_a_question_are_flipped_together(sizes):
    """Against all 2^n signs, one by one."""
    d = np.array(sizes)
    sums = [abs(np.dot(signs, d)) for signs in itertools.product([-1, 1], repeat=len(d))]
    assert paired.sign_flip_p(d) == pytest.approx(np.mean([one >= abs(d.sum()) for one in sums]))


def test_fractions_agree_with_the_permutation_test_of_scipy():
    d = np.random.default_rng(3).normal(0.05, 0.3, size=12)
    exact = stats.permutation_test(
        (d,), np.sum, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert paired.sign_flip_p(d) == pytest.approx(exact, abs=0.02)


def test_dependence_between_runs_does_not_make_p_small():
    """Three identical runs say no more than one."""
    d = coins(1, 50, p=0.3) - coins(2, 50, p=0.2)
    assert paired.sign_flip_p(3 * d) == pytest.approx(paired.sign_flip_p(d))


def test_holm_by_hand():
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([]) == []


# --- bootstrap ------------------------------------------------------------------------------------


def test_interval_of_one_run_is_that_of_scipy():
    d = coins(1, 1, 150, p=0.6) - coins(2, 1, 150, p=0.5)
    interval = paired.interval(paired.replicates([task(150)], [{"t": d}])["t"][0])
    expected = stats.bootstrap(
        (d[0],), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert interval == pytest.approx((expected.low, expected.high), abs=0.012)


def test_interval_of_several_runs_against_a_slow_loop():
    """Runs and units drawn with replacement, independently of each other.

    A unit of two questions stays together.
    """
    d, units = coins(5, 3, 40, p=[[0.3], [0.6], [0.7]]) - coins(6, 3, 40), 20
    drawn = paired.replicates([task(40, per_unit=2)], [{"t": d}])["t"][0]
    rng, slow = np.random.default_rng(9), []
    for _ in range(4000):
        runs, chosen = rng.integers(0, 3, 3), rng.integers(0, units, units)
        draws = itertools.product(runs, chosen, (0, 1))
        slow.append(np.mean([d[run, 2 * unit + k] for run, unit, k in draws]))
    assert drawn.mean() == pytest.approx(d.mean(), abs=0.005)
    assert drawn.std() == pytest.approx(np.std(slow), rel=0.06)
    assert paired.interval(drawn) == pytest.approx(
        tuple(np.quantile(slow, [0.025, 0.975])), abs=0.02
    )


def test_runs_that_differ_make_the_interval_wider():
    same = np.repeat(coins(1, 1, 200), 3, axis=0)
    differing = np.concatenate(
        [coins(1, 1, 200, p=0.2), coins(2, 1, 200, p=0.5), coins(3, 1, 200, p=0.8)]
    )
    low, high = (
        paired.interval(paired.replicates([task(200)], [{"t": one}])["t"][0])
        for one in (same, differing)
    )
    assert high[1] - high[0] > 2 * (low[1] - low[0])


def test_a_single_run_is_paired_with_each_of_several():
    a, b = coins(1, 1, 30), coins(2, 3, 30)
    d = paired.difference({"t": a}, {"t": b})["t"]
    assert d.shape == (3, 30) and all((d[k] == a[0] - b[k]).all() for k in range(3))
    drawn = paired.replicates([task(30)], [{"t": a}, {"t": b}, {"t": d}])["t"]
    assert drawn[2] == pytest.approx(drawn[0] - drawn[1])


def test_overall_is_the_mean_of_the_tasks_however_many_questions_they_have():
    tasks = [task(40, name="few"), task(400, name="many")]
    scores = {"few": np.ones((2, 40)), "many": coins(1, 2, 400, p=0.25)}
    drawn = paired.replicates(tasks, [scores])
    estimates = paired.estimates(tasks, scores, {name: one[0] for name, one in drawn.items()})
    assert (
        estimates[OVERALL].score == pytest.approx((1 + scores["many"].mean()) / 2)
        and estimates[OVERALL].n == 440
    )
    assert estimates[OVERALL].low < estimates[OVERALL].score < estimates[OVERALL].high
    assert drawn[OVERALL] == pytest.approx((drawn["few"] + drawn["many"]) / 2)


# --- cells ----------------------------------------------------------------------------------------


def test_one_run_has_the_wilson_interval_and_overall_that_of_the_parts():
    tasks, scores = (
        [task(50, name="a"), task(50, name="b")],
        {"a": coins(1, 1, 50), "b": coins(2, 1, 50, p=0.9)},
    )
    drawn = {name: one[0] for name, one in paired.replicates(tasks, [scores]).items()}
    estimates = paired.estimates(tasks, scores, drawn)
    assert estimates["a"] == accuracy(scores["a"][0]) and estimates[OVERALL] == average(
        [accuracy(scores[name][0]) for name in "ab"]
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_extreme_score_of_several_runs_has_an_interval_of_some_width(value):
    scores = {"t": np.full((3, 40), value)}
    estimates = paired.estimates(
        [task(40)],
        scores,
        {name: one[0] for name, one in paired.replicates([task(40)], [scores]).items()},
    )
    assert estimates["t"].high - estimates["t"].low == pytest.approx(
        accuracy([value] * 40).high - accuracy([value] * 40).low
    )
    assert estimates[OVERALL].high > estimates[OVERALL].low


# --- which comparisons ----------------------------------------------------------------------------

ROWS = [
    MatrixRow("base", "causal", ("base",)),
    MatrixRow("causal", "causal", ("c0", "c1")),
    MatrixRow("v2v", "v2v", ("v0", "v1")),
]


def test_every_comparison_once():
    pairs = analysis.pairs(ROWS, ["causal", "v2v"])
    cc, own = ("causal", "causal"), ("v2v", "v2v")
    assert [(cell, other) for kind, cell, other in pairs if kind == "causal-causal"] == [
        (("base", "causal"), cc),
        (("base", "v2v"), cc),
        (("causal", "v2v"), cc),
        (("v2v", "causal"), cc),
        (own, cc),
    ]
    assert [(cell, other) for kind, cell, other in pairs if kind == "diagonal"] == [
        (("base", "v2v"), ("base", "causal")),
        (("v2v", "causal"), own),
    ]
    assert [one for one in pairs if one[0] == "inference-only"] == [
        ("inference-only", own, ("causal", "v2v"))
    ]
    assert (
        analysis.reference(ROWS[:1], ["causal"]) == ("base", "causal")
        and analysis.reference(ROWS[2:], ["causal"]) is None
    )


def test_results_of_a_small_matrix_by_hand():
    """40 questions; v2v trained is right on all, causal on the first 20.

    Whatever the mask in inference, but for one cell.
    """
    items = [Question("t", f"row{k}", "?", "!") for k in range(40)]
    half = [1.0] * 20 + [0.0] * 20
    scores = dict.fromkeys(itertools.product(("base", "c0", "c1"), ("causal", "v2v")), half)
    for run in ("v0", "v1"):
        scores |= {(run, "v2v"): [1.0] * 40, (run, "causal"): [0.0] * 40}
    results = analysis.results(ROWS, ["causal", "v2v"], items, scores)
    cell = next(
        one
        for one in results["cells"]
        if one["row"] == "v2v" and one["mask"] == "v2v" and one["task"] == "t"
    )
    assert cell["score"] == 1.0 and cell["n"] == 40 and cell["runs"] == 2
    comparisons = {
        (one["kind"], one["row"], one["mask"]): one
        for one in results["comparisons"]
        if one["task"] == "t"
    }
    brought = comparisons["inference-only", "v2v", "v2v"]
    assert (brought["difference"], brought["better"], brought["worse"]) == (
        0.5,
        40,
        0,
    )  # 20 questions, two runs
    assert brought["p"] == pytest.approx(2 * 0.5**20) and brought["carried"]
    assert comparisons["diagonal", "v2v", "causal"]["difference"] == -1.0
    same = comparisons["causal-causal", "base", "v2v"]
    assert (same["difference"], same["low"], same["high"], same["p"], same["carried"]) == (
        0,
        0,
        0,
        1.0,
        False,
    )
    ps = [one["p"] for one in results["comparisons"] if one["task"] == "t"]
    assert [one["p_holm"] for one in results["comparisons"] if one["task"] == "t"] == pytest.approx(
        paired.holm(ps)
    )


def test_turns_of_a_row_are_one_unit():
    items = [
        Question("a", "r0", "", ""),
        Question("b", "r9", "", ""),
        Question("a", "r0", "", ""),
        Question("a", "r1", "", ""),
    ]
    tasks = analysis.tasks_of(items)
    assert (
        [one.name for one in tasks] == ["a", "b"]
        and tasks[0].unit.tolist() == [0, 0, 1]
        and tasks[0].counts_U.tolist() == [2, 1]
    )
    scores = analysis.by_task(items, [[1, 0, 0, 1]])
    assert scores["a"].tolist() == [[1, 0, 1]] and scores["b"].tolist() == [[0]]
