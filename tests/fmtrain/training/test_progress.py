"""What a run says at its start and in its log."""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmtrain import sft
from fmtrain.data.collator import Collator
from fmtrain.training import progress
from fmtrain.training import recipe as recipes
from fmtrain.training.model import load_processor_of
from fmtrain.training.row_counts import padding
from fmtrain.training.trainer import SFTTrainer

KEYS = {"tokens_per_second", "padding", "peak_memory_gib", "minutes_left"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps that evaluates and logs at every second one, into TensorBoard too."""
    folder = tmp_path_factory.mktemp("progress")
    training.workplace(folder)
    recipe = training.write_recipe(
        folder,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset_name=str(folder / "data" / "rows.jsonl"),
        eval_answers=0,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="tensorboard",
        mask="v2v+merge",
        merge_kernel_size=5,
    )
    return folder, recipe, training.launch(recipe)


def logged(folder) -> list[dict]:
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_the_log_has_the_figures(run):
    folder, _, done = run
    assert done.returncode == 0, done.stderr
    entries = logged(folder)
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        assert KEYS <= entry.keys() and "mfu" not in entry  # of a CPU no peak is known
        assert entry["tokens_per_second"] > 0 and 0.05 < entry["peak_memory_gib"] < 100
    assert entries[0]["minutes_left"] > 0 and entries[1]["minutes_left"] == 0


def test_padding_is_that_of_the_batches(run):
    """Twice two rows a step, in the order of the file: their lengths are in what a collator
    makes."""
    folder, path, _ = run
    recipe = recipes.read(path, ["--use_cpu", "true"])
    collator = Collator(load_processor_of(recipe)[0], folder / "data")
    rows = training.read_rows(folder)
    lengths = [int(collator.encode(row).layout.real.sum()) for row in rows[:16]]
    batches = np.array(lengths).reshape(8, 2)
    for entry, pair in zip(logged(folder), (batches[:4], batches[4:]), strict=True):
        assert entry["padding"] == pytest.approx(padding(pair), abs=1e-9)


def test_trackers_get_them(run):
    folder, _, _ = run
    [events] = [*folder.rglob("events.out.tfevents*")]
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    tags = {tag.rpartition("/")[2] for tag in reader.Tags()["scalars"]}
    assert KEYS <= tags


def test_the_start_is_told_once(run):
    _, _, done = run
    said = done.stderr
    for line in ("mask", "attention", "data", "learns", "steps", "device"):
        assert said.count(f"\n{line} ") == 1, line
    assert "v2v+merge" in said and "kernel_size=5" in said and "24 rows" in said
    assert "language_model" in said and "no mfu" in said
    assert re.search(r"\nsteps +4 of 4 rows", said)


@pytest.mark.parametrize(
    ("name", "bf16", "dtype", "expected"),
    [
        ("NVIDIA H200", True, torch.float32, 989e12),
        ("NVIDIA A100-SXM4-80GB", False, torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", False, torch.float32, None),
        ("Some Other GPU", True, torch.float32, None),
    ],
)
def test_the_peak_of_a_device(name, bf16, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(progress, "unwrap", lambda model: SimpleNamespace(dtype=dtype))
    args = SimpleNamespace(device=torch.device("cuda"), bf16=bf16, fp16=False)
    assert progress.device_of(SimpleNamespace(args=args, model=None)) == (name, expected)


def test_evaluation_is_no_part_of_the_speed(tmp_path, monkeypatch):
    """An evaluation of a second between steps of milliseconds leaves tokens a second alone."""

    def slow(self, *args, **kwargs):
        time.sleep(2)
        metrics = {"eval_loss": 0.0}
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(SFTTrainer, "evaluate", slow)
    training.workplace(tmp_path)
    recipe = training.write_recipe(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset_name=str(tmp_path / "data" / "rows.jsonl"),
        eval_answers=0,
        save_strategy="no",
    )
    assert sft.run([str(recipe), "--use_cpu", "true"]) == 0
    counts = [0.0, *(entry["num_tokens"] for entry in logged(tmp_path))]
    for entry, before in zip(logged(tmp_path)[1:], counts[1:]):
        assert (entry["num_tokens"] - before) / entry["tokens_per_second"] < 2


def test_the_log_of_an_epoch_has_the_figures(tmp_path):
    training.workplace(tmp_path, rows=4)
    words = ["--logging_strategy", "epoch", "--max_steps", "-1", "--num_train_epochs", "2"]
    recipe = training.write_recipe(tmp_path, save_strategy="no", eval_strategy="no")
    assert sft.run([str(recipe), "--use_cpu", "true", *words]) == 0
    entries = logged(tmp_path)
    assert [entry["epoch"] for entry in entries] == [1, 2]
    assert all(KEYS <= entry.keys() for entry in entries)
    assert entries[0]["minutes_left"] > 0 and entries[1]["minutes_left"] == 0
