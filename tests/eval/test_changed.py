"""The two digits of `changed`, each on its own."""

import json
import shutil
from pathlib import Path

import pytest

from eval import changed
from eval.matrix import answers

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
