"""The table of estimates against measured peaks, and how it is made."""

import json

import pytest
import training

from eval import memory

RESULTS = training.ROOT / "eval" / "results" / "memory.json"


def test_every_estimate_is_within_15_percent_of_the_peak():
    setups = json.loads(RESULTS.read_text(encoding="utf-8"))["setups"]
    for setup in setups:
        assert setup["error"] == pytest.approx(setup["estimate"] / setup["measured"] - 1, abs=2e-3)
        assert abs(setup["error"]) <= 0.15
    asked = [
        {"model": setup["model"], **keys} for setup in setups[:1] for keys in memory.setups("25m")
    ]
    for setup, keys in zip(setups, asked):
        assert keys.items() <= setup.items()
    assert len(setups) >= len(asked) == 14


def test_a_table_has_a_line_for_each_setup():
    results = []
    for number, keys in enumerate(memory.setups("25m")):
        results.append(
            {**keys, "measured": 100.0, "estimate": 101.0 + number, "error": number / 100}
        )
    table = memory.table("25m", results)
    assert len({tuple(row[:4]) for row in table.rows}) == len(results) == 14
    assert "largest error 13.0 %" in table.title and table.rows[1][-1] == "+1.0 %"
