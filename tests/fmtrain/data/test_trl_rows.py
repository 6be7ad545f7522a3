"""Rows in TRL's forms: contents that are strings, prompts with completions, one image."""

import json

import families
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_data
import training
from trl.data_utils import prepare_multimodal_messages

from eval import held_out
from fmtrain.data import checks, files, mixing, noise, row_format, stream
from fmtrain.data.collator import Collator, encode_prompt, encode_row
from fmtrain.data.dialogue import Malformed, in_parts, turns, typed

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
    assert [row["messages"] for row in loaded.rows] == [in_parts([ASK, TELL], 0)] * 2


@pytest.mark.parametrize("keys", [("role", "content"), ("content", "role")])
def test_lists_behind_ten_megabytes_of_strings(tmp_path, keys):
    long = {"role": "user", "content": "q" * 9000}
    talks = [[long, TELL]] * 1300 + [[training.user(1, "which?"), TELL]]
    rows = []
    for k, talk in enumerate(talks):
        turns = [{key: turn[key] for key in keys} for turn in talk]
        rows.append(training.row(k, ["0.png"], *turns))
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


# --- prompt and completion, and one image ---------------------------------------------------------

PROMPT_ROW = {"id": "p", "source": "s", "images": ["0.png", "1.png"]}
PROMPT_ROW |= {"prompt": [SYSTEM, ASK, TELL, MORE], "completion": [{**TELL, "content": "yes, 3"}]}


@pytest.fixture
def pictures(tmp_path):
    for k in range(2):
        training.picture(k).save(tmp_path / f"{k}.png")
    return tmp_path


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        test_data.write(path, rows)
    return str(path)


def both(path: str, count: int) -> list[list[dict]]:
    """The rows of a file as training reads them, all at once and as a stream."""
    processor = families.processor("llava")
    rows = checks.prepare(files.load(path), processor, path, max_length=500)
    if path.endswith(".json"):
        return [list(rows.rows)]
    sequence = stream.Stream((), 0, 1, 1, stream.checker(processor, 500, 10**6, False))
    return [
        list(rows.rows),
        list(stream.load([mixing.Entry(path)], sequence, 0, head=count).opened),
    ]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("completion", ["text", "parts"])
def test_of_prompt_and_completion_the_completion_is_learnt(pictures, ending, completion):
    """The ids and the layout are those of one dialogue, and the labels of TRL's completion."""
    last = training.assistant("yes, 3") if completion == "parts" else PROMPT_ROW["completion"][0]
    path = write(pictures / f"rows{ending}", [{**PROMPT_ROW, "completion": [last]}])
    processor = families.processor("llava")
    shown = training.user(2, "which?")
    dialogue = [SYSTEM, shown, TELL, MORE, {**TELL, "content": "yes, 3"}]
    whole = Collator(processor, pictures)([training.row(0, ["0.png", "1.png"], *dialogue)])
    for [row] in both(path, 1):
        batch = Collator(processor, pictures)([row])
        assert batch.keys() == whole.keys()
        for name in set(batch) - {"labels"}:
            assert batch[name].equal(whole[name]), name
        learnt, answers = batch["labels"][0] != -100, whole["labels"][0] != -100
        ends = processor.tokenizer.decode(batch["labels"][0][learnt])
        assert ends.startswith("yes, 3") and learnt.sum() < answers.sum()
        assert answers[learnt].all() and batch["labels"][0][learnt].equal(
            batch["input_ids"][0][learnt]
        )
        assert [turn.context for turn in turns(row)] == [True, False]


def test_labels_of_prompts_survive_padding_and_a_row_beside_them(pictures):
    path = write(pictures / "rows.jsonl", [PROMPT_ROW])
    processor = families.processor("llava")
    short = training.row(1, [], ASK, TELL)
    [[row], _] = both(path, 1)
    alone = Collator(processor, pictures)([row])["labels"][0]
    for rows in ([row, short], [short, row]):
        labels = Collator(processor, pictures)(rows)["labels"]
        assert labels[rows.index(row)].equal(alone)
        own = Collator(processor, pictures)([short])["labels"][0]
        padded = labels[rows.index(short)]
        assert padded[: len(own)].equal(own) and (padded[len(own) :] == -100).all()
    blank = encode_row(processor, noise.rows()[1]).inputs
    texts = [training.row(1, [], ASK, TELL, MORE, TELL) | {"prompt_messages": 2}]
    labels = Collator(processor, pictures, blank=blank)(texts)["labels"]
    assert (labels != -100).sum() == (Collator(processor)([short])["labels"] != -100).sum()


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("embedded", [False, True])
def test_one_image_is_a_list_of_one(pictures, ending, embedded):
    rows = [{"image": "0.png", "messages": [ASK, TELL]}, {"image": None, "messages": [ASK, TELL]}]
    if embedded and ending == ".jsonl":
        rows[0] = {"image": {"path": "0.png"}, "messages": [ASK, TELL]}
    elif embedded:
        rows[0]["image"] = {"bytes": (pictures / "0.png").read_bytes(), "path": "elsewhere.png"}
    path = write(pictures / f"rows{ending}", rows)
    processor = families.processor("llava")
    expected = Collator(processor, pictures)([training.row(0, ["0.png"], ASK, TELL)])
    for first, second in both(path, 2):
        assert len(first["images"]) == 1 and second["images"] == []
        batch = Collator(processor, pictures)([first])
        assert all(batch[name].equal(expected[name]) for name in expected)
    assert first["id"] in ("rows.jsonl row 1", "rows.parquet row 1")


FORMS = {
    "parts": training.row(0, ["0.png"], training.user(1, "which?"), training.assistant("3")),
    "strings": training.row(1, ["1.png"], ASK, TELL),
    "prompt": {**PROMPT_ROW, "images": ["0.png"]},
    "image": {"image": "1.png", "messages": [ASK, TELL]},
    "image of a prompt": {"image": "0.png", "prompt": [ASK], "completion": [TELL]},
    "text": {"id": "t", "images": [], "messages": [ASK, TELL]},
}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_sets_of_any_two_forms_make_a_mix(pictures, first, second, ending):
    """Also two of the same: TRL's contents that are strings were refused beside each other."""
    entries, processor = [], families.processor("llava")
    for k, name in enumerate((first, second)):
        path = write(pictures / f"{k}{ending}", [FORMS[name]])
        entries.append(mixing.Entry(path, image_root=str(pictures)))
    sets = [files.load(entry, image_root=entry.image_root) for entry in entries]
    mixed = files.mix(sets, entries, seed=0)
    assert mixed.size == 2
    alone = [Collator(processor, pictures)([rows.rows[0]]) for rows in sets]
    counts = sorted(int((batch["labels"] != -100).sum()) for batch in alone)
    found = [Collator(processor)([row]) for row in mixed.rows]
    assert sorted(int((batch["labels"] != -100).sum()) for batch in found) == counts


def test_several_forms_in_one_file(pictures):
    rows = list(FORMS.values())
    for found in both(write(pictures / "rows.jsonl", rows), len(rows)):
        assert [row["prompt_messages"] for row in found] == [0, 0, 4, 0, 1, 0]
        assert [len(row["images"]) for row in found] == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "What?"}, "prompt is no list of messages: What"),
        ({"completion": []}, "conversations, conversation, texts; this has prompt"),
        ({"messages": [ASK, TELL]}, "this has messages, prompt, completion"),
        ({"completion": [TELL, TELL]}, "message 5: an assistant's turn follows an assistant's"),
        ({"completion": [MORE]}, "no assistant's turn, so there is nothing to learn"),
        ({"prompt": [ASK, TELL]}, "message 2: an assistant's turn follows an assistant's turn"),
        ({"prompt": [SYSTEM]}, "the dialogue has 0 image parts but 2 images"),
        ({"image": "0.png"}, "it has both 'images' and 'image'; keep one"),
    ],
)
def test_prompts_and_completions_that_are_refused(pictures, change, reason):
    path = write(pictures / "rows.jsonl", [PROMPT_ROW | change])
    for which in (0, 1):
        with pytest.raises(ValueError, match=reason) as error:
            if which:
                sequence = stream.checker(families.processor("llava"), 500, 10**6, False)
                stream.load([mixing.Entry(path)], stream.Stream((), 0, 1, 1, sequence), 0)
            else:
                checks.prepare(files.load(path), families.processor("llava"), path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("context", [-1, 2, 3, "1", 0.5])
def test_a_prompt_of_all_messages_or_of_no_number_is_refused(context):
    row = {"messages": [MORE, TELL], "images": []}
    assert row_format.plain(row | {"prompt_messages": 1}, "here")["prompt_messages"] == 1
    with pytest.raises(ValueError, match=f"prompt_messages {context!r} leaves none of its 2 mess"):
        row_format.plain(row | {"prompt_messages": context}, "here")


def test_a_prompt_is_neither_asked_nor_scored(pictures):
    path = write(pictures / "rows.jsonl", [PROMPT_ROW])
    held = held_out.mixed(path, (), 5, None)
    assert [question.reference for question in held.questions] == ["yes, 3"]
    assert len(held.prompts(families.processor("llava"))) == 1
