"""`train_sampling_strategy: group_by_length`: rows of like length share a batch, every row once."""

import json
import shutil
from collections import Counter

import pytest
import training

from fmtrain import sft
from fmtrain.training import trainer

GROUPED = ["--train_sampling_strategy", "group_by_length"]
ROWS, BATCH = 96, 4  # of fewer rows transformers makes no groups


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of very different lengths, in no order."""
    folder = tmp_path_factory.mktemp("grouped")
    training.workplace(folder, rows=ROWS)
    rows = training.read_rows(folder)
    for number, row in enumerate(rows):
        row["messages"][-1] = training.assistant(" ".join(["from"] * (1 + 7 * number % ROWS)))
    training.write_rows(folder, rows)
    return folder


@pytest.fixture
def shapes(monkeypatch):
    """The texts and the padding of every batch that is made."""
    batches, original = [], trainer.Collator.__call__

    def watched(self, rows):
        batch = original(self, rows)
        texts = [row["messages"][-1]["content"][0]["text"] for row in rows]
        batches.append((texts, int((batch["attention_mask"] == 0).sum())))
        return batch

    monkeypatch.setattr(trainer.Collator, "__call__", watched)
    return batches


def run(folder, out, *words: str) -> None:
    assert sft.main([str(folder / "recipe.yaml"), "--output_dir", str(out), *words]) == 0


def test_an_epoch_has_every_row_once_and_less_padding(folder, tmp_path, shapes):
    steps = ROWS // BATCH
    padding = {}
    for name, words in (("random", []), ("grouped", GROUPED)):
        shapes.clear()
        run(folder, tmp_path / name, "--max_steps", str(steps), *words)
        epoch = shapes[-steps:]  # behind the batch of the audit
        rows = Counter(text for texts, _ in epoch for text in texts)
        assert len(rows) == ROWS and set(rows.values()) == {1}
        padding[name] = sum(count for _, count in epoch)
    assert padding["grouped"] < padding["random"] / 2


def test_a_grouped_run_is_resumed_to_the_bit(folder, tmp_path):
    words = [*GROUPED, "--max_steps", "5", "--save_steps", "3"]
    run(folder, tmp_path / "whole", *words)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    shutil.rmtree(killed / "checkpoint-5")
    (killed / "trainer_state.json").unlink()
    run(folder, killed, *words, "--resume_from_checkpoint", "true")
    assert training.losses(killed) == training.losses(tmp_path / "whole")
    saved = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "killed")]
    assert saved[0]["data"] == saved[1]["data"]


def test_a_stream_knows_no_lengths(folder, tmp_path):
    words = [*GROUPED, "--dataset_streaming", "true", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"group_by_length needs .* dataset_streaming"):
        sft.main([str(folder / "recipe.yaml"), *words])
