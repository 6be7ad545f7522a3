"""Broken JSON: one line with the file and the row, and nothing raw on the terminal."""

import json
import re
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_data
import training

from data_prep import check
from data_prep.checking.reading import count_rows, scan
from fmtrain.command_line import one_line
from fmtrain.data import files, mixing, stream

own_cache = test_data.own_cache
GOOD = json.dumps(test_data.simple(0)).encode()
BROKEN = {
    "cut off": (GOOD[:-9], "not JSON: "),
    "no JSON": (b"{]", "not JSON: Expecting property name"),
    "not UTF-8": (
        GOOD.replace(b"which", b"\xff"),
        "not JSON: 'utf-8' codec can't decode",
    ),
    "half a pair": (
        GOOD.replace(b"which", rb"\ud83d\ude00 \ud800"),
        r"not JSON: '\\ud800' is half of a surrogate pair",
    ),
    "digits": (GOOD.replace(b'"r0"', b"1" * 5000), "not JSON: Exceeds the limit"),
    "nested": (GOOD.replace(b'"r0"', b"[" * 100_000), "not JSON: nested too deeply"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_of_many(tmp_path, name, capfd):
    """datasets counts rows from the start of a block of ten megabytes."""
    line, reason = BROKEN[name]
    sizes = {"short": 3} | ({"long": 45_000} if name in ("cut off", "not UTF-8") else {})
    for folder, before in sizes.items():
        path = tmp_path / folder
        path.mkdir()
        (path / "a.jsonl").write_bytes(GOOD + b"\n\n" + GOOD + b"\n")
        (path / "b.jsonl").write_bytes((GOOD + b"\n") * before + line + b"\n" + GOOD + b"\n")
        with pytest.raises(ValueError, match=rf"as rows: b.jsonl row {before + 1}: {reason}") as e:
            files.load(str(path))
        assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert "Failed to load" not in capfd.readouterr().err


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_of_a_stream(tmp_path, name):
    line, reason = BROKEN[name]
    (tmp_path / "b.jsonl").write_bytes(GOOD + b"\n" + line + b"\n")
    sequence = stream.Stream((), 0, 1, 1, stream.unchecked)
    with pytest.raises(ValueError, match=rf"b.jsonl, b.jsonl row 2: {reason}"):
        stream.load([mixing.Entry(str(tmp_path / "b.jsonl"))], sequence, 0)


@pytest.mark.parametrize("line", ["3", '"a text"', "[1, 2]"])
def test_a_line_that_is_no_object(tmp_path, line):
    path, said = tmp_path / "b.jsonl", f"b.jsonl row 2: a row is an object, not {json.loads(line)}"
    path.write_bytes(GOOD + b"\n" + line.encode() + b"\n")
    with pytest.raises(ValueError, match=f"b.jsonl: not readable as rows: {re.escape(said)}$"):
        files.load(str(path))
    sequence = stream.Stream((), 0, 1, 1, stream.unchecked)
    with pytest.raises(ValueError, match=f"b.jsonl, {re.escape(said)}$"):
        stream.load([mixing.Entry(str(path))], sequence, 0)


def test_a_broken_array(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[\n" + GOOD + b",\n" + GOOD[:-9] + b"\n]")
    with pytest.raises(
        ValueError, match=r"a.json: not readable as rows: a.json: not JSON: .* line [34] column"
    ):
        files.load(str(tmp_path / "a.json"))


def test_text_of_parquet_that_is_not_utf8(tmp_path):
    table = pa.Table.from_pylist([test_data.simple(0), test_data.simple(1)])
    ids = pa.array([b"r0", b"\xff"]).view(pa.string())
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: not readable as rows: .*UTF8"):
        files.load(str(tmp_path / "a.parquet"))


def test_pairs_and_escaped_backslashes_are_texts(tmp_path):
    for text in ("\U0001f600", r"\ud800", "\\\U0001f600"):
        row = test_data.simple(0, messages=[training.user(1, text), training.assistant("a")])
        path = test_data.write(tmp_path / "a.jsonl", [row])
        sequence = stream.Stream((), 0, 1, 1, stream.unchecked)
        opened = stream.load([mixing.Entry(str(path))], sequence, 0).opened
        assert opened[0]["messages"] == files.load(str(path)).rows[0]["messages"] == row["messages"]
        datasets.config.HF_DATASETS_CACHE = str(tmp_path / f"cache{len(text)}")


ESCAPE = "\x1b[31m\ud800"


def test_nothing_raw_reaches_the_terminal(tmp_path, capsys):
    assert one_line(ValueError(f"a\n {ESCAPE}é")) == r"a \x1b[31m\ud800é"
    assert one_line(OSError(2, "gone", ESCAPE)) == r"\x1b[31m\ud800: gone"
    rows = test_data.write(tmp_path / "a.jsonl", [{"id": "a", "\x1b[31m": 1}])
    with pytest.raises(ValueError) as error:
        files.load(str(rows))
    assert one_line(error.value).isprintable() and r"\x1b[31m" in one_line(error.value)
    broken = test_data.simple(0) | {"messages": [{"\x1b[31m": "\x1b[31m"}]}
    name = "\x1b[31m.jsonl"
    test_data.write(tmp_path / name, [broken])
    assert check.main([str(tmp_path / name), "--skip_images"]) == 1
    printed = capsys.readouterr()
    assert "\x1b[31m" not in printed.out + printed.err


def test_a_converter_prints_no_escape(tmp_path):
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    record = {"id": "a", "image": "a.png", "conversations": talk}
    (tmp_path / "m4_instruct_annotations.json").write_text(json.dumps([record]))
    words = ["--source", str(tmp_path), "--out", str(tmp_path / "out"), "--name", "\x1b[31m"]
    command = [sys.executable, "-m", "data_prep.interleave", *words]
    done = subprocess.run(command, cwd=training.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "\x1b" not in done.stdout and r"\x1b[31m" in done.stdout


def test_trainer_stream_and_checker_count_rows_alike(tmp_path, capsys):
    """Blank lines are no rows, and rows keep the numbers of their lines."""
    lines = [json.dumps(test_data.simple(k)) for k in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{lines[0]}\n  \n{lines[1]}\r\n\r\n{lines[2]}\n\n\t\n")
    sequence = stream.Stream((), 0, 1, 1, stream.unchecked)
    streamed = stream.load([mixing.Entry(str(path))], sequence, 0)
    assert files.load(str(path)).size == streamed.size == count_rows(path) == 3
    assert [stored.number for stored in scan(path)] == [2, 4, 6]
    assert check.main([str(path), "--skip_images", "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == 3
    path.write_text(f"\n{lines[0]}\n\n{{]\n\n")
    moved = ["--reject", str(tmp_path / "bad.jsonl")]
    assert check.main([str(path), "--skip_images", *moved]) == 0
    assert path.read_text() == f"\n{lines[0]}\n\n\n"
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == 4
