"""The converters' command line: exit codes, refusals, atomic writing, doing nothing twice."""

import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import check
from data_prep.checking.reading import read_rows
from data_prep.converting.conversations import OPENING
from data_prep.converting.conversion_speed import write_mix

ROOT = Path(__file__).parent.parent.parent
TURNS = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
CONVERTED = ["out", "out/_manifest", "out/rows.jsonl", "source", "source/llava_v1_5_mix665k.json"]
RECORDS = [{"id": k, "image": f"coco/{k}.jpg", "conversations": TURNS} for k in range(3)]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_second_run_does_nothing(mix, command, tmp_path):
    source, out = mix(RECORDS), tmp_path / "out"
    first = command("llava_mix665k", "--source", source, "--out", out)
    assert first.returncode == 0 and "3 rows" in first.stdout
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    second = command("llava_mix665k", "--source", source, "--out", out)
    assert (second.returncode, second.stdout) == (0, f"{out} is up to date\n")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert listing(tmp_path) == CONVERTED


@pytest.mark.parametrize("change", ["source", "option", "rows cut off", "touched"])
def test_a_run_after_a_change_converts_again(change, mix, convert, tmp_path, capsys):
    source, out = mix(RECORDS), tmp_path / "out"
    convert("llava_mix665k", source, out)
    options = []
    if change == "source":
        mix(RECORDS[:2])
    elif change == "option":
        options = ["--order", "dual"]
    elif change == "touched":
        os.utime(source / "llava_v1_5_mix665k.json", ns=(1, 1))
    else:
        (out / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes()[:100])
    capsys.readouterr()
    assert convert("llava_mix665k", source, out, *options) == 0
    assert "up to date" not in capsys.readouterr().out
    assert len(list(read_rows(out))) == {"source": 2, "option": 6}.get(change, 3)


def test_embedded_images_are_part_of_what_must_not_have_changed(
    mix, convert, picture, tmp_path, capsys
):
    source, out = mix(RECORDS), tmp_path / "out"
    for k in range(3):
        picture(source / f"coco/{k}.jpg", seed=k)
    convert("llava_mix665k", source, out, "--embed_images")
    convert("llava_mix665k", source, out, "--embed_images")
    assert "up to date" in capsys.readouterr().out
    picture(source / "coco/1.jpg", seed=9)
    convert("llava_mix665k", source, out, "--embed_images")
    assert "up to date" not in capsys.readouterr().out
    assert [*read_rows(out)][1]["images"][0]["bytes"] == (source / "coco/1.jpg").read_bytes()


@pytest.mark.parametrize(
    ("records", "options", "reason"),
    [
        ('[{"conversations": [', [], "row 1: not JSON"),
        ("[" + "[" * 3000 + "]" * 3000 + "]", [], "row 1: nested too deeply"),
        ("[1]", [], "row 1: expected an object with 'conversations', found 1"),
        ('{"a": 1}', [], "start of the file: expected '[', found '{'"),
        (
            RECORDS,
            ["--question_twice", "--order", "dual"],
            "--question_twice puts the question on both sides",
        ),
        (RECORDS, ["--embed_images"], "row 1: image 'coco/0.jpg' does not exist"),
        ([{**RECORDS[0], "image": "https://host/x.jpg"}], [], "is in none of the folders"),
        (
            [{**RECORDS[0], "image": "coco/../../x.jpg"}],
            [],
            "row 1: image 'coco/../../x.jpg' leaves the image root",
        ),
        (
            [{**RECORDS[0], "image": "coco/x.zip"}],
            [],
            "row 1: image 'coco/x.zip' is an archive or a pickle",
        ),
        (
            [{**RECORDS[0], "image": "coco/x.pkl"}],
            [],
            "row 1: image 'coco/x.pkl' is an archive or a pickle",
        ),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(records, options, reason, mix, command, tmp_path):
    source = mix(records)
    process = command("llava_mix665k", "--source", source, "--out", tmp_path / "out", *options)
    assert process.returncode == 2 and process.stdout == ""
    assert (
        process.stderr.startswith("error: ")
        and reason in process.stderr
        and process.stderr.count("\n") == 1
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failed_run_leaves_the_earlier_rows_alone(mix, convert, tmp_path):
    out = tmp_path / "out"
    convert("llava_mix665k", mix(RECORDS), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert convert("llava_mix665k", mix([*RECORDS, {}]), out) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_lone_surrogates_are_refused_and_can_be_put_aside(mix, convert, tmp_path, capsys):
    turns = '{"from": "human", "value": "q"}, {"from": "gpt", "value": "\\ud83d"}'
    bad = f'[{{"id": 1, "conversations": [{turns}]}}]'
    for layout in ("jsonl", "parquet"):
        assert convert("llava_mix665k", mix(bad), tmp_path / layout, "--format", layout) == 2
        assert "row 1: cannot be written" in capsys.readouterr().err
    reject = tmp_path / "reject.jsonl"
    assert convert("llava_mix665k", mix(bad), tmp_path / "out", "--reject", str(reject)) == 0
    assert "\\ud83d" in json.loads(reject.read_text())["record"]


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_archives_as_source_are_refused(name, command, mix, tmp_path):
    (tmp_path / name).write_bytes(b"PK")
    process = command("vqav2", "--source", tmp_path / name, "--out", tmp_path / "out")
    assert process.returncode == 2 and "archives have to be unpacked first" in process.stderr
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "dataset.json.zip").write_bytes(b"PK")
    process = command("ocr_vqa", "--source", folder, "--out", tmp_path / "out")
    assert (
        process.returncode == 2
        and "dataset.json.zip is an archive; unpack it first" in process.stderr
    )


def test_symbolic_links_out_of_the_root_are_not_embedded(mix, convert, picture, tmp_path, capsys):
    source = mix(RECORDS[:1])
    outside = picture(tmp_path / "outside.jpg")
    (source / "coco").mkdir()
    (source / "coco/0.jpg").symlink_to(outside)
    assert convert("llava_mix665k", source, tmp_path / "out", "--embed_images") == 2
    assert "lies outside the image folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [["notes.txt"], ["rows.jsonl"], ["rows.jsonl", "_manifest", "notes.txt"]]
)
def test_a_folder_with_other_things_is_not_replaced(content, mix, convert, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in content:
        (out / name).write_text("{}")
    assert convert("llava_mix665k", mix(RECORDS), out) == 2
    assert "is no prepared folder" in capsys.readouterr().err
    assert listing(out) == sorted(content)


def test_a_folder_that_is_being_written_is_refused_and_left_alone(mix, convert, tmp_path, capsys):
    staging = tmp_path / ".out.partial"
    staging.mkdir()
    (staging / "rows.jsonl").write_text("another's")
    lock = os.open(staging, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert convert("llava_mix665k", mix(RECORDS), tmp_path / "out") == 2
    assert "is being written by another process" in capsys.readouterr().err
    assert (staging / "rows.jsonl").read_text() == "another's"
    os.close(lock)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_killed_conversion_leaves_nothing_that_looks_whole(earlier, convert, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    path = source / "llava_v1_5_mix665k.json"
    if earlier:
        write_mix(path, 10)
        convert("llava_mix665k", source, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()} if earlier else None
    write_mix(path, 6_000)
    command = [
        sys.executable,
        "-m",
        "data_prep.llava_mix665k",
        "--source",
        str(source),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    partial = tmp_path / ".out.partial" / "rows.jsonl"
    while not (partial.is_file() and partial.stat().st_size > 1_000_000):
        assert process.poll() is None, "the conversion ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.is_file()
    assert (
        (out.is_dir() and {file.name: file.read_bytes() for file in out.iterdir()} == before)
        if earlier
        else not out.exists()
    )
    assert convert("llava_mix665k", source, out) == 0
    assert sum(1 for _ in read_rows(out)) == 6_000
    assert listing(tmp_path) == CONVERTED


def test_memory_does_not_grow_with_the_source(tmp_path, monkeypatch):
    from data_prep.converting.conversion_speed import measure

    monkeypatch.chdir(ROOT)
    peaks = []
    for rows in (500, 8_000):
        source = tmp_path / str(rows)
        source.mkdir()
        write_mix(source / "llava_v1_5_mix665k.json", rows)
        peaks.append(measure(source, tmp_path / f"out{rows}", [])["peak_mb"])
    assert (
        peaks[1] < peaks[0] + 25
    )  # MB; the larger source alone has 13 and would need several times that as objects


def test_dual_order_writes_what_has_no_order_once(mix, convert, tmp_path):
    text = {"id": "t", "conversations": [{"from": "human", "value": "q"}, TURNS[1]]}
    convert("llava_mix665k", mix([RECORDS[0], text]), tmp_path / "out", "--order", "dual")
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [
        "0#1/image_first",
        "t#2",
        "0#1/text_first",
    ]


def test_reject_must_not_lie_in_the_folder_that_is_replaced(mix, convert, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert("llava_mix665k", mix(RECORDS), out, "--reject", str(out / "reject.jsonl")) == 2
    assert "lies in --out" in capsys.readouterr().err


def test_help_of_every_command(command, fixtures):
    for name in ("vsr", "check", "digits", "converting.conversion_speed"):
        assert command(name, "--help").returncode == 0
    for path in fixtures.iterdir():
        converter = importlib.import_module(f"data_prep.{path.name}").CONVERTER
        assert converter.doc and converter.name == path.name


def test_options_may_be_spelt_with_dashes(mix, convert, picture, tmp_path, capsys):
    source = mix(RECORDS)
    for k in range(3):
        picture(tmp_path / f"images/coco/{k}.jpg", seed=k)
    options = ["--embed-images", f"--image-root={tmp_path / 'images'}"]
    assert convert("llava_mix665k", source, tmp_path / "dashes", *options) == 0
    underscored = [options[0].replace("-i", "_i"), options[1].replace("-r", "_r", 1)]
    assert convert("llava_mix665k", source, tmp_path / "dashes", *underscored) == 0
    assert "up to date" in capsys.readouterr().out
    assert check.main([str(tmp_path / "dashes"), "--image-root", str(tmp_path / "images")]) == 0


def test_disk_errors_are_one_line(mix, convert, tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert convert("llava_mix665k", mix(RECORDS), blocker / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    shutil.rmtree(tmp_path / "source")


def test_a_turn_of_the_assistant_that_opens_a_dialogue_is_left_out(mix, convert, tmp_path, capsys):
    """As in LLaVA's own code, which learns what comes behind it; a dialogue of nothing else is
    refused."""
    opening, answer = {"from": "gpt", "value": "Hello!"}, {"from": "gpt", "value": "a"}
    ask = {"from": "human", "value": "<image>\nq"}
    records = [{"id": 1, "image": "coco/1.jpg", "conversations": [opening, ask, answer]}]
    assert convert("llava_mix665k", mix(records), tmp_path / "out") == 0
    assert f"1 left out: {OPENING}" in capsys.readouterr().out
    [row] = read_rows(tmp_path / "out")
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    manifest = json.loads((tmp_path / "out" / "_manifest").read_text())
    assert manifest["left_out"] == {OPENING: 1}
    alone = [*records, {"id": 2, "conversations": [opening]}]
    convert("llava_mix665k", mix(alone), tmp_path / "alone")
    reject = tmp_path / "rejected.jsonl"
    told = "--reject", str(reject), "--skip_images"
    assert check.main([str(tmp_path / "alone"), *told]) == 0
    [entry] = map(json.loads, reject.read_text().splitlines())
    assert entry["record"]["id"] == "2#2" and entry["reasons"][0].startswith("role order")
