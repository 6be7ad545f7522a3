"""`--dry_run`: what a run would do is what it then does, and nothing is written."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training

from fmtrain import sft
from fmtrain.training import dry_run
from fmtrain.training.row_counts import padding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    training.workplace(folder)
    return folder


def told(recipe, capfd, *words: str) -> str:
    assert sft.run([str(recipe), "--dry_run", "--use_cpu", "true", *words]) == 0
    return capfd.readouterr().err


@pytest.mark.parametrize("keys", [{}, {"packing": True, "max_length": 128}])
def test_the_steps_are_those_of_the_run(keys, folder, capfd):
    """A dry run, and then the run itself with the same arguments."""
    recipe = training.write_recipe(
        folder,
        max_steps=-1,
        num_train_epochs=1.5,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        save_strategy="no",
        output_dir=str(folder / f"run{len(keys)}"),
        **keys,
    )
    said = told(recipe, capfd)
    assert not (folder / f"run{len(keys)}").exists()
    assert "nothing was trained" in said and "rows: 24 used, 0 dropped" in said
    steps = int(re.search(r"(\d+) in all", said)[1])
    assert sft.run([str(recipe), "--use_cpu", "true"]) == 0
    state = json.loads((folder / f"run{len(keys)}" / "trainer_state.json").read_text())
    assert steps == state["global_step"] == state["max_steps"]
    if keys:
        assert re.search(r"packing: \d\.\d rows a pack", said)


def test_rows_and_tokens_are_counted(folder, capfd):
    recipe = training.write_recipe(folder, max_length=24, max_dropped=0.9)
    said = told(recipe, capfd)
    used, dropped = map(int, re.search(r"rows: (\d+) used, (\d+) dropped", said).groups())
    assert used + dropped == 24 and dropped > 0
    assert f"by source: test {dropped} of 24" in said
    shares = [float(share) for share in re.findall(r"(?:TEXT|VISUAL|ANSWER) ([\d.]+)%", said)]
    assert sum(shares) == pytest.approx(100, abs=0.3) and len(shares) == 3
    assert "language_model" in said and "gradients" in said and "logits" in said


def test_padding_is_what_batches_lack():
    assert padding([np.array([4, 2]), np.array([3, 3, 3])]) == pytest.approx(2 / 17)


def test_machines_that_are_not_at_hand(folder, capfd):
    recipe = training.write_recipe(folder, use_peft=False)
    said = told(recipe, capfd, "--gpus", "8", "--memory", "80GB")
    assert re.search(r"DDP.*ZeRO-2.*ZeRO-3.*FSDP2", said)
    assert "of 74.51 GiB: fits" in said and "no GPU has confirmed it" in said
    assert "of 32 rows each on 8 processes" in said


def test_without_a_word_the_memory_is_that_of_the_gpu_at_hand(folder, capfd, monkeypatch):
    gpu = SimpleNamespace(total_memory=40 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    recipe = training.write_recipe(folder, max_length=48, dataloader_pin_memory=False)
    assert "of 40.00 GiB: fits" in told(recipe, capfd)


def test_what_would_fit_is_said(folder, capfd):
    said = told(training.write_recipe(folder, use_peft=False), capfd, "--memory", "1MiB")
    assert "does not fit" in said and "with gradient_checkpointing: true: " in said
    keys = "gradient_checkpointing: true, per_device_train_batch_size: 1, "
    assert f"with {keys}gradient_accumulation_steps: 4: " in " ".join(said.split())
    assert "gradient_accumulation_steps: 4, use_peft: true: " in " ".join(said.split())
    assert "use_peft: true, load_in_4bit: true: " in " ".join(said.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "80"], "--memory 80: write it as 80GB or 80GiB"),
        (["--gpus", "many"], "--gpus many: a number of 1 or more"),
        (["--config_file", "none.yaml"], "none.yaml: not readable as an accelerate configuration"),
        (["--fsdp", "full_shard"], "fsdp in a recipe; a dry run takes the strategy from"),
    ],
)
def test_what_is_refused(words, message, folder, capfd):
    recipe = training.write_recipe(folder)
    assert sft.run([str(recipe), "--dry-run", "--use_cpu", "true", *words]) == 2
    assert message in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("words", [[], ["--mask", "v2v"]])
def test_without_a_recipe_it_says_how_it_is_used(words):
    with pytest.raises(ValueError, match=r"^usage: fmtrain train RECIPE --dry_run "):
        dry_run.main([*words, "--dry_run"])


@pytest.mark.parametrize(
    ("keys", "words", "reason"),
    [
        ({"optim": "adamw_bnb_8bit"}, [], "optim adamw_bnb_8bit is not known"),
        ({"load_in_8bit": True}, [], "load_in_8bit: weights of 8 bits are not known without"),
        (
            {"load_in_4bit": True},
            ["--config_file", str(training.ROOT / "recipes" / "accelerate" / "zero3.yaml")],
            "load_in_4bit: how ZeRO-3 shards packed weights is not known",
        ),
    ],
)
def test_a_recipe_without_an_estimate_says_why(keys, words, reason, folder, capfd):
    said = " ".join(told(training.write_recipe(folder, **keys), capfd, *words).split())
    assert f"no estimate of memory: {reason}" in said


def test_4_bits_are_estimated_where_they_can_run(folder, capfd):
    recipe = training.write_recipe(folder, load_in_4bit=True)
    said = told(recipe, capfd, "--gpus", "8", "--memory", "1MiB")
    assert "no estimate" not in said and re.search(r"DDP +┃ +ZeRO-2 +┃\n", said)
    assert "does not fit" in said and "with gradient_checkpointing: true, per_device" in said
    assert "load_in_4bit: true" not in said and "ZeRO-3" not in said


@pytest.mark.parametrize("keys", [{"torch_compile": True}, {"torch_compile_backend": "inductor"}])
def test_a_compiled_step_is_estimated_without_it_and_that_is_said(keys, folder, capfd):
    line = "torch_compile: the memory of a step is estimated as it runs without it"
    assert line in told(training.write_recipe(folder, **keys), capfd)
    assert "torch_compile" not in told(training.write_recipe(folder), capfd)


def test_other_processes_of_a_launcher_leave(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert dry_run.main(["no such recipe", "--dry_run"]) == 0
