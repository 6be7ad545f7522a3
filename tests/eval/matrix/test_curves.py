"""Curves of a matrix: what runs logged while they trained, and the figures that come from it."""

import json
import re

import pytest
from scipy import stats

from eval.matrix import charts, curves
from eval.matrix.analysis import MatrixRow
from eval.matrix.runs import MatrixRun
from fmtrain.masks import Mask

ROWS = [
    MatrixRow("base", "causal", ("tiny",)),
    MatrixRow("causal", "causal", ("c0", "c1")),
    MatrixRow("v2v", "v2v", ("v0", "v1")),
]
STEPS = [0, 100, 300]
EXACT = {"c0": [0.0, 0.1, 0.2], "c1": [0.0, 0.3, 0.4], "v0": [0.0, 0.4, 0.9], "v1": [0.1, 0.6, 0.8]}
# (100 steps at the first mean height + 200 at the second) / 300, by hand
AREAS = {"c0": 0.35 / 3, "c1": 0.85 / 3, "v0": 1.5 / 3, "v1": 1.75 / 3}


def log(run: str, steps=STEPS) -> list[dict]:
    """The history of a trainer's log: losses and evaluations are entries of their own."""
    history = [{"step": step, "loss": 2 - step / 300, "grad_norm": 1.0} for step in (150, 300)]
    for step, value in zip(steps, EXACT[run]):
        history.append({"step": step, "eval_loss": 2 - value, "eval_exact_match": value})
    return [*history, {"step": 300, "train_runtime": 9.0}]


def plan(folder, steps=STEPS) -> list[MatrixRun]:
    runs = []
    for row in ROWS:
        for name in row.runs:
            run = MatrixRun(name, row.name, Mask.parse(row.mask), folder / name)
            if name != "tiny":
                run = MatrixRun(name, row.name, run.mask, run.folder, folder / f"{name}.yaml")
            run.folder.mkdir()
            history = log(name, steps) if name != "tiny" else log("v0")
            (run.folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
            runs.append(run)
    return runs


def test_figures_are_those_of_the_logs(tmp_path):
    raw = curves.of_runs(plan(tmp_path))
    assert raw.keys() == EXACT.keys()  # the base was not trained by the matrix
    curves.write(tmp_path, raw)
    assert curves.read(tmp_path) == raw
    found = curves.results(ROWS, raw)["curves"]
    causal, v2v = found["exact"]
    assert (causal["row"], v2v["row"]) == ("causal", "v2v")
    assert v2v["steps"] == STEPS
    assert v2v["mean"] == pytest.approx([0.05, 0.5, 0.85])
    assert (v2v["low"], v2v["high"]) == ([0.0, 0.4, 0.8], [0.1, 0.6, 0.9])
    assert v2v["area"]["by_run"] == pytest.approx([AREAS["v0"], AREAS["v1"]])
    # 0.4 at 100 and 0.9 at 300: half a hundred steps on; 0.1 at 0 and 0.6 at 100: four fifths
    assert v2v["half"] == pytest.approx([140, 80]) and causal["half"] == [None, None]
    more = [AREAS["v0"] - AREAS["c0"], AREAS["v1"] - AREAS["c1"]]
    assert v2v["more_area"]["by_run"] == pytest.approx(more)
    independent = stats.ttest_1samp(more, 0)
    interval = independent.confidence_interval(0.95)
    assert v2v["more_area"]["p"] == pytest.approx(independent.pvalue)
    assert (v2v["more_area"]["low"], v2v["more_area"]["high"]) == pytest.approx(tuple(interval))
    assert causal["more_area"] is None
    assert found["loss"][0]["steps"] == [150, 300] and found["loss"][0]["mean"] == [1.5, 1.0]
    # both rows lose 1.5 and 1.0 nats at 150 and 300 steps
    assert [line["area"]["value"] for line in found["loss"]] == [1.25, 1.25]
    assert found["loss"][1]["more_area"]["by_run"] == [0, 0] and "half" not in found["loss"][1]
    # logged as two less the share that is right: areas differ by as much, the other way
    held_out = found["held_out"][1]
    assert held_out["area"]["by_run"] == pytest.approx([2 - AREAS["v0"], 2 - AREAS["v1"]])
    assert held_out["more_area"]["by_run"] == pytest.approx([-each for each in more])
    assert "half" not in held_out
    lines = curves.table(found)
    assert lines[0][:2] == ["exact answers", "causal"]
    assert lines[0][3:] == ["–", "never never"]
    assert lines[1][4] == "140 80" and lines[1][2].startswith("54.2 [")
    loss = ["v2v", "1.250 [1.250, 1.250]", "+0.000 [+0.000, +0.000]", "–"]
    assert lines[5] == ["training loss", *loss]
    assert lines[3][:2] == ["held-out loss", "v2v"] and lines[3][2].startswith("1.458 [")


def test_runs_that_evaluated_nothing_have_the_curve_of_their_loss(tmp_path):
    runs = plan(tmp_path)
    for run in runs:
        history = [entry for entry in log("v0") if "eval_loss" not in entry]
        (run.folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    found = curves.results(ROWS, curves.of_runs(runs))["curves"]
    assert list(found) == ["loss"] and [line["row"] for line in found["loss"]] == ["causal", "v2v"]
    for run in runs:
        (run.folder / "trainer_state.json").unlink()
    raw = curves.of_runs(runs)
    assert raw == {} and curves.results(ROWS, raw) == {} and curves.shown(None) is None
    curves.write(tmp_path, raw)
    assert not (tmp_path / "curves.json").exists() and curves.read(tmp_path) == {}


def test_runs_of_a_row_that_do_not_go_together_are_refused(tmp_path):
    raw = curves.of_runs(plan(tmp_path))
    with pytest.raises(ValueError, match=r"row 'v2v': v1 has no curve of exact answers"):
        curves.results(ROWS, {run: raw[run] for run in ("c0", "c1", "v0")})
    moved = raw["v1"] | {"exact": [[0, 0.1], [100, 0.2]]}
    with pytest.raises(ValueError, match=r"v1 was measured at steps \[0, 100\], v0 at \[0, 100, 3"):
        curves.results(ROWS, {**raw, "v1": moved})
    (tmp_path / "curves.json").write_text("{")
    with pytest.raises(ValueError, match=r"curves\.json: cannot be read"):
        curves.read(tmp_path)


def test_a_curve_is_drawn_where_its_values_are():
    line = {"steps": [0, 100], "mean": [0.0, 1.0], "low": [0.0, 0.5], "high": [0.5, 1.0]}
    drawn = charts.curves({"trained": line}, 1.0, 100, "v2v")
    left, width = charts.LABEL, charts.CURVE
    top, height = charts.EDGE, charts.HIGH_CURVE
    assert f'd="M{left:.1f} {top + height:.1f}L{left + width:.1f} {top:.1f}"' in drawn
    band = re.search(r'class="band" d="M([^Z]*)Z"', drawn)[1].split("L")
    assert band == [
        f"{left:.1f} {top + height / 2:.1f}",
        f"{left + width:.1f} {top:.1f}",
        f"{left + width:.1f} {top + height / 2:.1f}",
        f"{left:.1f} {top + height:.1f}",
    ]
    assert re.findall(r'class="height"[^>]*>([^<]*)<', drawn) == [
        "0",
        "20",
        "40",
        "60",
        "80",
        "100",
    ]
    assert re.findall(r'class="tick"[^>]*>([^<]*)<', drawn) == ["0", "50 steps", "100"]
