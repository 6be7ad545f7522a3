"""Videos, sounds and misspelt images are refused by name: a row without them would be a text."""

import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_data
import training

from data_prep import check
from data_prep.converting.command import main
from data_prep.interleave import CONVERTER
from fmtrain.data import files, mixing, stream
from fmtrain.data.dialogue import Malformed, typed

own_cache = test_data.own_cache
KEYS = ["video", "videos", "audio", "Audio", "Image", "IMAGES", "imges", "Videos"]
HARMLESS = {"image_id": "3", "image_root": "/", "imageId": "7", "width": 3, "modality": "video"}


@pytest.mark.parametrize(
    "text", ["<video>\nWhat?", "What is in <video>?", "<audio>", "</p><video>"]
)
def test_a_placeholder_in_a_question(text, tmp_path, capsys):
    name = "<audio>" if "audio" in text else "<video>"
    with pytest.raises(Malformed, match=f"message 0: {name} in its text, but only images") as error:
        typed([training.user(0, text), training.assistant("a")], 0)
    assert error.value.kind == "placeholder in text"
    row = test_data.simple(0, 0, messages=[training.user(0, text), training.assistant("a")])
    rows = test_data.write(tmp_path / "rows.jsonl", [row])
    assert check.main([str(rows), "--json", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())["problems"]
    assert found == {"placeholder in text": 1}


@pytest.mark.parametrize(
    "text", ["<video><source></video>", "a video", "<video src=a>", "< video >"]
)
def test_html_and_words_are_texts(text):
    for messages in (
        [training.user(0, text), training.assistant("a")],
        [training.user(0, "how in HTML?"), training.assistant("<video>")],
    ):
        assert typed(messages, 0) == typed(typed(messages, 0), 0)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("key", KEYS)
def test_a_row_with_other_media(key, ending, tmp_path):
    empty = test_data.simple(0, 0) | HARMLESS | {key: ""}
    rows = [empty, test_data.simple(1, 0) | HARMLESS | {key: "a.mp4"}]
    path = write(tmp_path / f"set{ending}", rows)
    words = rf"row 2: it has '{key}', which would be left out; .* those under 'images'"
    with pytest.raises(ValueError, match=words):
        files.load(str(path))
    with pytest.raises(ValueError, match=words):
        streamed(path, 2)
    path = write(tmp_path / f"good{ending}", [empty])
    assert files.load(str(path)).size == len(streamed(path, 1)) == 1


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        return test_data.write(path, rows)
    for row in rows:
        row["images"] = row["images"] or ["a.png"][:0]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def streamed(path: Path, count: int) -> list[dict]:
    sequence = stream.Stream((), 0, 1, 1, stream.unchecked)
    rows = stream.load([mixing.Entry(str(path))], sequence, 0, head=count)
    return list(islice(rows.opened, count))


TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bus."}]


@pytest.mark.parametrize("key", KEYS)
def test_a_record_with_other_media(key, tmp_path, capsys):
    error = converted(tmp_path, {"id": "a", "conversations": TALK, key: ["a.mp4"], **HARMLESS})
    assert f"row 1: it has '{key}', which would be left out" in capsys.readouterr().err and error


def test_a_record_with_a_placeholder(tmp_path, capsys):
    talk = [{"from": "human", "value": "<video>\nWhat?"}, TALK[1]]
    assert converted(tmp_path, {"id": "a", "conversations": talk}) == 2
    assert "row 1: turn 1: <video> in its text" in capsys.readouterr().err
    assert converted(tmp_path, {"id": "a", "conversations": TALK, "video": None, **HARMLESS}) == 0


def converted(folder: Path, record: dict) -> int:
    (folder / "source").mkdir(exist_ok=True)
    (folder / "source" / "m4_instruct_annotations.json").write_text(json.dumps([record]))
    return main(CONVERTER, ["--source", str(folder / "source"), "--out", str(folder / "out")])
