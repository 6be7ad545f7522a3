"""The table of estimates against measured peaks, and how it is made."""

import json

import pytest
import training

from eval import memory

RESULTS = training.ROOT / "eval" / "results"


@pytest.mark.parametrize(
    ("name", "learns", "count"),
    [("memory", ["full", "LoRA"], 16), ("memory_qlora", ["QLoRA"], 4)],
)
def test_every_estimate_is_within_15_percent_of_the_peak(name, learns, count):
    setups = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["setups"]
    for setup in setups:
        assert setup["error"] == pytest.approx(setup["estimate"] / setup["measured"] - 1, abs=2e-3)
        assert abs(setup["error"]) <= 0.15
    asked = []
    for model in memory.MODELS:
        wanted = [keys for keys in memory.setups(model) if memory.learns(keys) in learns]
        asked += [{"model": model, **keys} for keys in wanted]
    assert len(setups) == len(asked) == count
    for setup, keys in zip(setups, asked):
        assert keys.items() <= setup.items()


def test_a_table_has_a_line_for_each_setup():
    results = []
    for number, keys in enumerate(memory.setups("25m")):
        results.append(
            {**keys, "measured": 100.0, "estimate": 101.0 + number, "error": number / 100}
        )
    table = memory.table("25m", results)
    assert len({tuple(row[:4]) for row in table.rows}) == len(results) == 16
    assert "largest error 15.0 %" in table.title and table.rows[1][-1] == "+1.0 %"
