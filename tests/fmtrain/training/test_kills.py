"""A run that is killed at random moments ends where the unbroken one does. `KILLS=20` in the
environment makes it twenty kills of each kind, and takes half an hour; the suite makes one."""

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import training
import warm

from fmtrain.training import checkpoints

KILLS = int(os.environ.get("KILLS", "1"))
STEPS = 10 * KILLS + 10
LEARNS = {"lora": ["--lora_dropout", "0.2"], "full": ["--use_peft", "false"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every step is saved: a kill falls into saving as often as not."""
    folder = tmp_path_factory.mktemp("kills")
    training.workplace(folder)
    changes = dict(max_steps=STEPS, save_steps=1, save_total_limit=3, use_cpu=True)
    training.write_recipe(folder, per_device_train_batch_size=2, **changes)
    return folder


def begun(folder: Path, processes: str, out: Path, *words: str) -> subprocess.Popen:
    python, *script = training.command(folder / "recipe.yaml")
    start = training.two_processes("ddp") if processes == "two" else [python]
    return subprocess.Popen(
        [*start, *script, "--output_dir", str(out), *words],
        env=training.environment(),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(run: subprocess.Popen) -> None:
    """All its processes, the launcher first."""
    launcher = psutil.Process(warm.process_of(run.pid))
    workers = [psutil.Process(warm.process_of(each.pid)) for each in launcher.children()]
    processes = [launcher, *workers]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)
    run.wait()
    run.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("processes", ["one", "two"])
def test_kills_at_random_moments_change_nothing(folder, tmp_path, processes, learns, capsys):
    """Losses, weights and the state of the optimizer, bit for bit."""
    whole = begun(folder, processes, tmp_path / "whole", *LEARNS[learns])
    began = time.monotonic()
    said = whole.communicate(timeout=900)[1]
    assert whole.returncode == 0, said[-3000:]
    out, draw, torn, steps = tmp_path / "out", random.Random(f"{processes} {learns}"), 0, []
    words = [*LEARNS[learns], "--resume_from_checkpoint", "auto"]
    for _ in range(KILLS):
        run = begun(folder, processes, out, *words)
        lines = []
        for line in run.stderr:
            lines.append(line)
            if "audit of" in line:
                break
        assert "audit of" in lines[-1], "".join(lines)[-3000:]
        time.sleep(draw.uniform(0.0, 0.8))
        assert run.poll() is None
        kill(run)
        torn += (out / "_saving").exists()
        newest = checkpoints.newest(out)
        steps.append(0 if newest is None else checkpoints.state_of(newest)["global_step"])
    assert steps == sorted(steps) and steps[-1] < STEPS
    last = begun(folder, processes, out, *words)
    said = last.communicate(timeout=900)[1]
    assert last.returncode == 0, said[-3000:]
    losses = training.losses(tmp_path / "whole")
    assert len(losses) == STEPS and training.losses(out) == losses
    weights = "adapter_model.safetensors" if learns == "lora" else "model.safetensors"
    for name in (weights, f"checkpoint-{STEPS}/optimizer.pt"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shutil.rmtree(tmp_path / "whole")
    with capsys.disabled():
        seconds = time.monotonic() - began
        print(
            f"\n{learns}, {processes} process(es): {KILLS} kills, {torn} while a checkpoint was "
            f"written, at steps {steps} of {STEPS}, {seconds:.0f} s"
        )
