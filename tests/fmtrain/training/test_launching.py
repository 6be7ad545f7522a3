"""What a terminal shows last when a run fails: our line, under each way of starting one."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import training
import warm
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fmtrain import sft
from fmtrain.__main__ import reported

TRAIN = ["-m", "fmtrain", "train"]
LAUNCH = ["-m", "accelerate.commands.launch"]
SFT = str(training.ROOT / "fmtrain" / "sft.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launching")
    training.workplace(folder)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return training.two_of_this_machine(folder)


def start(folder: Path, command: list[str], *words: str) -> tuple[int, list[str]]:
    """Exit code and lines of stderr."""
    done = subprocess.run(
        [warm.python(), *command, str(folder / "recipe.yaml"), *words],
        env=training.environment(PYTHONPATH=str(training.ROOT)),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done.returncode, [line for line in done.stderr.splitlines() if line.strip()]


def test_fmtrain_train_ends_with_the_error(folder):
    code, lines = start(folder, TRAIN, "--mask", "v2w")
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and "'v2w'" in lines[0]


def test_a_signal_behind_the_error_does_not_ask_for_another_try(monkeypatch):
    """A launcher ends the other processes as soon as the first one has failed."""
    monkeypatch.setattr(sft, "say_error", lambda message: os.kill(os.getpid(), signal.SIGTERM))
    assert sft.run(["no_such_recipe"]) == 2


@pytest.mark.slow
def test_fmtrain_train_on_two_processes_ends_with_the_error(folder, two):
    config = ["--config_file", str(two), "--use_cpu", "true"]
    code, lines = start(folder, TRAIN, *config, "--mask", "v2w")
    assert code == 2 and "'v2w'" in lines[-1], lines
    assert [line[:7] for line in lines] == ["error: "]


def bad_row(folder: Path) -> list[str]:
    """A stream of which the second process alone meets a bad row, in its first step."""
    rows = training.read_rows(folder)
    rows[6]["images"] = ["img/none.png"] * len(rows[6]["images"])
    path = folder / "data" / "late.jsonl"
    path.write_text("".join(training.json.dumps(row) + "\n" for row in rows))
    stream = ["--dataset_name", str(path), "--dataset_streaming", "true", "--shuffle_buffer", "1"]
    return [*stream, "--use_cpu", "true", "--max_steps", "3", "--output_dir", str(folder / "late")]


@pytest.mark.slow
def test_the_error_of_another_process_is_shown(folder, two):
    words = [*bad_row(folder), "--config_file", str(two)]
    code, lines = start(folder, TRAIN, *words)
    assert code == 2 and re.match("error: .*img/none.png", lines[-1]), lines[-5:]


def test_the_process_that_said_why_is_shown_whichever_ended_first(tmp_path, capsys):
    """Process 0 lost the connection and was gone before process 1 had ended."""
    report = tmp_path / "error.json"
    report.write_text('{"message": "error: rows.jsonl, row 6: no img", "timestamp": 1000000001}')
    lost = ProcessFailure(local_rank=0, pid=10, exitcode=1, error_file=str(tmp_path / "none.json"))
    lost.timestamp = 1000000000
    said = ProcessFailure(local_rank=1, pid=11, exitcode=2, error_file=str(report))
    assert reported({0: lost, 1: said}) == 2
    assert capsys.readouterr().err == "error: rows.jsonl, row 6: no img\n"


@pytest.mark.slow
def test_the_report_of_accelerate_launch_ends_with_the_error(folder, two):
    """Of several processes; of one, only its -q keeps its traceback away."""
    words = ["--use_cpu", "true", "--mask", "v2w"]
    code, lines = start(folder, [*LAUNCH, "--config_file", str(two), SFT], *words)
    assert code == 1 and "error: " in lines[-2] and "'v2w'" in lines[-2], lines[-5:]
    one = ["-q", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    code, lines = start(folder, [*LAUNCH, *one, "--dynamo_backend", "no", SFT], *words)
    assert code == 1 and "'v2w'" in lines[-1] and len(lines) == 1, lines
