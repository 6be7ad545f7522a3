"""Timing several setups for one computation against each other, fairly on a busy machine.

Every round times every setup once, in an order shuffled anew; each is compared with the base of
the same round (or of the same step in it), so that what slows the machine for a while slows both.
Ratios are medians with a 95 % bootstrap interval over rounds.
"""

import contextlib
import ctypes
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.tables import Table
from fmtrain import provenance
from fmtrain.command_line import Parser, write_whole
from fmtrain.masks import Mask
from fmtrain.patch import attach

RESAMPLES = 2000
SEED = 0
BASE = "nothing attached"


@dataclass(frozen=True)
class Setup:
    """What is timed: the model under a mask, computed by a backend.

    No mask: nothing is attached.
    """

    mask: Mask | None = None
    backend: str = "auto"

    def __str__(self) -> str:
        return BASE if self.mask is None else str(self.mask)

    def on(self, model) -> contextlib.AbstractContextManager:
        """The model under this mask for a while."""
        if self.mask is None:
            return contextlib.nullcontext()
        return attach(model, self.mask, self.backend)


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios, with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def paired_ratio(of: Sequence, base: Sequence) -> Ratio:
    """The median of of/base, element by element.

    of, base: milliseconds [rounds] or [rounds, steps]. The interval resamples whole rounds, as
    steps of one round share what else the machine did.
    """
    ratios = np.asarray(of, dtype=np.float64) / np.asarray(base, dtype=np.float64)
    ratios = ratios.reshape(len(ratios), -1)
    drawn = np.random.default_rng(SEED).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile([np.median(ratios[rounds]) for rounds in drawn], [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def shuffled(names: Sequence[str], rounds: int, seed: int = SEED) -> Iterator[list[str]]:
    """An order of the setups for each round."""
    rng = random.Random(seed)
    for _ in range(rounds):
        yield rng.sample(list(names), len(names))


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on a device.

    clock: "wall", or "cpu", the processor time of this process: the one to read where other
    programs take turns on the same cores.
    """

    device: torch.device
    clock: str = "wall"

    def __post_init__(self):
        if self.clock == "cpu" and (self.device.type != "cpu" or torch.get_num_threads() != 1):
            raise ValueError(
                "the clock 'cpu' counts the work of one thread on a CPU: "
                "use --device cpu --threads 1"
            )

    def ms(self, run: Callable) -> tuple[float, Any]:
        """How long `run()` takes, in ms, and what it returns."""
        now = time.process_time if self.clock == "cpu" else time.perf_counter
        self._synchronize()
        begin = now()
        result = run()
        self._synchronize()
        return 1e3 * (now() - begin), result

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak(run: Callable, device: torch.device) -> float | None:
    """MiB that `run` needs at its peak above what is held before it; None if that cannot be told.

    On CUDA from the allocator. On Linux from the process's resident set: freed memory is handed
    back to the system first, and the kernel's high-water mark is reset (proc_pid_clear_refs(5));
    good to a tenth or so.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        run()
        return None
    before = reset_resident()
    run()
    return (resident("VmHWM") - before) / 2**10


def reset_resident() -> int:
    """Freed memory handed back, and the high-water mark set to what is held now, in KiB."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_text(mib: float | None) -> str:
    """A `peak` in a table."""
    return "-" if mib is None else f"{mib:.0f}"


def resident(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def add_arguments(parser: Parser, rounds: int) -> None:
    """The options of every benchmark."""
    add = parser.add_argument
    add("--merge_kernel_size", type=int, default=3)
    add("--rounds", type=int, default=rounds)
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 on CUDA, float32 on a CPU",
    )
    add("--threads", type=int, metavar="N", help="of torch on a CPU; default: torch's own choice")
    add(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time, for a busy machine (with --threads 1)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="where to write the results; the tables go to FILE.md",
    )


def choose_device(
    name: str, dtype: str, threads: int | None = None
) -> tuple[torch.device, torch.dtype]:
    """What "auto" means: CUDA where there is one; bfloat16 there, float32 on a CPU.

    Sets the number of threads.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: it is 1 or more")
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if name == "cuda" else "float32"
    return torch.device(name), getattr(torch, dtype)


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """The command that was given."""
    return " ".join([f"python -m {module}", *(sys.argv[1:] if arguments is None else arguments)])


def machine(stopwatch: Stopwatch) -> dict:
    """Hardware, clock and versions that a time is worth nothing without."""
    device, on_cuda = stopwatch.device, stopwatch.device.type == "cuda"
    record = {
        "device": torch.cuda.get_device_name(device) if on_cuda else provenance.processor(),
        "clock": stopwatch.clock,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "versions": provenance.versions(),
    }
    if on_cuda:
        record["cuda"] = torch.version.cuda
    return record


def caption(record: dict) -> str:
    """`machine` in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"{record['device']}, {record['cores']} cores, torch threads: {record['threads']}, "
        f"load {record['load_average_1min']}, {record['clock']} clock; {versions}"
    )


def ratio_text(ratio: dict) -> str:
    """A `Ratio` as a dict, e.g. from a file of results, in a table."""
    return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**ratio)


def write(out: Path | None, results: dict, head: str, tables: Sequence[Table], tail: str) -> None:
    """The results as FILE.json and FILE.md, if a file is asked for."""
    if out is None:
        return
    write_whole(out, json.dumps(results, indent=2) + "\n")
    head = f"## {head}\n\n`{results['command']}`\n\n{caption(results['machine'])}\n\n"
    markdown = "\n".join(table.as_markdown() for table in tables)
    write_whole(out.with_suffix(".md"), f"{head}{markdown}\n{tail}\n")
