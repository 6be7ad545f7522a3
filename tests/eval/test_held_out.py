"""Held-out rows, their questions, and what two checkpoints answer to them."""

import json

import pytest

from eval import compare, held_out
from eval.held_out import HeldOut
from fmtrain.decoding import right
from fmtrain.masks import Mask, parse_masks
from fmtrain.tiny import CHECKPOINT, digits


def text(role: str, words: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": words}]}


def test_a_question_for_each_turn():
    """In order; a row is one unit, whatever its turns; a content may be a plain text."""
    rows = [
        {
            "id": 7,
            "task": "two",
            "messages": [
                text("system", "be brief"),
                {"role": "user", "content": "first?"},
                text("assistant", " 1 "),
                text("user", "second?"),
                text("assistant", "2"),
            ],
            "images": [],
        },
        {
            "id": "b",
            "source": "one",
            "messages": [text("user", "why?"), text("assistant", "so")],
            "images": [],
        },
    ]
    data = HeldOut(rows, ".")
    assert [tuple(vars(question).values()) for question in data.questions] == [
        ("two", "7", "first?", "1"),
        ("two", "7", "second?", "2"),
        ("one", "b", "why?", "so"),
    ]
    changed = HeldOut([rows[0], {**rows[1], "messages": rows[0]["messages"]}], ".")
    assert changed.digest != data.digest == HeldOut(list(rows), "elsewhere").digest


def test_digits_by_task_and_mixed():
    data = held_out.by_task("digits", ("count", "dialogue"), 3, None)
    tasks = [question.task for question in data.questions]
    assert tasks == ["count"] * 3 + ["dialogue"] * 6 and len(data.rows) == 6
    assert len({question.unit for question in data.questions}) == 6
    mixed = held_out.mixed("digits", digits.TASKS, 10, None)
    assert {question.task for question in mixed.questions} == set(digits.TASKS)
    assert len(mixed.rows) == 10


@pytest.fixture
def answered(monkeypatch) -> list[tuple[str, list[str]]]:
    """Which checkpoints are asked under which masks; all answers are right."""
    answered = []

    def answers(checkpoint, masks, data):
        answered.append((checkpoint, [str(mask) for mask in masks]))
        return [[question.reference for question in data.questions] for _ in masks]

    monkeypatch.setattr(compare, "answers", answers)
    return answered


def test_compare_asks_each_checkpoint_under_its_own_mask(answered, tmp_path):
    """And the base under the other's; one that records none is causal."""
    folders = {"v2v": "v2v", "light": "future+merge", "plain": None}
    for name, mask in folders.items():
        config = json.loads((CHECKPOINT / "config.json").read_text())
        config["fmtrain"] = mask and Mask.parse(mask).record()
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    v2v, light, plain = (str(tmp_path / name) for name in folders)
    for before, after in ((v2v, light), (plain, v2v), (v2v, plain)):
        assert compare.main(["--before", before, "--after", after, "--count", "2"]) == 0
    assert answered == [
        (v2v, ["v2v", "future+merge"]),
        (light, ["future+merge"]),
        (plain, ["causal", "v2v"]),
        (v2v, ["v2v"]),
        (v2v, ["v2v", "causal"]),
        (plain, ["causal"]),
    ]


def test_compare_counts_right_answers(answered, capsys):
    """Of the base as it was trained and with the other's mask, and of the other one."""
    folder = str(CHECKPOINT)
    options = ["--tasks", "count", "read", "--count", "4", "--show", "2"]
    assert compare.main(["--before", folder, "--after", folder, *options]) == 0
    assert answered == [(folder, ["causal", "causal"]), (folder, ["causal"])]
    printed = capsys.readouterr().out
    assert "count" in printed and "dialogue" not in printed and "1.000" in printed
    assert compare.main(["--before", folder, "--after", "/nowhere"]) == 2
    assert capsys.readouterr().err == "error: /nowhere: no such checkpoint folder\n"


def test_answers_of_the_embedded_model():
    data = held_out.mixed("digits", ["read"], 6, None)
    masks = parse_masks(["causal", "v2v"])
    for answers in compare.answers(str(CHECKPOINT), masks, data):
        pairs = zip(answers, data.questions, strict=True)
        assert sum(right(text, question.reference) for text, question in pairs) >= 4


def test_chance_of_a_question_is_that_of_one_who_does_not_look():
    """The most frequent answer of each task is right about that often; other data: not known."""
    tasks = (*digits.TASKS, *digits.PROBES)
    data = held_out.by_task("digits", tasks, 400, None)
    chances = held_out.chance("digits", tasks)
    assert tuple(chances) == tasks
    for task, chance in chances.items():
        turns: dict[str, list[tuple[str, str]]] = {}  # (what the question ends with, answer)
        for question in data.questions:
            if question.task == task:
                kind = question.text.rstrip("0123456789?")
                named = question.text.removeprefix(kind).rstrip("?")
                turns.setdefault(kind, []).append((named, question.reference))
        shares = []
        for asked in turns.values():
            ruled_out = asked[0][0] != "" and all(named != answer for named, answer in asked)
            shares.append(len({answer for _, answer in asked}) - ruled_out)
        few = max(shares) <= 10  # so few that all of them come
        mean = sum(1 / count for count in shares) / len(shares)
        assert chance == pytest.approx(mean, rel=1e-9 if few else 0.6)
    assert held_out.chance("rows.jsonl", ["read"]) == {} == held_out.chance(None, ["read"])
