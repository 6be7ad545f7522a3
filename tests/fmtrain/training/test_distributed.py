"""Two processes on the CPU give the gradients and losses of one, with text-only batches on one
rank: DDP, FSDP2, ZeRO-2, ZeRO-3."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file

BIN = Path(sys.executable).parent
CONFIGS = training.ROOT / "recipes" / "accelerate"
# The order of sums over two ranks differs; six steps of Adam at 1e-2 amplify rounding of 1e-7.
TOLERANCE = 1e-4
STRATEGIES = {
    "ddp": {"model": "DistributedDataParallel", "parameters": ["Tensor"]},
    "fsdp2": {"model": "FSDPLlavaForConditionalGeneration", "parameters": ["DTensor"]},
    "zero2": {"model": "DeepSpeedEngine", "parameters": ["Tensor"], "stage": 2},
    "zero3": {"model": "DeepSpeedEngine", "parameters": ["Tensor"], "stage": 3},
}
SCRIPTS = [str(training.ROOT / "tests/support/strategy.py"), str(training.ROOT / "fmtrain/sft.py")]


def run(folder: Path, kind: str, start: list[str], *overrides: str) -> Path:
    """A run under the launcher of the tests; returns its output folder."""
    out = folder / kind
    launcher, trainer = SCRIPTS
    script = [launcher, str(folder / f"{kind}.pt"), trainer, str(folder / "recipe.yaml")]
    done = subprocess.run(
        [*start, *script, "--use_cpu", "true", "--output_dir", str(out), *overrides],
        env=training.environment(DS_ACCELERATOR="cpu"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


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
    run(folder, "alone", [sys.executable], "--per_device_train_batch_size", "4")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRATEGIES)
def test_two_processes_give_the_gradients_and_losses_of_one(folder, kind):
    if kind == "ddp":
        start = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--standalone"]
    else:
        start = [str(BIN / "accelerate"), "launch", "--config_file", str(CONFIGS / f"{kind}.yaml")]
        port = str(29600 + list(STRATEGIES).index(kind))
        start += ["--num_processes", "2", "--main_process_port", port]
    out = run(folder, kind, start)
    seen, alone = torch.load(folder / f"{kind}.pt"), torch.load(folder / "alone.pt")
    found, expected = seen.pop("gradients"), alone.pop("gradients")
    assert seen == STRATEGIES[kind]
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in expected.items():
        # of float32 sums in another order
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    losses = training.losses(out)
    assert len(losses) == 6
    assert losses == pytest.approx(training.losses(folder / "alone"), rel=TOLERANCE)
    assert json.loads((out / "config.json").read_text())["fmtrain"]["policy"] == "v2v"
    saved = load_file(out / "model.safetensors")
    expected = load_file(folder / "alone" / "model.safetensors")
    assert saved.keys() == expected.keys()  # the hub's names
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=TOLERANCE, msg=name)
