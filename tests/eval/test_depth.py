"""The line through gains of bases of several depths."""

import json

import pytest

from eval import depth

# layers: gain of area of three bases; the line through them falls by 10 points a layer
GAINS = {2: (0.5, 0.4, 0.6), 4: (0.3, 0.2, 0.4), 6: (0.1, 0.0, 0.2)}


def curve(row: str, area: float) -> dict:
    return {"row": row, "area": {"value": area}, "mean": [0.0, area]}


@pytest.fixture
def folder(tmp_path):
    for layers, gains in GAINS.items():
        for seed, gain in enumerate(gains):
            path = tmp_path / f"l{layers}-s{seed}" / "results.json"
            path.parent.mkdir()
            lines = [curve("causal", 0.25), curve("v2v", 0.25 + gain)]
            path.write_text(json.dumps({"curves": {"exact": lines}}))
    return tmp_path


def test_the_slope_is_that_of_the_gains(folder, capsys):
    """By hand: the residuals are 0, -0.1 and 0.1 at each depth, 0.06 in squares over 7 degrees of
    freedom; the layers' sum of squares is 24, and Student's t at 97.5 % is 2.365."""
    assert depth.main([str(folder)]) == 0
    found = json.loads((folder / "depth.json").read_text())["slope"]
    half = 2.3646 * (0.06 / 7 / 24) ** 0.5
    assert found["value"] == pytest.approx(-0.1)
    assert found["low"] == pytest.approx(-0.1 - half, abs=1e-5)
    assert found["high"] == pytest.approx(-0.1 + half, abs=1e-5)
    told = capsys.readouterr().out
    assert "points a layer: -10.0 [-14.5, -5.5]" in told
    assert "| 2 | 1 | 25.0 | 65.0 | 40.0 | 25.0 | 65.0 |" in told


@pytest.mark.parametrize("kept", [[], ["l2-s0", "l2-s1", "l2-s2"], ["l2-s0", "l4-s0"]])
def test_no_line_through_too_little(folder, capsys, kept):
    for path in folder.iterdir():
        if path.name not in kept:
            (path / "results.json").unlink()
    assert depth.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert ("make no line" if kept else "no folder l<layers>-s<seed>") in said


def test_a_matrix_without_the_mask_is_named(folder, capsys):
    assert depth.main([str(folder), "--mask", "future"]) == 2
    said = capsys.readouterr().err
    assert "l2-s0/results.json: no curve of exact answers of 'future'" in said


def test_a_base_is_left_out_of_the_slope_and_named(folder, capsys):
    """Seven of the nine make the line; the table shows them all."""
    assert depth.main([str(folder), "--without", "l2-s1", "l4-s2"]) == 0
    written = json.loads((folder / "depth.json").read_text())
    assert written["without"] == ["l2-s1", "l4-s2"] and len(written["bases"]) == 9
    kept = [(2, 0.5), (2, 0.6), (4, 0.3), (4, 0.2), (6, 0.1), (6, 0.0), (6, 0.2)]
    middle, mean = 30 / 7, 1.9 / 7
    rise = sum((layers - middle) * (gain - mean) for layers, gain in kept)
    rise /= sum((layers - middle) ** 2 for layers, _ in kept)
    assert written["slope"]["value"] == pytest.approx(rise)
    assert "| 2 | (1) | 25.0 | 65.0 |" in capsys.readouterr().out
    assert depth.main([str(folder), "--without", "l3-s0"]) == 2
    assert "--without l3-s0" in capsys.readouterr().err
