"""Intervals and aggregates against the formulas and, for coverage, against simulation."""

import json
import math

import numpy as np
import pytest

from eval.intervals import Estimate, accuracy, average, mean
from eval.milebench.aggregate import CODES, summary
from eval.milebench.metrics import Scored, ScoredTask
from eval.milebench.tasks import DATASETS, Sample


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson 1927, z = 1.959964."""
    z, p = 1.959963984540054, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@pytest.mark.parametrize(
    ("right", "n"), [(0, 1), (1, 1), (0, 200), (65, 200), (200, 200), (103, 320)]
)
def test_accuracy_is_wilson(right, n):
    estimate = accuracy([1] * right + [0] * (n - right))
    assert (estimate.score, estimate.n) == (right / n, n)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(right, n), abs=1e-12)


def test_mean_is_a_seeded_bootstrap():
    values = np.random.default_rng(3).beta(1, 4, size=200)
    estimate = mean(values)
    assert estimate == mean(values) and (estimate.score, estimate.n) == (
        pytest.approx(values.mean(), abs=1e-12),
        200,
    )
    half = 1.96 * values.std() / math.sqrt(200)  # a mean of 200 is close to normal
    assert (estimate.low, estimate.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )
    assert mean([0.3]) == Estimate(0.3, 1, 0.0, 1.0)
    assert mean([0.5, 0.5]) == Estimate(0.5, 2, 0.5, 0.5)


def test_average_of_parts():
    parts = [Estimate(0.5, 200, 0.4, 0.6), Estimate(0.2, 100, 0.17, 0.24)]
    estimate = average(parts)
    assert (estimate.score, estimate.n) == (pytest.approx(0.35), 300)
    assert estimate.low == pytest.approx(0.35 - math.sqrt(0.1**2 + 0.03**2) / 2)
    assert estimate.high == pytest.approx(0.35 + math.sqrt(0.1**2 + 0.04**2) / 2)
    one = average(parts[:1])
    assert (one.score, one.low, one.high) == pytest.approx((0.5, 0.4, 0.6))


def test_average_covers():
    """The intervals hold the true mean of three accuracies 95 % of the time (+- 3 sd = 3.3).

    In 400 simulations.
    """
    draw, truth = np.random.default_rng(1), [0.05, 0.4, 0.9]
    held = 0
    for _ in range(400):
        parts = [Estimate(k / 200, 200, *wilson(int(k), 200)) for k in draw.binomial(200, truth)]
        estimate = average(parts)
        held += estimate.low <= sum(truth) / 3 <= estimate.high
    assert abs(held / 400 - 0.95) < 0.033


def task(name: str, scores: list[float]) -> ScoredTask:
    samples = [Sample(i, 0, "", ("a.jpg",), None, "", "Few", {}) for i in range(len(scores))]
    scored = tuple(Scored(sample, score, {}) for sample, score in zip(samples, scores))
    return ScoredTask(name, DATASETS[name].scorer if name in DATASETS else "multi-choice", scored)


def test_summary_of_all_datasets():
    """Data set i scores i % 2 for all its samples: every aggregate can be counted by hand."""
    scores = summary([task(name, [i % 2] * 2) for i, name in enumerate(DATASETS)])
    assert (
        list(scores["codes"])
        == list(CODES)
        == [*("T-1", "T-2", "T-3", "T-4", "S-1", "S-2", "S-3", "S-4", "S-5", "N-1", "N-2", "I-1")]
    )
    by_code = {
        code: [i % 2 for i, data in enumerate(DATASETS.values()) if data.code == code]
        for code in CODES
    }
    expected = {code: sum(values) / len(values) for code, values in by_code.items()}
    assert {code: part["score"] for code, part in scores["codes"].items()} == pytest.approx(
        expected
    )
    for key in ("codes", "groups", "overall"):
        assert not any(part["missing"] for part in scores[key].values())
    assert scores["overall"]["Realistic"]["score"] == pytest.approx(
        sum(list(expected.values())[:9]) / 9
    )
    assert scores["overall"]["Diagnostic"]["score"] == pytest.approx((0 + 1 + 0) / 3)
    assert (scores["overall"]["N"]["score"], scores["overall"]["I"]["score"]) == (0.5, 0)
    assert {group: part["n"] for group, part in scores["groups"].items()} == (
        {"Realistic Temporal": 26, "Realistic Semantic": 26, "Diagnostic": 6}
    )
    assert scores["groups"]["Realistic Temporal"]["score"] == pytest.approx(6 / 13)
    assert json.dumps(scores)


def test_summary_of_some_datasets_says_what_is_missing():
    scores = summary([task("TQA", [1, 0]), task("GPR1200", [1, 1]), task("Digits", [0, 0])])
    assert {code: part["missing"] for code, part in scores["codes"].items()} == (
        {"S-1": ["MultiModalQA", "WebQA", "WikiVQA"], "I-1": []}
    )
    assert scores["overall"]["Realistic"]["missing"] == list(CODES[:9])
    assert scores["overall"]["Diagnostic"]["missing"] == ["N-1", "N-2"]
    assert scores["tasks"]["Digits"]["code"] is None and "N" not in scores["overall"]
    assert set(scores["groups"]) == {"Realistic Semantic", "Diagnostic"}
