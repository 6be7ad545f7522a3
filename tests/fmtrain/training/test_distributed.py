"""Two processes on the CPU give the gradients and losses of one, with text-only batches on one
rank: DDP, FSDP2, ZeRO-2, ZeRO-3. They resume, export, and stop as one does."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import training
import warm
from safetensors.torch import load_file

from fmtrain import consistency, export, load
from fmtrain.data import noise

# The order of sums over two ranks differs; six steps of Adam at 1e-2 amplify rounding of 1e-7.
TOLERANCE = 1e-4
STRATEGIES = {
    "ddp": {"model": "DistributedDataParallel", "parameters": ["Tensor"]},
    "fsdp2": {"model": "FSDPLlavaForConditionalGeneration", "parameters": ["DTensor"]},
    "zero2": {"model": "DeepSpeedEngine", "parameters": ["Tensor"], "stage": 2},
    "zero3": {"model": "DeepSpeedEngine", "parameters": ["Tensor"], "stage": 3},
}


def launch(
    folder: Path, out: Path, start: list[str], *overrides: str, **environment: str
) -> subprocess.CompletedProcess:
    """A run under the launcher of the tests, which writes what it saw beside the output folder."""
    script = [*training.watched(f"{out}.pt"), str(folder / "recipe.yaml")]
    return subprocess.run(
        [*start, *script, "--use_cpu", "true", "--output_dir", str(out), *overrides],
        env=training.environment(DS_ACCELERATOR="cpu", **environment),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )


def whole(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert "audit of the first 2 rows: 4 checks" in done.stderr


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
        ddp_find_unused_parameters=False,  # as with gradient checkpointing: every rank uses all
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
    )
    done = launch(folder, folder / "alone", [warm.python()], "--per_device_train_batch_size", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def trained(folder: Path, kind: str) -> Path:
    """The output folder of a whole run of two processes."""
    out = folder / kind
    if not out.exists():
        whole(launch(folder, out, training.two_processes(kind)))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRATEGIES)
def test_two_processes_give_the_gradients_and_losses_of_one(folder, kind):
    out = trained(folder, kind)
    seen, alone = torch.load(f"{out}.pt"), torch.load(folder / "alone.pt")
    found, expected = seen.pop("gradients"), alone.pop("gradients")
    assert seen == STRATEGIES[kind] | {"waiting": []}
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_run_of_two_processes_is_resumed_and_exported(folder, kind, tmp_path):
    """From its second step on, as if it had been killed there: the rest is the same, bit for
    bit."""
    before, out = trained(folder, kind), tmp_path / kind
    shutil.copytree(before / "checkpoint-2", out / "checkpoint-2")
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(before / name, out)
    whole(launch(folder, out, training.two_processes(kind), "--resume_from_checkpoint", "true"))
    assert training.losses(out) == training.losses(before)
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, before))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert export.main([str(out), "--out", str(tmp_path / "exported")]) == 0
    model, processor = load(str(tmp_path / "exported"))
    found = consistency.check(model, processor, noise.rows())
    assert len(found) == 8 and all(result.passed for result in found), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "sabotage, error",
    [
        ("leak", "the audit before step 0 fails: leaks: later tokens move no earlier logit"),
        ("no gradient", "trainable parameters have had no gradient: model.vision_tower"),
    ],
)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_two_processes_stop_together(folder, kind, sabotage, error, tmp_path):
    parts = ["--train_parts", "language_model", "projector", "vision_tower"]
    done = launch(folder, tmp_path / kind, training.two_processes(kind), *parts, SABOTAGE=sabotage)
    assert done.returncode != 0
    assert error in " ".join(done.stderr.split()), done.stderr[-3000:]
