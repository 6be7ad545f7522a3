"""Paired statistics against cases by hand, against statsmodels and scipy, and by simulation."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from eval import coverage, paired
from eval.held_out import Question
from eval.intervals import accuracy, average
from eval.matrix import analysis
from eval.matrix.analysis import MatrixRow
from eval.paired import OVERALL, QuestionsOfTask


def task(questions: int, per_unit: int = 1, name: str = "t") -> QuestionsOfTask:
    return QuestionsOfTask(name, np.arange(questions) // per_unit)


def coins(seed: int, *shape: int, p: float = 0.5) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) < p).astype(float)


def normal(seed: int, seeds: float, units: float, rest: float, shape=(4, 30)) -> np.ndarray:
    """Values with effects of seeds, of units and of neither, with these standard deviations."""
    rng = np.random.default_rng(seed)
    of_seed, of_unit = rng.normal(0, seeds, (shape[0], 1)), rng.normal(0, units, (1, shape[1]))
    return 0.3 + of_seed + of_unit + rng.normal(0, rest, shape)


# --- means and their errors -----------------------------------------------------------------------


def test_variance_components_are_those_of_a_two_way_analysis_of_variance():
    d = normal(0, seeds=1.0, units=1.0, rest=1.0)
    table = pd.DataFrame(d).melt(ignore_index=False, var_name="unit").reset_index(names="seed")
    squares = anova_lm(ols("value ~ C(seed) + C(unit)", table).fit())
    by_seed, by_unit, rest = squares["mean_sq"] / d.size
    of_seed, of_unit, of_rest = squares["df"]
    mean = paired.mean([task(30)], {"t": d})
    variance = by_seed + by_unit - rest
    spread = by_seed**2 / of_seed + by_unit**2 / of_unit + rest**2 / of_rest
    assert mean.value == pytest.approx(d.mean())
    assert mean.error**2 == pytest.approx(variance)
    assert mean.freedom == pytest.approx(variance**2 / spread)
    t = stats.t(mean.freedom, d.mean(), mean.error)
    assert mean.interval() == pytest.approx(t.interval(0.95))
    assert mean.p() == pytest.approx(2 * stats.t.sf(abs(d.mean()) / mean.error, mean.freedom))


def test_one_run_is_the_t_test_of_scipy_over_units():
    d = coins(1, 1, 150, p=0.6) - coins(2, 1, 150, p=0.5)
    mean, expected = paired.mean([task(150)], {"t": d}), stats.ttest_1samp(d[0], 0)
    assert mean.p() == pytest.approx(expected.pvalue)
    assert mean.interval() == pytest.approx(tuple(expected.confidence_interval()))


def test_where_only_seeds_differ_it_is_the_t_test_over_seeds():
    d = np.repeat([[0.2], [0.5], [0.1]], 40, axis=1)
    mean, expected = paired.mean([task(40)], {"t": d}), stats.ttest_1samp(d[:, 0], 0)
    assert mean.p() == pytest.approx(expected.pvalue) and mean.freedom == pytest.approx(2)
    assert mean.interval() == pytest.approx(tuple(expected.confidence_interval()))


def test_runs_that_are_alike_say_no_more_than_one():
    d = coins(1, 1, 50, p=0.4) - coins(2, 1, 50, p=0.2)
    one, three = (paired.mean([task(50)], {"t": np.repeat(d, n, axis=0)}) for n in (1, 3))
    assert three.error == pytest.approx(one.error) and three.p() == pytest.approx(one.p())


def test_seeds_that_differ_less_than_chance_count_as_alike():
    """Without their mean differences, the seeds' component would be below zero."""
    d = normal(3, seeds=0, units=1.0, rest=1.0)
    d -= d.mean(1, keepdims=True) - d.mean()
    mean, expected = paired.mean([task(30)], {"t": d}), stats.ttest_1samp(d.mean(0), 0)
    assert mean.p() == pytest.approx(expected.pvalue) and mean.freedom == pytest.approx(29)


def test_units_of_different_sizes_are_weighted_by_their_questions():
    """Against drawing units again and again; the mean is that over questions."""
    unit = np.repeat(np.arange(60), np.random.default_rng(0).integers(1, 5, 60))
    d = coins(1, 1, len(unit), p=0.6) + np.repeat(coins(2, 60), np.bincount(unit))[None]
    mean = paired.mean([QuestionsOfTask("t", unit)], {"t": d})
    rng, drawn = np.random.default_rng(3), []
    groups = [d[0, unit == k] for k in range(60)]
    for _ in range(4000):
        drawn.append(np.concatenate([groups[k] for k in rng.integers(0, 60, 60)]).mean())
    assert mean.value == pytest.approx(d.mean())
    assert mean.error == pytest.approx(np.std(drawn), rel=0.05)
    runs = coins(4, 3, len(unit), p=np.array([[0.2], [0.5], [0.9]]))
    assert QuestionsOfTask("t", unit).by_unit(runs).mean(1) == pytest.approx(runs.mean(1))


def test_a_seed_is_the_same_in_all_tasks():
    """Seeds that are good at one task and bad at the other differ less in the mean."""
    tasks = [task(40, name="a"), task(40, name="b")]
    up = np.repeat([[0.2], [0.5], [0.1]], 40, axis=1)
    down = np.repeat([[0.4], [0.1], [0.5]], 40, axis=1)
    alike = paired.mean(tasks, {"a": up, "b": up})
    assert alike.error == pytest.approx(paired.mean(tasks[:1], {"a": up}).error)
    assert paired.mean(tasks, {"a": up, "b": down}).error == pytest.approx(0, abs=1e-9)


def test_units_of_different_tasks_are_independent():
    a, b = coins(1, 1, 80, p=0.6), coins(2, 1, 300, p=0.3)
    tasks = [task(80, name="a"), task(300, name="b")]
    mean = paired.mean(tasks, {"a": a, "b": b})
    expected = stats.ttest_ind(a[0], b[0], equal_var=False)  # Welch: of a sum or of a difference
    assert mean.value == pytest.approx((a.mean() + b.mean()) / 2)
    errors = [one.std(ddof=1) ** 2 / one.size for one in (a, b)]
    assert mean.error == pytest.approx(np.sqrt(sum(errors)) / 2)
    assert mean.freedom == pytest.approx(expected.df)


def test_where_nothing_varies_p_is_that_of_equal_signs():
    ones = {"t": np.ones((3, 10))}
    assert paired.mean([task(10)], ones).p() == 2 * 0.5**10
    assert paired.mean([task(10)], {"t": np.zeros((3, 10))}).p() == 1.0


def test_one_unit_says_nothing():
    comparison = paired.compare([task(2, per_unit=2)], {"t": np.ones((3, 2))})
    assert (comparison.low, comparison.high) == (-1.0, 1.0) and comparison.p > 0.4


def test_a_gain_of_seeds_that_disagree_is_not_carried():
    """Two of three seeds lose little, one loses much; as units alone it would be beyond doubt."""
    shares = [[0.57], [0.85], [0.80]]
    d = coins(1, 3, 200, p=np.array(shares)) - coins(2, 3, 200, p=0.93)
    comparison = paired.compare([task(200)], {"t": d})
    assert paired.mean([task(200)], {"t": d.mean(0, keepdims=True)}).p() < 1e-6
    assert comparison.p > 0.05 and comparison.low < 0 < comparison.high
    assert comparison.by_run == pytest.approx(d.mean(1))


def test_intervals_cover():
    """Of 95 % intervals 92 to 98 % hold the truth; 300 trials say so to about 2.5 points."""
    for runs, rows, spread in ((3, 200, 0.0), (3, 200, 0.02), (5, 200, 0.1)):
        shares = coverage.covered(runs, rows, spread, (0.6, 0.5), trials=300)
        assert 0.905 <= shares["components"] <= 0.995, (runs, rows, spread)
    assert shares["rows alone"] < 0.7  # 0.1: what taking the seeds as given comes to


def test_a_single_run_is_paired_with_each_of_several():
    a, b = coins(1, 1, 30), coins(2, 3, 30)
    d = paired.difference({"t": a}, {"t": b})["t"]
    assert d.shape == (3, 30) and all((d[k] == a[0] - b[k]).all() for k in range(3))


def test_holm_by_hand():
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([]) == []


# --- cells ----------------------------------------------------------------------------------------


def test_overall_is_the_mean_of_the_tasks_however_many_questions_they_have():
    tasks = [task(40, name="few"), task(400, name="many")]
    scores = {"few": np.ones((2, 40)), "many": coins(1, 2, 400, p=0.25)}
    estimate = paired.estimate(tasks, scores)
    assert estimate.score == pytest.approx((1 + scores["many"].mean()) / 2) and estimate.n == 440
    assert estimate.low < estimate.score < estimate.high
    assert paired.by_run(tasks, scores) == pytest.approx((1 + scores["many"].mean(1)) / 2)


def test_one_run_has_the_wilson_interval_and_overall_that_of_the_parts():
    tasks = [task(50, name="a"), task(50, name="b")]
    scores = {"a": coins(1, 1, 50), "b": coins(2, 1, 50, p=0.9)}
    parts = [accuracy(scores[name][0]) for name in "ab"]
    assert [paired.estimate([one], scores) for one in tasks] == parts
    assert paired.estimate(tasks, scores) == average(parts)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_extreme_score_of_several_runs_has_an_interval_of_some_width(value):
    tasks = [task(40, name="a"), task(40, name="b")]
    scores = {name: np.full((3, 40), value) for name in "ab"}
    wilson = accuracy([value] * 40)
    assert paired.estimate(tasks[:1], scores) == wilson
    assert paired.estimate(tasks, scores) == average([wilson, wilson])


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
    assert (brought["difference"], brought["better"], brought["worse"]) == (0.5, 40, 0)
    assert brought["by_run"] == [0.5, 0.5] and cell["by_run"] == [1.0, 1.0]  # 20 questions each
    halves = stats.ttest_1samp(half, 0).pvalue
    assert brought["p"] == pytest.approx(halves) and brought["carried"]
    assert comparisons["diagonal", "v2v", "causal"]["difference"] == -1.0
    same = comparisons["causal-causal", "base", "v2v"]
    assert [same[key] for key in ("difference", "low", "high", "p")] == [0, 0, 0, 1]
    assert not same["carried"]


def test_families_are_corrected_on_their_own():
    """Primary: the diagonal against switched on and against causal-causal, of all tasks."""
    questions = [Question(name, f"row{k}") for name in "ab" for k in range(40)]
    runs = itertools.chain.from_iterable(row.runs for row in ROWS)
    scores = {}
    for k, cell in enumerate(itertools.product(runs, ("causal", "v2v"))):
        scores[cell] = coins(k, 80, p=0.5 + k / 20).tolist()
    results = analysis.results(ROWS, ["causal", "v2v"], questions, scores)
    families: dict[str, list[dict]] = {}
    for one in results["comparisons"]:
        families.setdefault(one["family"], []).append(one)
    primary = [(one["task"], one["kind"], one["row"], one["mask"]) for one in families["primary"]]
    assert primary == [
        (OVERALL, "causal-causal", "v2v", "v2v"),
        (OVERALL, "inference-only", "v2v", "v2v"),
    ]
    assert len(families["primary"]) + len(families["other"]) == len(results["comparisons"]) == 24
    for of_family in families.values():
        corrected = paired.holm([one["p"] for one in of_family])
        assert [one["p_holm"] for one in of_family] == corrected
        assert [one["carried"] for one in of_family] == [p < 0.05 for p in corrected]


def test_a_single_task_is_told_once():
    questions = [Question("changed", f"row{k}") for k in range(10)]
    cells = itertools.product(("base", "c0", "c1", "v0", "v1"), ("causal", "v2v"))
    scores = {cell: coins(k, 10).tolist() for k, cell in enumerate(cells)}
    results = analysis.results(ROWS, ["causal", "v2v"], questions, scores)
    assert results["headline"] == "changed"
    entries = results["cells"] + results["comparisons"]
    assert {entry["task"] for entry in entries} == {"changed"} and len(results["cells"]) == 6
    assert [one["family"] for one in results["comparisons"]].count("primary") == 2


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
