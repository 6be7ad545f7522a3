"""`original` against the outputs of MileBench's own scripts (commit 9583e1f).

Every case, files byte for byte.
"""

import hashlib
import json
import random
from pathlib import Path

import pytest

from eval.milebench.choices import extract_original, label_original
from eval.milebench.metrics import image_level, needle_original
from eval.milebench.normalize import normalize_original
from eval.milebench.rouge import rouge_l
from eval.milebench.score import main
from eval.milebench.tasks import DATASETS, read_task


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_golden_files_are_whole(golden):
    listed = json.loads((golden / "manifest.json").read_text())["files"]
    on_disk = {str(path.relative_to(golden)) for path in golden.rglob("*") if path.is_file()}
    assert on_disk == {*listed, "manifest.json"}
    for name, entry in listed.items():
        assert hashlib.sha256((golden / name).read_bytes()).hexdigest() == entry["sha256"], name
    assert len(listed) == 128


def test_normalization(golden):
    cases = rows(golden / "unit" / "process.jsonl")
    assert [normalize_original(case["in"]) for case in cases] == [case["out"] for case in cases]
    assert len(cases) == 567


def test_option_extraction(golden):
    cases, choices = rows(golden / "unit" / "match_choice.jsonl"), None
    for case in cases:
        choices = choices if "choices_as_above" in case else case["choices"]
        normalized = [normalize_original(choice) for choice in choices]
        assert normalized == case.get("choices_norm", normalized)
        answer = normalize_original(case["pred"])
        assert answer == case["pred_norm"]
        extracted = extract_original(answer, normalized)
        gold = label_original(normalized.index(normalized[case["gt"]]))
        assert (extracted, int(extracted == gold)) == (case["extracted"], case["score"]), case
    assert len(cases) == 680


def test_labels_and_levels(golden):
    labels = json.loads((golden / "unit" / "labels.json").read_text())
    assert [label_original(i) for i in range(120)] == labels
    levels = json.loads((golden / "unit" / "image_level.json").read_text())
    assert {n: image_level(int(n)) for n in levels} == levels
    assert len(levels) == 120


def test_rouge_l(golden):
    cases = rows(golden / "unit" / "rouge_l.jsonl")
    for case in cases:
        f = rouge_l(case["hyp"], case["ref"])
        assert f == case["f"] and str(round(f, 3)) == case["str3"]
    assert len(cases) == 220


def test_rouge_l_is_that_of_the_package():
    package = pytest.importorskip(
        "rouge", reason="the PyPI package `rouge` 1.0.1 is the oracle"
    ).Rouge()
    draw = random.Random(0)
    for _ in range(300):
        texts = [
            " ".join(draw.choices(["red", "box", "on", "3.5", "the", "a"], k=draw.randint(1, 14)))
            for _ in "ab"
        ]
        assert rouge_l(*texts) == package.get_scores(*texts)[0]["rouge-l"]["f"]


def test_needles(golden):
    cases = rows(golden / "unit" / "needle.jsonl")
    for case in cases:
        gold, answer = normalize_original(case["gt"]), normalize_original(case["pred"])
        assert needle_original(gold, answer, whole_token=True) == case["needle"]
        assert needle_original(gold, answer, whole_token=False) == case["substring"]
    assert len(cases) == 160


@pytest.mark.parametrize(
    ("part", "annotations", "n_tasks", "n_files"),
    [("eval", "annotations", 20, 52), ("e2e", "data", 5, 15)],
)
def test_output_files_byte_for_byte(golden, tmp_path, part, annotations, n_tasks, n_files):
    outputs = golden / part / "outputs"
    arguments = [
        "--data",
        str(golden / part / annotations),
        "--predictions",
        str(outputs),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--scoring", "original"]) == 0
    expected = sorted(
        path.relative_to(outputs) for path in outputs.rglob("*.*") if path.name != "pred.json"
    )
    for path in expected:
        assert (tmp_path / "out" / path).read_bytes() == (outputs / path).read_bytes(), path
    assert len(expected) == n_files
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.json")}
    ours = {path for path in written if path.name in ("scores.json", "sample_scores.json")}
    assert (
        written - ours == {path for path in expected if path.suffix == ".json"}
        and len(ours) == n_tasks + 1
    )


def test_scorer_of_every_dataset(golden):
    listed = json.loads((golden / "manifest.json").read_text())["datasets"]
    for entry in listed:
        task = read_task(golden / "eval" / "annotations", entry["dataset"])
        assert (task.scorer, len(task.samples)) == (entry["scorer"], entry["n"])
        assert (
            entry["dataset"] not in DATASETS or DATASETS[entry["dataset"]].scorer == entry["scorer"]
        )
    assert len(listed) == 16 and sum(entry["n"] for entry in listed) == 852


# What MileBench fails on and the repaired scoring can serve.
SERVED_WHEN_FIXED = {
    "string_prediction_ids",
    "only_periods_over_32",
    "level_field_missing",
    "level_field_missing_needle",
    "integer_choice",
    "recursion_long_text",
}


def test_error_cases(golden, tmp_path, capsys):
    cases = json.loads((golden / "unit" / "error_cases.json").read_text())
    for case in cases:
        name, folder = case["dataset"], tmp_path / case["case"]
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / f"{name}.json").write_text(json.dumps(case["annotation"]))
        (folder / "predictions" / name).mkdir(parents=True)
        if case["predictions"] is not None:
            (folder / "predictions" / name / "pred.json").write_text(
                json.dumps(case["predictions"])
            )
        for scoring in ("original", "fixed"):
            out = folder / scoring
            arguments = [
                "--data",
                str(folder / "data"),
                "--predictions",
                str(folder / "predictions"),
                "--tasks",
                name,
            ]
            code = main([*arguments, "--out", str(out), "--scoring", scoring])
            errors = capsys.readouterr().err
            if scoring == "fixed" and case["case"] in SERVED_WHEN_FIXED:
                assert code == 0 and out.exists() and not errors, case["case"]
            else:
                assert code == 2 and not out.exists(), case["case"]
                assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert len(cases) == 16 and all(
        case["exit"] == 1 and not case["files_written"] for case in cases
    )
