"""Rows in TRL's forms: contents that are strings, beside images."""

import families
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_data
import training
from trl.data_utils import prepare_multimodal_messages

from fmtrain.data import checks, files, mixing, stream
from fmtrain.data.collator import Collator, encode_prompt
from fmtrain.data.dialogue import Malformed, turns, typed

own_cache = test_data.own_cache
ASK = {"role": "user", "content": "which?"}
TELL = {"role": "assistant", "content": "3"}
MORE = {"role": "user", "content": "sure?"}
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = training.user(0, "and in parts?")
DIALOGUES = {
    "strings": [ASK, TELL],
    "two turns": [SYSTEM, ASK, TELL, MORE, TELL],
    "answer in parts": [ASK, training.assistant("3"), PARTS, TELL],
    "first turn in parts": [PARTS, TELL, ASK, TELL],
}


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("name", DIALOGUES)
def test_images_of_string_contents_are_where_trl_puts_them(name, images):
    pictures = [families.photo(k) for k in range(images)]
    expected = []
    for message in prepare_multimodal_messages(DIALOGUES[name], pictures):
        parts = [{"type": p["type"], "text": p.get("text")} for p in message["content"]]
        expected.append({"role": message["role"], "content": parts})
    assert typed(expected, images) == typed(DIALOGUES[name], images)


def test_every_turn_of_string_contents_is_prompted_with_the_images():
    images = [families.photo(1), families.photo(2)]
    row = {"messages": DIALOGUES["two turns"], "images": images}
    assert [turn.images for turn in turns(row)] == [images, images]
    processor = families.processor("llava")
    whole = Collator(processor)([row])
    for turn in turns(row):
        prompt = encode_prompt(processor, row, turn).inputs["input_ids"][0]
        assert whole["input_ids"][0, : len(prompt)].equal(prompt)


def test_what_stays_refused():
    """Images beside parts that show some, or without a string to go before."""
    for messages, parts in (
        ([ASK, TELL, training.user(1, "this?"), TELL], 1),
        ([PARTS, TELL], 0),
        ([SYSTEM], 0),
    ):
        with pytest.raises(Malformed, match=f"the dialogue has {parts} image parts but 2 images"):
            typed(messages, 2)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_strings_train_as_parts(tmp_path, ending):
    """From files, checked, and as a stream: the batch is that of the same rows in parts."""
    names = [f"{k}.png" for k in range(2)]
    for k, name in enumerate(names):
        training.picture(k).save(tmp_path / name)
    strings = training.row(0, names, ASK, TELL, MORE, TELL)
    answer, more = training.assistant("3"), training.user(0, "sure?")
    parts = training.row(0, names, training.user(2, "which?"), answer, more, answer)
    processor = families.processor("llava")
    expected = Collator(processor, tmp_path)([parts])
    path = tmp_path / f"rows{ending}"
    if ending == ".jsonl":
        test_data.write(path, [strings])
    else:
        pq.write_table(pa.Table.from_pylist([strings]), path)
    rows = checks.prepare(files.load(str(path)), processor, str(path), max_length=500)
    check = stream.checker(processor, 500, 10**6, False)
    streamed = stream.load([mixing.Entry(str(path))], stream.Stream((), 0, 1, 1, check), 0, head=1)
    for row in (rows.rows[0], streamed.opened[0]):
        batch = Collator(processor, tmp_path)([row])
        assert batch.keys() == expected.keys()
        assert all(batch[key].equal(expected[key]) for key in batch)


def test_strings_and_lists_in_one_stream(tmp_path):
    training.picture(0).save(tmp_path / "0.png")
    shown = [training.user(1, "which?"), TELL]
    rows = [training.row(k, ["0.png"], *talk) for k, talk in enumerate(([ASK, TELL], shown))]
    path = str(test_data.write(tmp_path / "rows.jsonl", rows))
    processor = families.processor("llava")
    check = stream.checker(processor, 500, 10**6, False)
    rows = stream.load([mixing.Entry(path)], stream.Stream((), 0, 1, 1, check), 0, head=2)
    one, two = Collator(processor, tmp_path)(list(rows.opened))["input_ids"]
    assert one.equal(two)
