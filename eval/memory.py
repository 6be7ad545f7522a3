"""How good the memory is that a dry run tells: its estimate against the measured peak of a run.

    python -m eval.memory --out eval/results/memory.json
    python -m eval.memory --learns QLoRA --out eval/results/memory_qlora.json

Each setup trains a random LLaVA on a CPU for a few steps in a process of its own, as `fmtrain
train` does. Measured is its resident memory: the highest of a step, forward, backward and
optimizer, above what the process holds before the model is loaded (and after a small model has
been trained in it, so that libraries and threads are there). Every weight is read once before the
first step, as files are mapped and pages that nobody reads take no memory. malloc gives each
tensor of 256 KiB or more pages of its own and hands them back, as a GPU's count of allocated bytes
knows no fragmentation either. The estimate sees no weights: `fmtrain.training.estimate`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm
from transformers import TrainerCallback

from eval import subjects, timing, trainers
from eval.tables import Table
from fmtrain.command_line import Parser, guarded
from fmtrain.masks import Mask
from fmtrain.training import recipe as recipes
from fmtrain.training.dry_run import Start, memory_of

STEPS = 2  # the first one makes the optimizer's states
ROWS = 24
WORK, WARM = "work", "warm"  # workplaces: of the setup, of a small model before it
MODELS = {"25m": 4, "100m": 2}  # rows of a batch
LEARNS = ("full", "LoRA", "QLoRA")
KEYS = {"use_cpu": True, "train_sampling_strategy": "sequential"}
FLOAT32, BFLOAT16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
QLORA = {  # as recipes/llava13b_v2v_qlora.yaml has it
    **{"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True},
    **{"dtype": "bfloat16", "bf16": True},
}
PACKED = {"packing": True, "max_length": 1200, "per_device_train_batch_size": 1}
HEADER = ("learns", "dtype", "checkpointing", "rows", "measured", "estimate", "error")


class Peaks(TrainerCallback):
    """MiB at the peak of each step."""

    def __init__(self):
        self.mib: list[float] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.sum()

    def on_step_begin(self, args, state, control, **kwargs):
        timing.reset_resident()

    def on_step_end(self, args, state, control, **kwargs):
        self.mib.append(timing.resident("VmHWM") / 2**10)


def train(folder: Path) -> float:
    """MiB at the peak of a step, above what is held before the model of a workplace is loaded."""
    peaks, recipe = Peaks(), recipes.read(folder / trainers.RECIPE)
    before = timing.reset_resident() / 2**10
    trainer = trainers.fmtrain_trainer(recipe)
    trainer.add_callback(peaks)
    trainer.train()
    return max(peaks.mib) - before


def prepare(folder: Path, size: str, keys: dict) -> None:
    """A workplace with a random model, rows of one length and a recipe."""
    folder.mkdir()
    trainers.workplace(folder, subjects.random_llava(size), trainers.Shape(ROWS, (2, 2), 1, 96))
    options = {"max_steps": STEPS, "per_device_train_batch_size": MODELS.get(size, 1)}
    trainers.recipe_of(folder, "run", Mask.parse("v2v"), {**options, **KEYS, **keys})


def measured(folder: Path, threads: int) -> float:
    """MiB at the peak of a run, in a process of its own."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(2**18),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "eval.memory", "--measure", str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"the measured run ended with: {run.stderr.strip().splitlines()[-1]}")
    return float(run.stdout.splitlines()[-1])


def compare(size: str, keys: dict, threads: int = 1) -> dict:
    """The measured peak of a setup and its estimate, in MiB."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder / WORK, size, keys)
        prepare(folder / WARM, "mini", keys)
        peak = measured(folder, threads)
        memory, _ = memory_of(Start.of(recipes.read(folder / WORK / trainers.RECIPE)))
    kinds = {kind: size / 2**20 for kind, size in memory.peak.items()}
    estimate = sum(kinds.values())
    figures = {"measured": peak, "estimate": estimate, "error": estimate / peak - 1}
    return {"model": size, **keys, **figures, "kinds": kinds}


def learns(keys: dict) -> str:
    """What learns in a setup, of `LEARNS`."""
    if not keys["use_peft"]:
        return "full"
    return "QLoRA" if keys.get("load_in_4bit") else "LoRA"


def setups(size: str) -> list[dict]:
    """Keys of the recipes that are compared; of a larger model than the first a few of them."""
    every = []
    for lora in (False, True):
        for checkpointing in (False, True):
            how = {"use_peft": lora, "gradient_checkpointing": checkpointing}
            every += [{**how, **FLOAT32}, {**how, **FLOAT32, **PACKED}, {**how, **BFLOAT16}]
            if lora == checkpointing:
                every.append({**how, **FLOAT32, "bf16": True})
    every = every if size == next(iter(MODELS)) else [every[0], every[-1]]
    return every + [{**QLORA, "gradient_checkpointing": each} for each in (False, True)]


def table(size: str, results: Sequence[dict]) -> Table:
    rows = []
    for result in results:
        dtype = result["dtype"] + (", bf16: true" if result.get("bf16") else "")
        kind = "packed" if result.get("packing") else "padded"
        rows.append(
            [
                learns(result),
                *(dtype, "yes" if result["gradient_checkpointing"] else "no", kind),
                *(f"{result['measured']:.0f}", f"{result['estimate']:.0f}"),
                f"{100 * result['error']:+.1f} %",
            ]
        )
    worst = max(abs(result["error"]) for result in results)
    title = f"random LLaVA {size}: MiB at the peak of a step; largest error {100 * worst:.1f} %"
    return Table(title, HEADER, rows, labels=4)


def study(options: argparse.Namespace, command: str) -> None:
    """Compare every setup, print the tables and write the results."""
    device, _ = timing.choose_device("cpu", "float32", options.threads)
    results, tables = [], []
    for size in options.models:
        wanted = [keys for keys in setups(size) if learns(keys) in options.learns]
        for keys in tqdm(wanted, unit="setup", leave=False):
            results.append(compare(size, keys, torch.get_num_threads()))
        tables.append(table(size, [each for each in results if each["model"] == size]))
        Console(width=140).print(tables[-1].as_rich())
    machine = timing.machine(timing.Stopwatch(device))
    record = {"command": command, "machine": machine, "setups": results}
    tail = (
        "AdamW, `v2v`, batches of the longest rows. Measured: resident memory at the highest of a "
        "step, above what the process held before the model was loaded. No GPU has been measured."
    )
    timing.write(options.out, record, "The memory that a dry run tells", tables, tail)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.memory", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), choices=list(subjects.SIZES))
    how = "in the setups; QLoRA needs bitsandbytes (default: full LoRA)"
    add("--learns", nargs="+", default=["full", "LoRA"], choices=LEARNS, help=how)
    add("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    add("--out", type=Path, metavar="FILE.json", help="the results; the tables go to FILE.md")
    add("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure is not None:
        train(options.measure / WARM)
        print(train(options.measure / WORK))
        return 0
    command = timing.command_line("eval.memory", arguments)
    return guarded(lambda: study(options, command))


if __name__ == "__main__":
    sys.exit(main())
