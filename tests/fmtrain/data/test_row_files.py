"""Which files a name means, and the types of what is in them: the same for whoever asks."""

import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import training

from data_prep.checking.reading import count_rows, read_rows
from fmtrain.data.row_format import arrow_schema, features, row_files


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("")
    return path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["rows.jsonl", "_manifest", "rejected.jsonl", "notes.txt"], ["rows.jsonl"]),
        (
            ["rows-00001.parquet", "rows-00000.parquet"],
            ["rows-00000.parquet", "rows-00001.parquet"],
        ),
        (["rows.parquet", "mix.jsonl"], ["rows.parquet"]),
        (["b.jsonl", "a.jsonl", "notes.txt"], ["a.jsonl", "b.jsonl"]),
        (["rows.json"], ["rows.json"]),
        (["x.json"], ["x.json"]),
    ],
)
def test_files_of_a_folder(tmp_path, names, expected):
    path = folder(tmp_path / "set", *names)
    assert row_files(path) == row_files(str(path)) == [path / name for name in expected]


def test_a_file_is_itself(tmp_path):
    path = folder(tmp_path / "set", "rows.jsonl", "rejected.jsonl")
    assert row_files(path / "rejected.jsonl") == [path / "rejected.jsonl"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["rows.jsonl", "rows-00000.parquet"], "holds .jsonl, .parquet files; keep one kind"),
        (["a.jsonl", "b.json"], "holds .json, .jsonl files; keep one kind"),
        (["notes.txt"], "no such rows"),
        ([], "no such rows"),
    ],
)
def test_folders_that_hold_no_rows(tmp_path, names, reason):
    with pytest.raises(ValueError, match=reason):
        row_files(folder(tmp_path / "set", *names))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
            r"set: holds files of the splits test, train \(test-00000-of-00001.parquet, train-0",
        ),
        (["train.jsonl", "validation.jsonl", "test.jsonl"], "splits test, train, validation"),
        (["vqa_train.jsonl", "vqa_val2.jsonl"], "of the splits train, validation"),
        (["more.json", "dev.json"], r"of the splits validation, and without one"),
    ],
)
def test_splits_in_one_folder_are_not_joined(tmp_path, names, reason):
    """The hub names files so; what is there to be tested on must not be trained on."""
    path = folder(tmp_path / "set", *names)
    with pytest.raises(ValueError, match=reason):
        row_files(path)
    assert row_files(path / names[0]) == [path / names[0]]
    with pytest.raises(ValueError, match="name one file, or keep one split in a folder"):
        count_rows(path)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["test-00000.parquet", "test-00001.parquet"],
        ["coco_train.jsonl", "contest.jsonl", "latest-2.jsonl", "valuable.jsonl"],
        ["rows-00000.parquet", "test.parquet"],
    ],
)
def test_files_of_one_split(tmp_path, names):
    files = row_files(folder(tmp_path / "set", *names))
    assert [file.name for file in files] == [n for n in names if n != "test.parquet"]


@pytest.mark.parametrize("name", ["nowhere", "set/notes.txt", "set/rows2.jsonl"])
def test_what_is_no_file_of_rows(tmp_path, name):
    folder(tmp_path / "set", "notes.txt")
    with pytest.raises(ValueError, match="no such rows"):
        row_files(tmp_path / name)


def test_the_checker_reads_no_arrays(tmp_path):
    path = folder(tmp_path / "set", "x.json")
    for read in (count_rows, lambda path: list(read_rows(path))):
        with pytest.raises(ValueError, match=r"x\.json: arrays are not checked; .* as \.jsonl"):
            read(path)


def test_checker_and_converters_import_nothing_heavy():
    """With `datasets` loaded the garbage collector makes the checker a quarter slower."""
    line = "import sys, data_prep.check, data_prep.interleave; print(*sys.modules)"
    words = [sys.executable, "-c", line]
    process = subprocess.run(words, cwd=training.ROOT, capture_output=True, text=True, check=True)
    assert {"datasets", "torch", "transformers"}.isdisjoint(process.stdout.split())


@pytest.mark.parametrize("embed_images", [False, True])
def test_the_arrow_schema_is_that_of_datasets(embed_images):
    """`datasets` derives it from the features by itself, and finds them in the metadata."""
    schema = arrow_schema(embed_images)
    types = datasets.Features.from_dict(features(embed_images))
    assert schema == types.arrow_schema
    assert datasets.Features.from_arrow_schema(schema) == types
    text = pa.struct([("type", pa.string()), ("text", pa.string())])
    assert schema.field("messages").type.value_type.field("content").type == pa.list_(text)
