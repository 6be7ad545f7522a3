"""The two digits of `changed`, each on its own."""

import json
import shutil
from pathlib import Path

import pytest

from eval import changed
from eval.held_out import Question
from eval.matrix import analysis, answers
from eval.matrix.analysis import MatrixRow

STORED = Path(__file__).parents[2] / "eval" / "results" / "learning"


@pytest.mark.parametrize(
    "text, old, new",
    [
        ("from 3 to 8", 1, 1),
        ("From 3  to 9", 1, 0),
        ("from 8 to 3", 0, 0),
        ("from 3", 0, 0),
        ("3 8", 0, 0),
        ("", 0, 0),
    ],
)
def test_digits_of_an_answer(text, old, new):
    found = [changed.digit_right(text, "from 3 to 8", word) for word in changed.WORDS.values()]
    assert found == [old, new]


def test_stored_digits_are_those_of_the_stored_answers(tmp_path):
    """Counted once more, answer by answer."""
    raw = answers.read(STORED)
    stored = json.loads((STORED / "digits.json").read_text())["digits"]
    shares = {(one["row"], one["digit"]): one["share"] for one in stored}
    for row in ("causal", "v2v", "prefix_lm"):
        for digit, word in changed.WORDS.items():
            hits = []
            for (run, mask), texts in raw.texts.items():
                if run.rpartition("-")[0] == row == mask:
                    for text, question in zip(texts, raw.questions, strict=True):
                        said = text.split()
                        hits.append(
                            len(said) == 4 and said[word] == question.reference.split()[word]
                        )
            assert len(hits) == 5 * 500
            assert shares[row, digit] == pytest.approx(sum(hits) / len(hits))
    shutil.copytree(STORED, tmp_path / "copy")
    assert changed.main([str(tmp_path / "copy")]) == 0
    again = json.loads((tmp_path / "copy" / "digits.json").read_text())["digits"]
    assert again == json.loads(json.dumps(stored))


def test_a_matrix_without_the_task_is_refused(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"reference": null}')
    assert changed.main([str(tmp_path)]) == 2
    assert "answers.jsonl.gz" in capsys.readouterr().err


def made(folder: Path, rows: list[MatrixRow], masks: list[str]) -> Path:
    """A matrix of one run a row, in which every answer has the old digit right."""
    questions = [Question(changed.TASK, str(k), "", "from 3 to 8") for k in range(20)]
    cells = [(row.name, mask) for row in rows for mask in masks]
    texts = {cell: ["from 3 to 4"] * 20 for cell in cells}
    scores = {cell: [0] * 20 for cell in cells}
    answers.write(folder, answers.Answers(questions, scores, texts))
    results = analysis.results(rows, masks, questions, scores)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def row(name: str, mask: str) -> MatrixRow:
    return MatrixRow(name, mask, (name,))


def test_one_run_that_is_always_right_has_the_interval_of_a_cell(tmp_path):
    """Wilson's: where nothing varies, Student's is a point."""
    rows = [row("causal", "causal"), row("v2v", "v2v")]
    entries = changed.digits(made(tmp_path, rows, ["causal", "v2v"]))
    least = 20 / (20 + 1.959964**2)
    for one in entries:
        share, interval = (1.0, [least, 1.0]) if one["digit"] == "old" else (0.0, [0.0, 1 - least])
        assert one["share"] == share and one["interval"] == pytest.approx(interval, abs=1e-6)
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert (cells[0]["low"], cells[0]["high"]) == pytest.approx((0.0, 1 - least), abs=1e-6)


def test_rows_that_cannot_be_compared_are_refused(tmp_path, capsys):
    rows = [row("base", "causal"), row("v2v", "v2v")]
    made(tmp_path, rows, ["causal", "v2v"])
    assert changed.main([str(tmp_path)]) == 2
    assert "no row that was trained and run causally" in capsys.readouterr().err
    made(tmp_path, [row("causal", "causal"), *rows], ["causal"])
    assert changed.main([str(tmp_path)]) == 2
    assert "row 'v2v' was not run under its own mask, v2v" in capsys.readouterr().err
