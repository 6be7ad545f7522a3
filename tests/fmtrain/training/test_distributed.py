"""Two processes on the CPU give the losses of one, with text-only batches on one rank: DDP, FSDP2,
ZeRO-2, ZeRO-3."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import training

from fmtrain import sft

BIN = Path(sys.executable).parent
CONFIGS = training.ROOT / "recipes" / "accelerate"
# The order of sums over two ranks differs, and ten steps of Adam at 1e-2 amplify rounding of 1e-7 a
# little each; ZeRO-3 reduces in other bucket sizes.
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows that alternate, four by four, between one image each and none, so that always one rank
    has none."""
    folder = tmp_path_factory.mktemp("two")
    training.workplace(folder, rows=4)
    [first, *_] = training.read_rows(folder)
    rows = []
    for number in range(32):
        images = first["images"] if number % 4 < 2 else []
        turns = (
            training.user(len(images), f"which {number}?"),
            training.assistant(f"from {number % 7} to {number % 5}"),
        )
        rows.append(training.row(number, images, *turns))
    training.write_rows(folder, rows)
    training.write_recipe(
        folder,
        use_peft=False,
        max_steps=6,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
    )
    alone = ["--per_device_train_batch_size", "4", "--output_dir", str(folder / "alone")]
    assert sft.main([str(folder / "recipe.yaml"), *alone]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_give_the_losses_of_one(folder, kind):
    out = folder / kind
    if kind == "ddp":
        start = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--standalone"]
    else:
        port = str(29600 + ["fsdp2", "zero2", "zero3"].index(kind))
        start = [
            str(BIN / "accelerate"),
            "launch",
            "--config_file",
            str(CONFIGS / f"{kind}.yaml"),
            "--num_processes",
            "2",
        ]
        start += ["--main_process_port", port]
    script = [str(training.ROOT / "fmtrain" / "sft.py"), str(folder / "recipe.yaml")]
    run = subprocess.run(
        [*start, *script, "--use_cpu", "true", "--output_dir", str(out)],
        env=training.environment(DS_ACCELERATOR="cpu"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    expected, found = training.losses(folder / "alone"), training.losses(out)
    assert len(found) == 6 and found == pytest.approx(expected, rel=TOLERANCE)
    assert json.loads((out / "config.json").read_text())["fmtrain"]["policy"] == "v2v"
