"""`python -m eval.milebench.score`: what it writes.

And that an error is one line and leaves nothing behind.
"""

import csv
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from eval.milebench.score import main

REPOSITORY = Path(__file__).resolve().parents[3]
CHOICES = ["red", "blue"]


def command(*arguments) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "eval.milebench.score", *map(str, arguments)]
    return subprocess.run(
        call, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def sound(make_data, make_predictions):
    """Arguments that score two tasks, (folder of data, a model's folder)."""
    data = make_data("TQA", [("red", CHOICES, 1)] * 4, "multi-choice")
    make_data("IEdit", [("red box", None, 2)] * 3, "open-ended")
    make_predictions("TQA", [(0, "red", "A"), (1, "red", "B"), (2, "red", "red"), (3, "red", "")])
    return data, make_predictions(
        "IEdit", [(0, "red box", "red box"), (1, "red box", "blue"), (2, "red box", "red")]
    )


def test_a_run_from_the_shell(sound, tmp_path):
    done = command("--data", sound[0], "--predictions", sound[1], "--out", tmp_path / "new" / "out")
    assert done.returncode == 0 and done.stderr == ""
    out = tmp_path / "new" / "out"
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    common = ["eval.json", "eval_score.json", "sample_scores.json"]
    assert written == sorted(
        [f"model/{name}/{file}" for name, file in product(("TQA", "IEdit"), common)]
        + ["model/TQA/pred_with_extracted.json", "result.csv", "result.json", "scores.json"]
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    for line in (
        "TQA",
        "S-1",
        "Accuracy",
        "50.00",
        "15.0 .. 85.0",
        "Realistic Semantic",
        "Rouge-L f",
    ):
        assert line in done.stdout
    scores = json.loads((out / "scores.json").read_text())
    assert scores["scoring"] == "fixed"
    tqa = scores["models"]["model"]["tasks"]["TQA"]
    assert (tqa["score"], tqa["n"], tqa["code"], tqa["scorer"]) == (0.5, 4, "S-1", "multi-choice")
    assert tqa["levels"] == {"Few": {key: tqa[key] for key in ("score", "n", "low", "high")}}
    assert json.loads((out / "model" / "TQA" / "sample_scores.json").read_text()) == [
        {"sample_id": i, "score": score, "level": "Few", "extracted": name}
        for i, score, name in ((0, 1, "A"), (1, 0, "B"), (2, 1, "A"), (3, 0, ""))
    ]
    with (out / "result.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"Model": "model", "IEdit (Rouge-L f)": "55.56", "TQA (Accuracy)": "50.0"}
        ]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([(0, "red", "A"), (1, "red", "A")], "2 of 4 samples have no prediction: 2, 3"),
        (
            [(i, "red", "A") for i in (0, 1, 2, 3, 1)],
            "sample 1 is predicted twice (records 1 and 4)",
        ),
        ([(i, "red", "A") for i in (0, 1, 2, 3, 9)], "sample 9 (record 4) is not in "),
        (
            [(i, "blue", "A") for i in range(4)],
            "sample 0: gt_response 'blue' is not the answer of ",
        ),
        ([(i, "red", None) for i in range(4)], "sample 0: 'pred_response' is not str but NoneType"),
        ([("x", "red", "A")], "record 0: sample_id 'x' is not an integer"),
        ([(1.5, "red", "A")], "record 0: 'sample_id' is not int or str but float"),
        ([], "not a list of predictions"),
    ],
)
def test_bad_predictions(sound, make_predictions, tmp_path, capsys, answers, message):
    """Also the good task beside the bad one is not written."""
    model = make_predictions("TQA", answers)
    arguments = [
        "--data",
        str(sound[0]),
        "--predictions",
        str(model),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"error: {model / 'TQA' / 'pred.json'}: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "model"]


def test_errors_from_the_shell(sound, make_predictions, tmp_path):
    make_predictions("TQA", [(0, "red", "A")])
    done = command(
        "--data",
        sound[0],
        "--predictions",
        sound[1],
        "--out",
        tmp_path / "out",
        "--scoring",
        "original",
    )
    assert (done.returncode, done.stdout, (tmp_path / "out").exists()) == (2, "", False)
    assert (
        done.stderr
        == f"error: {sound[1] / 'TQA' / 'pred.json'}: 3 of 4 samples have no prediction: 1, 2, 3\n"
    )


def test_what_is_missing(sound, tmp_path, capsys):
    data, model = sound
    (tmp_path / "empty").mkdir()
    (model / "XQA").mkdir()
    (model / "XQA" / "pred.json").write_text("[]")
    for arguments, message in (
        ((data, tmp_path / "nowhere"), "nowhere: no such folder"),
        (
            (data, tmp_path / "empty"),
            "empty: holds neither <task>/pred.json nor <model>/<task>/pred.json",
        ),
        (
            (data, model, "--tasks", "TQA", "DocVQA"),
            "DocVQA/pred.json: no such file (3 other tasks have predictions)",
        ),
        (
            (data, model, "--tasks", "XQA"),
            "XQA/XQA.json: cannot be read (No such file or directory)",
        ),
        (
            (tmp_path / "nowhere", model),
            "IEdit/IEdit.json: cannot be read (No such file or directory)",
        ),
    ):
        folders = [
            "--data",
            str(arguments[0]),
            "--predictions",
            str(arguments[1]),
            "--out",
            str(tmp_path / "out"),
        ]
        assert main([*folders, *arguments[2:]]) == 2
        assert capsys.readouterr().err.endswith(f"{message}\n")
    (tmp_path / "file").write_text("")
    assert (
        main(
            [
                "--data",
                str(data),
                "--predictions",
                str(model),
                "--tasks",
                "TQA",
                "--out",
                str(tmp_path / "file"),
            ]
        )
        == 2
    )
    assert "file: cannot be written (" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "empty", "file", "model"]


def test_several_models_into_the_folder_of_predictions(sound, tmp_path, capsys):
    """As MileBench lays it out: results beside pred.json; the second model lacks a task."""
    data, model = sound
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    model.rename(outputs / "b")
    (outputs / "a" / "TQA").mkdir(parents=True)
    predictions = (outputs / "b" / "TQA" / "pred.json").read_text()
    (outputs / "a" / "TQA" / "pred.json").write_text(predictions)
    arguments = ["--data", str(data), "--predictions", str(outputs), "--out", str(outputs)]
    for _ in range(2):  # scoring again gives the same
        assert main(arguments) == 0
        assert (outputs / "a" / "TQA" / "pred.json").read_text() == predictions
        assert (outputs / "result.csv").read_text() == (
            "Model,TQA (Accuracy),IEdit (Rouge-L f)\na,50.0,\nb,50.0,55.56\n"
        )
    assert main([*arguments, "--tasks", "TQA", "IEdit"]) == 2
    assert "a/IEdit/pred.json: no such file" in capsys.readouterr().err


def test_another_scorer_than_the_papers_is_noted(make_data, make_predictions, tmp_path, capsys):
    data = make_data("WebQA", [("red", None, 1)] * 2, "open-ended")
    model = make_predictions("WebQA", [(0, "red", "red"), (1, "red", "red")])
    assert (
        main(["--data", str(data), "--predictions", str(model), "--out", str(tmp_path / "out")])
        == 0
    )
    assert (
        "note: WebQA is scored by rouge-l, the paper's table has multi-choice"
        in capsys.readouterr().out
    )
