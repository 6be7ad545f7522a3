"""Dialogues split into a row for every answer: what each shows, learns and is fed in inference."""

import copy

import families
import pytest
import test_data
import torch
import training

from fmtrain import Mask, allowed, attach, consistency
from fmtrain.data import checks, files, mixing, stream
from fmtrain.data.collator import Collator, encode_prompt, encode_row
from fmtrain.data.dialogue import TURNS, split, turns
from fmtrain.data.template import lawful
from fmtrain.layout import Role
from fmtrain.training.recipe import read
from fmtrain.training.rows import evaluation_rows, rows_of
from fmtrain.training.run_folder import fingerprint

own_cache = test_data.own_cache
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
ASK, MORE, LAST = (training.user(0, text) for text in ("which one?", "and now?", "sure?"))
ONE, TWO, THREE = (training.assistant(text) for text in ("red", "blue", "yes"))
SHOW, BOTH = training.user(1, "which one?"), training.user(1, "and now?")
IMAGE = {"type": "image", "text": None}
BEHIND = {"role": "user", "content": [{"type": "text", "text": "which one?"}, IMAGE]}
TEN = training.row(0, ["0.png", "1.png"], SYSTEM, SHOW, ONE, BOTH, TWO, LAST, THREE)


def said(row: dict) -> list[str]:
    """Each message as `role: parts`, an image as `#`."""
    lines = []
    for message in row["messages"]:
        parts = [
            part["text"] or "" if part["type"] == "text" else "#" for part in message["content"]
        ]
        lines.append(f"{message['role'][0]}: {' '.join(parts)}")
    return lines


def test_every_answer_has_its_images_its_question_and_its_history():
    """A dialogue of three turns, with an image in the first and one in the second."""
    first, second, third = split(TEN, "split")
    assert said(first) == ["s: Be brief.", "u: # which one?", "a: red"]
    assert said(second) == ["s: Be brief.", "u: which one?", "a: red", "u: # # and now?", "a: blue"]
    assert said(third)[:5] == ["s: Be brief.", "u: which one?", "a: red", "u: and now?", "a: blue"]
    assert said(third)[5:] == ["u: # # sure?", "a: yes"]
    assert [row["images"] for row in (first, second, third)] == [["0.png"], *2 * [TEN["images"]]]
    assert [row["id"] for row in (first, second, third)] == ["r0/0", "r0/1", "r0/2"]
    learnt = [
        [turn.reference for turn in turns(r) if not turn.context] for r in split(TEN, "split")
    ]
    assert learnt == [["red"], ["blue"], ["yes"]]


def test_without_history_a_question_stands_alone():
    rows = split(TEN, "split_without_history")
    assert [said(row)[1:] for row in rows] == [
        ["u: # which one?", "a: red"],
        ["u: # # and now?", "a: blue"],
        ["u: # # sure?", "a: yes"],
    ]
    assert all(said(row)[0] == "s: Be brief." for row in rows)


@pytest.mark.parametrize("how", TURNS[1:])
def test_images_behind_a_text_stay_behind(how):
    """Rows of dual-order training keep their order in later turns."""
    rows = split(training.row(0, ["0.png"], BEHIND, ONE, MORE, TWO), how)
    assert said(rows[1])[-2:] == ["u: and now? #", "a: blue"]


@pytest.mark.parametrize(
    "row",
    [
        training.row(0, ["0.png"], SHOW, ONE),
        training.row(0, [], ASK, ONE, ONE),
        training.row(0, ["0.png"], ASK),
        {"id": "x", "messages": None, "images": []},
        training.row(0, ["0.png", "1.png"], SHOW, ONE, MORE, TWO),
    ],
)
def test_what_cannot_be_split_is_left_to_the_checks(row):
    assert split(row, "split") == [row] and split(TEN, "whole") == [TEN]


def test_answers_of_a_prompt_are_not_made_rows_of():
    row = training.row(0, ["0.png"], SHOW, ONE, MORE, TWO, LAST, THREE) | {"prompt_messages": 2}
    assert [turn["id"] for turn in split(row, "split")] == ["r0/1", "r0/2"]


@pytest.fixture
def place(tmp_path):
    for k in range(2):
        training.picture(k).save(tmp_path / f"{k}.png")
    rows = [TEN, training.row(1, ["1.png"], SHOW, TWO), training.row(2, [], ASK, ONE, MORE, TWO)]
    test_data.write(tmp_path / "rows.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("mask", ["v2t", "mma", "future"])
@pytest.mark.parametrize("how", TURNS[1:])
def test_an_image_sees_the_question_that_is_learnt(place, mask, how):
    """Of the whole dialogue the last question is seen by none, split by every image."""
    processor = families.processor("llava")

    def seen(row: dict) -> set[int]:
        """Prefills with an image token that may attend to their last token."""
        layout = encode_row(processor, row, place).layout
        open_TT = allowed(mask, layout)[0]
        prefills = set()
        for prefill in range(int(layout.prefill.max()) + 1):
            [last, *_] = (layout.prefill[0] == prefill).nonzero().flatten().flip(0).tolist()
            if open_TT[layout.role[0] == Role.VISUAL, last].any():
                prefills.add(prefill)
        return prefills

    assert seen(TEN) == {0, 1}
    for number, row in enumerate(split(TEN, how)):
        assert max(seen(row)) == (number if how == "split" else 0)


@pytest.mark.parametrize("how", TURNS[1:])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_the_prompt_in_training_is_that_of_generation(place, family, how):
    processor = families.processor(family)
    for row in split(TEN, how):
        whole = encode_row(processor, row, place)
        [turn] = [turn for turn in turns(row) if not turn.context]
        prompt = encode_prompt(processor, row, turn, place)
        length = prompt.layout.shape[1]
        assert whole.inputs["input_ids"][:, :length].equal(prompt.inputs["input_ids"])
        for name in ("role", "image", "prefill"):
            own, fed = getattr(whole.layout, name), getattr(prompt.layout, name)
            assert own[:, :length].equal(fed), name


@pytest.mark.parametrize("mask", ["mma", "future", "v2t+merge"])
def test_the_logits_of_a_split_row_are_those_of_decoding(place, mask, model_of):
    model, processor = model_of("llava"), copy.copy(families.processor("llava"))
    processor.chat_template = lawful(processor)
    with attach(model, Mask.parse(mask)):
        rows = split(TEN, "split")
        for result in consistency.check(model, processor, rows, str(place)):
            assert result.passed, result


def test_every_answer_is_learnt_once(place):
    """The labels of the rows of a dialogue are those of the whole one."""
    processor = families.processor("llava")

    def learnt(rows: list[dict]) -> list[int]:
        batches = [Collator(processor, place)([row])["labels"][0] for row in rows]
        return torch.cat([labels[labels != -100] for labels in batches]).tolist()

    assert learnt(split(TEN, "split")) == learnt([TEN]) == learnt(split(TEN, TURNS[2]))


EXPECTED = ["r0/0", "r0/1", "r0/2", "r1", "r2/0", "r2/1"]


def recipe_of(place, **changes):
    keys = {"dataset_name": str(place / "rows.jsonl"), "image_root": str(place), "turns": "split"}
    path = training.write_recipe(place, model_name_or_path="tiny", **keys | changes)
    return read(str(path), ["--use_cpu", "true"])


def test_a_recipe_splits_its_rows_and_those_of_its_evaluation(place):
    recipe = recipe_of(place, eval_strategy="steps", eval_dataset_name=str(place / "rows.jsonl"))
    assert [row["id"] for row in rows_of(recipe).rows] == EXPECTED
    processor = families.processor("llava")
    assert [row["id"] for row in evaluation_rows(recipe, processor).rows] == EXPECTED
    first = rows_of(recipe, 2)
    assert [row["id"] for row in first.rows] == EXPECTED[:2] and first.size == 2
    mixture = [{"path": str(place / "rows.jsonl"), "image_root": str(place)}]
    mixed = rows_of(recipe_of(place, dataset_name=None, image_root=None, datasets=mixture))
    assert sorted(row["id"] for row in mixed.rows) == EXPECTED
    with pytest.raises(ValueError, match="turns is 'all'; known are whole, split"):
        recipe_of(place, turns="all")


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_stream_splits_as_a_set_that_is_loaded(place, ending):
    path = place / f"rows{ending}"
    if ending == ".parquet":
        files.load(str(place / "rows.jsonl")).rows.to_parquet(path)
        (place / "rows.jsonl").unlink()
    processor = families.processor("llava")
    check_row = stream.checker(processor, None, 10**6, False)
    sequence = stream.Stream((), 0, 1, 1, check_row)
    entry = mixing.Entry(str(path), image_root=str(place))
    rows = stream.load([entry], sequence, 0, head=6, turns="split")
    assert [row["id"] for row in rows.opened] == EXPECTED and rows.passes == 6
    loaded = checks.prepare(files.load(str(path), turns="split"), processor, str(path))
    for own, streamed in zip(loaded.rows, rows.opened, strict=True):
        assert own["messages"] == streamed["messages"] and own["images"] == streamed["images"]
        assert own["prompt_messages"] == streamed["prompt_messages"]
    others = {how: stream.load([entry], sequence, 0, head=1, turns=how) for how in TURNS}
    assert len({fingerprint(rows) for rows in others.values()}) == 3


def test_embedded_images_go_with_each_answer(place, tmp_path):
    rows = [training.row(k, ["0.png", "1.png"], SHOW, ONE, BOTH, TWO) for k in range(3)]
    test_data.embedded(tmp_path / "made", rows, True)
    first, second, *_ = files.load(str(tmp_path / "made"), turns="split").rows
    assert [len(row["images"]) for row in (first, second)] == [1, 2]
    assert first["images"][0]["bytes"] == second["images"][0]["bytes"]
