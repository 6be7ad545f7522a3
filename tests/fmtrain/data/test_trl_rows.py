"""Rows in TRL's forms: contents that are strings, beside images."""

import json

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


TEXTS = ["3", "[1]", "null", "true", '"quoted"', "{}", '[{"type": "text", "text": "x"}]', "red"]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_strings_and_lists_in_one_file_stay_the_texts_that_they_are(tmp_path, ending):
    """datasets takes such a column for JSON, and reads a text like 3 or "quoted" as its value."""
    training.picture(0).save(tmp_path / "0.png")
    rows = []
    for k, text in enumerate(TEXTS):
        answer = {"role": "assistant", "content": text}
        shown = training.user(1, "which?")
        rows.append(training.row(k, ["0.png"], shown, answer) | {"width": 3, "id": k})
        rows.append(training.row(k, ["0.png"], ASK, answer) | {"id": f"string {k}"})
        rows.append(training.row(k, [], shown | {"content": "why?"}, training.assistant(text)))
    path = tmp_path / f"rows{ending}"
    path.write_text(json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows)))
    processor = families.processor("llava")
    loaded = checks.prepare(files.load(str(path)), processor, str(path), max_length=500)
    assert loaded.size == len(rows)
    for stored, row in zip(loaded.rows, rows, strict=True):
        assert typed(stored["messages"], len(row["images"])) == typed(
            row["messages"], len(row["images"])
        )
        assert stored["id"] == str(row["id"]) and stored["images"] == row["images"]


def test_strings_without_any_image(tmp_path):
    rows = [training.row(k, [], ASK, TELL) for k in range(2)]
    loaded = files.load(str(test_data.write(tmp_path / "rows.jsonl", rows)))
    assert [row["messages"] for row in loaded.rows] == [[ASK, TELL]] * 2


def test_lists_behind_ten_megabytes_of_strings(tmp_path):
    long = {"role": "user", "content": "q" * 9000}
    rows = [training.row(k, ["0.png"], long, TELL) for k in range(1300)]
    rows.append(training.row(1300, ["0.png"], training.user(1, "which?"), TELL))
    loaded = files.load(str(test_data.write(tmp_path / "rows.jsonl", rows)))
    assert loaded.size == 1301
    for k in (0, 1300):
        assert typed(loaded.rows[k]["messages"], 1) == typed(rows[k]["messages"], 1)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": 3}, "row 2: message 1: its content is neither a text"),
        ({"role": "bot", "content": "3"}, "row 2: message 1: role 'bot' is not one of"),
    ],
)
def test_a_bad_row_among_strings_and_lists(tmp_path, message, reason):
    rows = [training.row(0, [], ASK, training.assistant("3")), training.row(1, [], ASK, message)]
    path = test_data.write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=rf"not readable as rows: rows.jsonl {reason}"):
        files.load(str(path))
