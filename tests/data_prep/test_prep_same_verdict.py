"""The checker says of a file what training says of it: good or bad, and how many rows."""

import copy
import json
import re
from pathlib import Path

import datasets
import families
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import check
from fmtrain.data import checks, files, mixing, stream

ASK = {"role": "user", "content": "which?"}
TELL = {"role": "assistant", "content": "3"}
SHOW = training.user(1, "this?")
PAIR = {"prompt": [ASK, TELL, {**ASK, "content": "and?"}], "completion": [TELL]}
# Each with one image but the last; every row gets an id and a question of its own.
FORMS = {
    "parts": {"messages": [SHOW, training.assistant("3")], "images": ["0.png"]},
    "strings": {"messages": [ASK, TELL], "images": ["0.png"]},
    "strings and parts": {"messages": [SHOW, TELL, ASK, TELL], "images": ["0.png"]},
    "prompt": {**PAIR, "images": ["0.png"]},
    "prompt in parts": {"prompt": [SHOW], "completion": [TELL], "images": ["0.png"]},
    "one image": {"messages": [ASK, TELL], "image": "0.png"},
    "one image of a prompt": {**PAIR, "image": "0.png"},
    "context": {"messages": [SHOW, TELL, ASK, TELL], "images": ["0.png"], "prompt_messages": 2},
    "text": {"messages": [ASK, TELL], "images": []},
}
GOOD = {
    "as it is": lambda row: row,
    "no id": lambda row: {key: row[key] for key in row if key != "id"},
    "a number as id": lambda row: {**row, "id": 7},
    "no source": lambda row: {key: row[key] for key in row if key != "source"},
    "null source": lambda row: {**row, "source": None},
    "more keys": lambda row: {**row, "width": 3, "tags": ["a"]},
    "keys in another order": lambda row: dict(reversed(row.items())),
    "keys in messages": lambda row: each_message(row, lambda m: {**m, "name": "n"}),
    "keys reversed": lambda row: each_message(row, lambda m: dict(reversed(m.items()))),
    "null images": lambda row: row if shown(row) else {**row, "images": None},
    "an empty medium": lambda row: {**row, "video": ""},
}
BAD = {
    "unknown role": lambda row: each_message(row, lambda m: {**m, "role": "human"}),
    "no role": lambda row: each_message(row, lambda m: {"content": m["content"]}),
    "content a number": lambda row: each_message(row, lambda m: {**m, "content": 3}),
    "content null": lambda row: each_message(row, lambda m: {**m, "content": None}),
    "unknown part": lambda row: in_answers(row, [{"type": "video", "text": "x"}]),
    "part without text": lambda row: in_answers(row, [{"type": "text"}]),
    "part a text": lambda row: in_answers(row, ["3"]),
    "image in an answer": lambda row: in_answers(row, [{"type": "image"}]),
    "empty answer": lambda row: in_answers(row, " "),
    "placeholder": lambda row: each_message(row, lambda m: {**m, "content": "<image> a"}),
    "video": lambda row: with_question(row, {**ASK, "content": "<video> what?"}),
    "a message too many": lambda row: {**row, last(row): [*row[last(row)], TELL]},
    "no answer": lambda row: {**row, last(row): [ASK]},
    "no messages": lambda row: {**row, last(row): []},
    "null messages": lambda row: {**row, last(row): None},
    "messages a text": lambda row: {**row, last(row): "x"},
    "other media": lambda row: {**row, "videos": ["a.mp4"]},
    "two kinds of images": lambda row: {**row, "images": ["0.png"], "image": "1.png"},
    "no such image": lambda row: {**row, key_of_images(row): named(row, "none.png")},
    "no picture": lambda row: {**row, key_of_images(row): named(row, "text.png")},
    "outside": lambda row: {**row, key_of_images(row): named(row, "../0.png")},
    "image a number": lambda row: {**row, key_of_images(row): named(row, 3)},
    "an image too many": lambda row: {**more_images(row)},
    "for evaluation only": lambda row: {**row, "source": "evaluation_only/x"},
    "both forms": lambda row: {**row, "messages": [ASK, TELL], "prompt": [ASK]},
    "id a list": lambda row: {**row, "id": ["x"]},
}


def last(row: dict) -> str:
    return "messages" if "messages" in row else "completion"


def shown(row: dict) -> bool:
    return bool(row.get("images") or row.get("image"))


def key_of_images(row: dict) -> str:
    return "image" if "image" in row else "images"


def named(row: dict, name) -> object:
    return name if "image" in row else [name]


def more_images(row: dict) -> dict:
    shows = {key: [SHOW, *row[key][1:]] for key in ("messages", "prompt") if key in row}
    row = {key: row[key] for key in row if key != "image"}
    return {**row, **shows, "images": ["0.png", "1.png"]}


def each_message(row: dict, change) -> dict:
    lists = {key: row[key] for key in ("messages", "prompt", "completion") if key in row}
    return {**row, **{key: [change(m) for m in messages] for key, messages in lists.items()}}


def in_answers(row: dict, content: object) -> dict:
    answers = {**TELL, "content": content}
    return each_message(row, lambda m: answers if m["role"] == "assistant" else m)


def with_question(row: dict, question: dict) -> dict:
    key = "messages" if "messages" in row else "prompt"
    return {**row, key: [question, *row[key][1:]], "images": [], "image": None}


def made(number: int, form: str, change) -> dict:
    """A row of a form, changed, with an id and a question of its own."""
    row = {"id": f"r{number}", "source": "s", **copy.deepcopy(FORMS[form])}
    for message in row.get("prompt", row.get("messages")):
        if isinstance(message["content"], str):
            message["content"] += f" {number}"
        else:
            message["content"][-1]["text"] += f" {number}"
    return change(row)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A processor and pictures."""
    folder = tmp_path_factory.mktemp("verdict")
    families.processor("llava").save_pretrained(folder / "processor")
    for k in range(2):
        training.picture(k).save(folder / f"{k}.png")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def written(place: Path, rows: list, ending: str) -> Path:
    path = place / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_training(path: Path, limit: int | None = None) -> checks.Rows | str:
    try:
        processor = families.processor("llava")
        return checks.prepare(files.load(str(path)), processor, str(path), max_length=limit)
    except ValueError as error:
        assert all(re.match(r"/\S+[:,] ", line) for line in str(error).split("\n")), str(error)
        return str(error)


def of_stream(path: Path, count: int) -> int | str:
    sequence = stream.checker(families.processor("llava"), None, 10**6, False)
    try:
        entry = mixing.Entry(str(path))
        return stream.load([entry], stream.Stream((), 0, 1, 1, sequence), 0, head=count).passes
    except ValueError as error:
        return str(error)


def of_checker(path: Path, limit: int | None = None) -> dict | None:
    """Its findings; None where the check could not be made."""
    place, found = path.parent, path.parent / "found.json"
    words = ["--image_root", place, "--processor", place / "processor", "--json", found]
    words += [] if limit is None else ["--max_length", limit]
    if check.main([str(word) for word in (path, *words)]) == 2:
        return None
    return json.loads(found.read_text())


def agree(path: Path, count: int) -> bool:
    """Whether a file of `count` rows is good, of which all three must be of one mind."""
    trained, found = of_training(path), of_checker(path)
    good = not isinstance(trained, str)
    assert good == (found is not None and not found["bad"]), (trained, found)
    if path.suffix != ".json":
        streamed = of_stream(path, count)
        assert good == (not isinstance(streamed, str)), (trained, streamed)
        # of a stream a picture's header alone is read before it is needed
        assert not good or streamed == count
    if good:
        assert trained.size == found["rows"] == count
    elif found is not None:
        assert found["rows"] == count
        numbers = re.match(r"\S+: (\d+) of (\d+) rows cannot be trained on", trained)
        assert numbers is None or numbers.groups() == (str(found["bad"]), str(count)), trained
    return good


@pytest.mark.parametrize("change", GOOD)
def test_good_rows_of_every_form_are_good_for_all(place, change, capsys):
    rows = [made(k, form, GOOD[change]) for k, form in enumerate(FORMS)]
    if change == "a number as id":
        rows = [{**row, "id": k} for k, row in enumerate(rows)]
    for ending in (".jsonl", ".json"):
        assert agree(written(place, rows, ending), len(rows))
    for row in rows:
        contents = [type(message["content"]) for message in row.get("prompt", row.get("messages"))]
        if len(set(contents)) == 1:  # Parquet has one type for all
            assert agree(written(place, [row], ".parquet"), 1)


@pytest.mark.parametrize("change", BAD)
def test_a_bad_row_of_any_form_is_bad_for_all(place, change, capsys):
    for form in ("parts", "prompt", "one image"):
        rows = [made(0, form, lambda row: row), made(1, form, BAD[change])]
        assert not agree(written(place, rows, ".jsonl"), 2), form


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_files_of_any_rows_are_the_same_for_all(place, capsys, data):
    rows, good = [], True
    for number in range(data.draw(st.integers(1, 5))):
        form = data.draw(st.sampled_from(sorted(FORMS)))
        bad = data.draw(st.sampled_from([False, False, True]))
        changes = BAD if bad else GOOD
        row = made(number, form, changes[data.draw(st.sampled_from(sorted(changes)))])
        rows.append({**row, "id": f"n{number}"} if row.get("id") == 7 else row)
        good = good and not bad
    assert agree(written(place, rows, ".jsonl"), len(rows)) == good


def test_long_rows_are_counted_alike(place, capsys):
    rows = [made(k, form, lambda row: row) for k, form in enumerate(FORMS)]
    path = written(place, rows, ".jsonl")
    lengths = sorted(of_checker(path)["tokens"]["histogram"].values())
    assert sum(lengths) == len(rows)
    for limit in (30, 45, 60):
        trained, found = of_training(path, limit), of_checker(path, limit)
        if not isinstance(trained, str):
            assert trained.dropped == found["tokens"]["over_limit"] == found["bad"]


@pytest.mark.parametrize(
    "text",
    [
        b'{"id": "a"',
        b"[1, 2]",
        b"3",
        b"null",
        b'{"messages": [], "images": NaN}',
        b"\xff",
        b'"\\ud800"',
    ],
)
def test_lines_that_are_no_rows(place, text, capsys):
    good = json.dumps(made(0, "parts", lambda row: row)).encode()
    path = place / "rows.jsonl"
    path.write_bytes(good + b"\n" + text + b"\n")
    assert not agree(path, 2)


def test_rows_without_any_column_of_images(place, capsys):
    row = made(0, "strings", lambda row: {key: row[key] for key in row if key != "images"})
    path = written(place, [row], ".jsonl")
    assert not agree(path, 1)
    assert "the rows have no column images" in capsys.readouterr().err
    rows = [row, made(1, "parts", lambda row: row)]
    assert agree(written(place, rows, ".jsonl"), 2)
