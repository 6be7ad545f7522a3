"""Rows are checked once: what the check found is kept until something that it depends on changes.
Rows that are too long are dropped by their share, source by source."""

import copy
import os
import subprocess
from pathlib import Path

import families
import numpy as np
import pytest
import test_data
import training

from fmtrain import sft
from fmtrain.data import checks, files
from fmtrain.data.collator import encode_row
from fmtrain.data.row_format import EVALUATION_ONLY
from fmtrain.data.sources import Source
from fmtrain.training.recipe import read
from fmtrain.training.rows import training_rows

own_cache = test_data.own_cache


@pytest.fixture
def rows(tmp_path) -> Path:
    """Six rows with one picture or two, and longer answers one after the other."""
    written = []
    for number in range(6):
        row = test_data.simple(number, 1 + number % 2, source="ab"[number % 2])
        row["messages"][-1] = training.assistant("from 1 " * (number + 1))
        written.append(row)
        for name in row["images"]:
            training.picture(number).save(tmp_path / name)
    return test_data.write(tmp_path / "rows.jsonl", written)


@pytest.fixture
def examined(monkeypatch) -> list[str]:
    """The rows that are checked, by their ids."""
    names, original = [], checks.examine

    def note(row, **options):
        names.append(row["id"])
        return original(row, **options)

    monkeypatch.setattr(checks, "examine", note)
    return names


def prepared(path: Path, processor=None, say=lambda line: None, **options) -> files.Rows:
    processor = processor or families.processor("llava")
    return checks.prepare(files.load(str(path)), processor, path.name, say=say, **options)


def lengths_of(found: files.Rows) -> list[int]:
    processor = families.processor("llava")
    return [encode_row(processor, row, found.image_root)[1].shape[1] for row in found.rows]


# --- once -----------------------------------------------------------------------------------------


def test_rows_are_checked_once(rows, examined):
    lines = []
    first = prepared(rows, say=lines.append)
    assert len(examined) == 6
    again = prepared(rows, say=lines.append)
    assert len(examined) == 6, "nothing is tokenized or decoded again"
    assert again.rows["length"][:] == first.rows["length"][:] == lengths_of(first)
    assert "6 rows checked" in lines[0] and "6 rows, checked before (20" in lines[1]


def test_rows_made_in_memory_are_checked_once(examined):
    for _ in range(2):
        digits = files.load(Source("digits", "read"), 5)
        checks.prepare(digits, families.processor("llava"), "digits")
    assert len(examined) == 5
    checks.prepare(
        files.load(Source("digits", "read"), 5, seed=1), families.processor("llava"), "digits"
    )
    assert len(examined) == 10


def newer(path: Path) -> None:
    """As if it had been written a second later."""
    time = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(time, time))


def other_template(processor):
    processor.chat_template += "{# another one #}"


def other_pixels(processor):
    processor.image_processor.crop_size = {"height": 56, "width": 56}


def other_words(processor):
    processor.tokenizer.add_tokens(["which"])


@pytest.mark.parametrize("change", [other_template, other_pixels, other_words])
def test_another_processor_checks_again(rows, examined, change):
    processor = copy.deepcopy(families.processor("llava"))
    prepared(rows, processor)
    change(processor)
    prepared(rows, processor)
    assert len(examined) == 12


@pytest.mark.parametrize(
    "options", [{"max_pixels": 481}, {"check_images": False}, {"allow_evaluation_data": True}]
)
def test_other_options_check_again(rows, examined, options):
    prepared(rows)
    prepared(rows, **options)
    assert len(examined) == 12


def test_other_rows_are_checked_again(rows, examined):
    prepared(rows)
    text = rows.read_text()
    rows.write_text(text.replace("which 3", "which 8"))
    newer(rows)
    prepared(rows)
    assert len(examined) == 12
    rows.write_text(text.replace('"source": "b"', f'"source": "{EVALUATION_ONLY}b"'))
    newer(rows)
    with pytest.raises(ValueError, match="is evaluation data"):
        prepared(rows)


def test_another_version_of_the_checks_checks_again(rows, examined, monkeypatch):
    prepared(rows)
    monkeypatch.setattr(checks.check_cache, "_code", lambda: "another")
    prepared(rows)
    assert len(examined) == 12


@pytest.mark.parametrize("way", ["broken", "gone", "text"])
def test_a_picture_that_changes_is_noticed(rows, examined, way):
    prepared(rows)
    picture = rows.parent / "3_0.png"
    if way == "broken":
        time = picture.stat().st_mtime_ns
        picture.write_bytes(picture.read_bytes()[:-40])
        os.utime(picture, ns=(time, time))  # the size tells
    elif way == "text":
        picture.write_text("no picture")
    else:
        picture.unlink()
    for _ in range(2):  # what is bad is never kept as good
        with pytest.raises(ValueError, match=r"row r3: image '3_0\.png'"):
            prepared(rows)
    training.picture(3).save(picture)
    assert prepared(rows).size == 6
    assert len(examined) == 4 * 6


def test_embedded_pictures_are_part_of_the_rows(tmp_path, examined):
    written = [test_data.simple(k, 1, id=f"c{k}") for k in range(3)]
    folder = tmp_path / "c"
    test_data.embedded(folder, written, False)
    found = [prepared(folder).rows["length"][:] for _ in range(2)]
    assert found[0] == found[1] and len(examined) == 3
    for file in folder.glob("*.parquet"):
        newer(file)
    prepared(folder)
    assert len(examined) == 6


def test_the_other_processes_of_a_machine_read_what_the_first_found(rows, examined, monkeypatch):
    found = prepared(rows)
    monkeypatch.setattr(checks.check_cache, "stamp", None)  # they look at no picture either
    assert prepared(rows, first=False).rows["length"][:] == found.rows["length"][:]
    assert len(examined) == 6


def test_a_file_of_the_cache_that_is_cut_is_not_believed(rows, examined):
    import datasets

    prepared(rows)
    [file] = Path(datasets.config.HF_DATASETS_CACHE, checks.check_cache.FOLDER).iterdir()
    file.write_text(file.read_text()[:-30])
    prepared(rows)
    prepared(rows)
    assert len(examined) == 12


def test_a_recipe_is_started_twice_and_checked_once(rows, tmp_path, examined, capsys):
    training.workplace(tmp_path / "w", rows=1)
    training.write_recipe(tmp_path / "w", dataset_name=str(rows), max_steps=1, save_steps=1)
    for name in ("one", "two"):
        output = ["--output_dir", str(tmp_path / name)]
        assert sft.main([str(tmp_path / "w" / "recipe.yaml"), *output]) == 0
    assert len(examined) == 6 and "checked before" in capsys.readouterr().err


COUNTED = """
import datasets, os, sys
from fmtrain import sft
from fmtrain.data import checks
datasets.config.HF_DATASETS_CACHE = "cache"
original = checks.examine
def note(row, **options):
    with open("seen", "a") as file:
        file.write(os.environ["RANK"] + " " + row["id"] + "\\n")
    return original(row, **options)
checks.examine = note
sys.exit(sft.run(sys.argv[1:]))
"""


@pytest.mark.slow
def test_of_two_processes_one_checks(rows, tmp_path):
    place = tmp_path / "w"
    training.workplace(place, rows=1)
    recipe = training.write_recipe(place, dataset_name=str(rows), max_steps=1, save_steps=1)
    (place / "counted.py").write_text(COUNTED)
    words = [*training.two_processes("ddp"), "counted.py", str(recipe), "--use_cpu", "true"]
    env = training.environment(PYTHONPATH=str(training.ROOT))
    run = subprocess.run(words, env=env, cwd=place, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (place / "seen").read_text().split("\n") == [*(f"0 r{k}" for k in range(6)), ""]


# --- lengths --------------------------------------------------------------------------------------


def test_the_lengths_are_those_of_the_rows_kept_in_their_order(rows, tmp_path):
    test_data.embedded(tmp_path / "c", [test_data.simple(k, 1, id=f"c{k}") for k in range(3)], True)
    training.workplace(tmp_path / "w", rows=1)
    mixture = [{"path": str(rows), "epochs": 2}, {"path": str(tmp_path / "c")}]
    keys = {"dataset_name": None, "datasets": mixture, "max_dropped": 0.9}
    keys["max_length"] = limit_that_drops(rows, 2)
    recipe = read(training.write_recipe(tmp_path / "w", **keys))
    found = training_rows(recipe, families.processor("llava"))
    expected = [encode_row(families.processor("llava"), row)[1].shape[1] for row in found.rows]
    assert found.rows["length"][:] == expected
    assert found.dropped == 2 and len(set(expected)) > 2 and len(expected) == 2 * 4 + 3


# --- rows that are too long -----------------------------------------------------------------------


def limit_that_drops(path: Path, count: int) -> int:
    """Of the six rows; their lengths differ."""
    return sorted(lengths_of(files.load(str(path))))[5 - count]


def test_what_is_dropped_is_said_by_source(rows):
    lines = []
    found = prepared(rows, say=lines.append, max_length=limit_that_drops(rows, 2), max_dropped=0.5)
    dropped = {"r0", "r1", "r2", "r3", "r4", "r5"} - set(found.rows["id"][:])
    assert found.dropped == 2 and dropped == {"r3", "r5"}, "two pictures make the longest rows"
    assert "2 of 6 rows (33 %)" in lines[-1] and "b 2 of 3" in lines[-1] and "a " not in lines[-1]


def test_more_than_max_dropped_ends_the_run(rows):
    lengths = lengths_of(files.load(str(rows)))
    limit = limit_that_drops(rows, 5)
    with pytest.raises(ValueError) as error:
        prepared(rows, max_length=limit, max_dropped=0.1)
    message = str(error.value)
    assert "\n" not in message
    for words in (
        "rows.jsonl: 5 of 6 rows (83 %)",
        f"max_length {limit}",
        "max_dropped 0.1",
        f"{min(lengths)} to {max(lengths)} tokens",
        "b 3 of 3, a 2 of 3",
        "max_dropped: 0.84",
    ):
        assert words in message, message
    assert prepared(rows, max_length=limit, max_dropped=0.84).size == 1
    exact = limit_that_drops(rows, 3)
    assert prepared(rows, max_length=exact, max_dropped=0.5).size == 3, "a share of just the limit"
    with pytest.raises(ValueError, match="none of 6 rows fits max_length 5"):
        prepared(rows, max_length=5, max_dropped=1.0)


def test_many_sources_are_named_by_the_worst(tmp_path):
    written = []
    for number in range(60):
        row = test_data.simple(number, 0, source=None if number < 2 else f"s{number % 20}")
        row["messages"][-1] = training.assistant("from 1 " * (1 + 9 * (number % 20 > 3)))
        written.append(row)
    path, lines = test_data.write(tmp_path / "rows.jsonl", written), []
    lengths = np.array(lengths_of(files.load(str(path))))
    limit = int(lengths[np.arange(60) % 20 <= 3].max())
    prepared(path, say=lines.append, max_length=limit)
    assert "48 of 60 rows" in lines[-1] and "and 6 other sources" in lines[-1]
    assert lines[-1].count(" 3 of 3") == 10


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none(tmp_path, share):
    with pytest.raises(ValueError, match="is not a share from 0 to 1"):
        read(training.write_recipe(tmp_path, max_dropped=share))


def test_a_recipe_says_how_many_rows_may_be_dropped(rows, tmp_path):
    training.workplace(tmp_path / "w", rows=1)
    limit = limit_that_drops(rows, 2)
    training.write_recipe(tmp_path / "w", dataset_name=str(rows), max_length=limit)
    recipe = str(tmp_path / "w" / "recipe.yaml")
    with pytest.raises(ValueError, match="2 of 6 rows"):
        training_rows(read(recipe), families.processor("llava"))
    found = training_rows(read(recipe, ["--max_dropped", "0.4"]), families.processor("llava"))
    assert found.dropped == 2
