"""What W&B and TensorBoard get of a run, read back from the files of offline runs: samples with
their pictures, the record of the run, one id over a resume, and no secret."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import training
from PIL import Image
from wandb_files import history_and_config, tables

from fmtrain import sft

TOKENS, ROWS = 5, 8
SECRETS = {"WANDB_API_KEY": "5" * 40, "HF_TOKEN": "hf_" + "q" * 34}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A workplace whose held-out references are, but for every second, the base's own answers."""
    folder = tmp_path_factory.mktemp("samples")
    training.workplace(folder, rows=ROWS)
    ours = training.own_answers(folder, "v2v", TOKENS)
    causal = training.own_answers(folder, "causal", TOKENS)
    (folder / "answers.json").write_text(json.dumps({"v2v": ours, "causal": causal}))
    lines = []
    for k, row in enumerate(training.read_rows(folder)):
        row["messages"][1] = training.assistant(ours[k] if k % 2 else "never said")
        lines.append(json.dumps(row) + "\n")
    (folder / "data" / "held_out.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def folder(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    training.write_recipe(
        tmp_path,
        eval_dataset_name=str(tmp_path / "data" / "held_out.jsonl"),
        eval_strategy="steps",
        eval_steps=2,
        eval_max_new_tokens=TOKENS,
        eval_masks=["causal"],
        eval_samples=ROWS,
        learning_rate=0.0,
        report_to=["wandb", "tensorboard"],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run(folder: Path, *words: str) -> None:
    import wandb

    wandb.teardown()  # of another test's environment
    try:
        assert sft.main([str(folder / "recipe.yaml"), *words]) == 0
    finally:
        wandb.finish()
        wandb.teardown()  # or W&B keeps what it read of the environment


def shown(processor, path: Path) -> np.ndarray:
    """A picture resized and cropped, but not normalised."""
    picture = Image.open(path).convert("RGB")
    how = dict(do_normalize=False, do_rescale=False, return_tensors="np")
    [pixels] = processor.image_processor(picture, **how)["pixel_values"]
    return pixels.transpose(1, 2, 0).round().astype(np.uint8)


def test_samples_with_pictures_grow_over_a_run(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(folder)
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    logged, _ = history_and_config(file)
    steps = [entry["train/global_step"] for entry in logged if "eval/samples/path" in entry]
    assert steps == [2, 4]
    answers = json.loads((folder / "answers.json").read_text())
    rows = [json.loads(line) for line in (folder / "data" / "held_out.jsonl").open()]
    processor = training.families.processor("llava")
    sampled = list(tables(file))
    assert len(sampled) == 2
    for (table, files), at in zip(sampled, (2, 4)):
        columns = ["step", "id", "pictures", "prompt", "reference", "v2v", "causal"]
        assert table["columns"] == columns and len(table["data"]) == ROWS
        for k, (step, name, pictures, prompt, reference, ours, causal) in enumerate(table["data"]):
            assert (step, name) == (at, f"r{k}")
            assert reference == rows[k]["messages"][1]["content"][0]["text"].strip()
            assert (ours, causal) == (answers["v2v"][k], answers["causal"][k])
            assert prompt.count("<image>") == len(pictures) == len(rows[k]["images"])
            assert "which digit?" in prompt and prompt.rstrip().endswith("ASSISTANT:")
            for picture, name in zip(pictures, rows[k]["images"]):
                pixels = np.asarray(Image.open(files[picture["path"]]))
                expected = shown(processor, folder / "data" / name)
                assert np.abs(pixels.astype(int) - expected).max() <= 1
    metrics = [entry for entry in logged if "eval/exact_match" in entry]
    assert len(metrics) == 2
    assert all("eval/causal_exact_match_low" in entry for entry in metrics)

    [events] = (folder / "out").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent), {"images": 0, "tensors": 0}).Reload()
    assert len(board.Images("eval/samples/1/picture_1")) == 1
    png = board.Images("eval/samples/1/picture_1")[0]
    assert (png.width, png.height) == (16, 16)
    texts = board.Tensors("eval/samples/1/text_summary")
    assert [event.step for event in texts] == [2, 4]
    [text] = texts[0].tensor_proto.string_val
    for part in ("which digit?", f"v2v:\n\n    {answers['v2v'][1]}", "causal:"):
        assert part in text.decode()


def test_no_samples(folder):
    run(folder, "--eval_samples", "0", "--max_steps", "2")
    assert not list(folder.glob("wandb/**/*.table.json"))
    with pytest.raises(ValueError, match="eval_samples -1 is a number of questions"):
        sft.main([str(folder / "recipe.yaml"), "--eval_samples", "-1"])


def test_one_run_in_wandb_over_a_resume_with_its_record_and_no_secret(folder):
    run(folder, "--eval_samples", "1", "--max_steps", "2")
    record = json.loads((folder / "out" / "run.json").read_text())
    run(folder, "--eval_samples", "1", "--resume_from_checkpoint", "true")
    assert json.loads((folder / "out" / "run.json").read_text()) == record
    offline = sorted(folder.glob("wandb/offline-run-*"), key=lambda path: path.name)
    assert len(offline) == 2
    for path in offline:
        assert path.name.rpartition("-")[2] == record["wandb_run_id"]
    steps = []
    for path in offline:
        logged, config = history_and_config(next(path.glob("*.wandb")))
        steps += [entry["train/global_step"] for entry in logged if "train/loss" in entry]
        ours = config["fmtrain"]
        assert {key: ours[key] for key in record} == record
        assert ours["policy"] == "v2v" and ours["reveals"] == [["VISUAL", "VISUAL"]]
        assert (ours["rows"], ours["evaluation"]["rows"]) == (ROWS, ROWS)
        assert ours["recipe"]["eval_masks"] == ["causal"] and ours["audit"]["loss"] > 0
        assert ours["audit"]["loss"] != ours["audit"]["causal_loss"]
        assert "0 logits moved" in str(ours["audit"])
    assert steps == [1, 2, 3, 4]
    other = ["--output_dir", str(folder / "other"), "--max_steps", "2"]
    run(folder, *other)
    assert (
        json.loads((folder / "other" / "run.json").read_text())["wandb_run_id"]
        != (record["wandb_run_id"])
    )
    secrets = [value.encode() for value in SECRETS.values()]
    for place in ("out", "other", "wandb", "staged"):
        for file in (folder / place).rglob("*"):
            if file.is_file():
                assert not any(secret in file.read_bytes() for secret in secrets), file


def test_an_agents_run_keeps_the_id_of_the_agent(folder, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abcd1234")
    run(folder, "--output_dir", "runs/$WANDB_RUN_ID", "--max_steps", "1")
    record = json.loads((folder / "runs" / "abcd1234" / "run.json").read_text())
    assert record["wandb_run_id"] == "abcd1234"
    assert list(folder.glob("wandb/offline-run-*-abcd1234"))
