"""Timing several variants of one computation against each other, fairly on a machine that does other things as well.

Every round times every variant once, in an order shuffled anew; a variant is compared with the base of the same round
(or of the same step in it), so that what slows the machine for a while slows both. Ratios are medians with a 95 %
bootstrap interval over rounds.
"""

import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios, with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired_ratio(of: Sequence, base: Sequence) -> Ratio:
    """The median of of/base, element by element. of, base: milliseconds [rounds] or [rounds, steps].

    The interval resamples whole rounds, as steps of one round share what else the machine did.
    """
    ratios = np.asarray(of, dtype=np.float64) / np.asarray(base, dtype=np.float64)
    ratios = ratios.reshape(len(ratios), -1)
    drawn = np.random.default_rng(SEED).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile([np.median(ratios[rounds]) for rounds in drawn], [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def shuffled(names: Sequence[str], rounds: int, seed: int = SEED) -> Iterator[list[str]]:
    """An order of the variants for each round."""
    rng = random.Random(seed)
    for _ in range(rounds):
        yield rng.sample(list(names), len(names))


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on a device. clock: "wall", or "cpu", the processor time of this process: the one to read where other
    programs take turns on the same cores."""

    device: torch.device
    clock: str = "wall"

    def __post_init__(self):
        if self.clock == "cpu" and (self.device.type != "cpu" or torch.get_num_threads() != 1):
            raise ValueError(
                "the clock 'cpu' counts the work of one thread on a CPU: use --device cpu --threads 1"
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


def add_arguments(add: Callable, rounds: int) -> None:
    """The command line options of every benchmark; `add` is the parser's `add_argument`."""
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
    """What "auto" means: CUDA where there is one; bfloat16 there, float32 on a CPU. Sets the number of threads."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: it is 1 or more")
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device(
        "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    )
    return device, getattr(
        torch, dtype
    ) if dtype != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32


def machine(stopwatch: Stopwatch) -> dict:
    """Hardware, clock and versions that a time is worth nothing without."""
    device = stopwatch.device
    versions = {"python": platform.python_version()}
    for package in ("fmtrain", "torch", "transformers", "peft", "flash-attn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "clock": stopwatch.clock,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "versions": versions,
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    """Name of the CPU."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def caption(found: dict) -> str:
    """`machine` in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    state = f"{found['cores']} cores, torch threads: {found['threads']}, load {found['load_average_1min']}, {found['clock']} clock"
    return f"{found['device']}, {state}; {versions}"


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for k, column in enumerate(header):
        table.add_column(column, justify="right" if k else "left", no_wrap=not k)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        f"### {title}",
        "",
        "| " + " | ".join(header) + " |",
        "|---" + "|---:" * (len(header) - 1) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def write(out: Path | None, found: dict, markdown: str) -> None:
    """The results as FILE.json and FILE.md, if a file is asked for."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown)
