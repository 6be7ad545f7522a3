"""Which files a name means, and the types of what is in them: the same for whoever asks."""

import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import training

from fmtrain.data.row_format import arrow_schema, features
from fmtrain.data.sources import Source, row_files


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
    "names",
    [
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["train.jsonl", "validation.jsonl", "test.jsonl"],
        ["vqa_train.jsonl", "vqa_val2.jsonl"],
    ],
)
def test_splits_in_one_folder_are_not_joined(tmp_path, names):
    """The hub names files so; what is there to be tested on must not be trained on."""
    path = folder(tmp_path / "set", *names)
    assert row_files(path) == [path / names[0]]
    last = "validation" if "val" in names[-1] else "test"
    assert row_files(Source(str(path), split=last)) == [path / names[-1]]
    with pytest.raises(ValueError, match=r"has no split 'dev', but .*dataset_train_split"):
        row_files(Source(str(path), split="dev"))
    assert row_files(path / names[-1]) == [path / names[-1]]


def test_files_that_do_not_say_their_split_beside_held_out_ones(tmp_path):
    path = folder(tmp_path / "set", "more.json", "dev.json")
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=r"of the splits validation, and without one .*; name"):
            row_files(Source(str(path), split=split))


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
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
