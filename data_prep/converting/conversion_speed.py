"""How fast and in how much memory a mix of LLaVA's size is converted.

    python -m data_prep.converting.conversion_speed

Writes a synthetic llava_v1_5_mix665k.json (dialogues of 1 to 8 turns, about 1.5 kB each, 6 % of
them without an image) into a temporary folder and converts it in a process of its own, which is
held to one core. No image exists or is opened.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_prep.converting.orders import ORDERS
from fmtrain.command_line import Parser, guarded

_WORDS = "the a of photo man red small table in front near standing two with holding".split()
_WORDS += "café — 火车 left sign blue".split()
_FOLDERS = (
    "coco/train2017",
    "gqa/images",
    "ocr_vqa/images",
    "textvqa/train_images",
    "vg/VG_100K",
)


def write_mix(path: Path, rows: int, seed: int = 0) -> None:
    """A file in the form of LLaVA-v1.5-mix665k with `rows` dialogues."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for row in range(rows):
            record = {"id": f"{row % 500_000:012d}"}
            if rng.random() > 0.06:
                record["image"] = f"{rng.choice(_FOLDERS)}/{row:012d}.jpg"
            turns = []
            for turn in range(rng.randint(1, 8)):
                mark = "<image>\n" if turn == 0 and "image" in record else ""
                turns.append({"from": "human", "value": mark + _sentence(rng, 12)})
                turns.append({"from": "gpt", "value": _sentence(rng, 40)})
            record["conversations"] = turns
            file.write(("," if row else "") + "\n" + json.dumps(record, ensure_ascii=row % 2 == 0))
        file.write("\n]\n")


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(1, 2 * words)))


def measure(source: Path, out: Path, options: list[str]) -> dict[str, float]:
    """Convert in another process on one core: seconds by the clock and of the processor, peak
    resident memory in MB. Raises `ValueError` if it fails."""
    command = [sys.executable, "-m", "data_prep.llava_mix665k"]
    command += ["--source", str(source), "--out", str(out), *options]
    core = {min(os.sched_getaffinity(0))}
    started = time.perf_counter()
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
        check=False,
    )
    seconds = time.perf_counter() - started
    if process.returncode:
        raise ValueError(f"the conversion failed: {process.stderr.strip()}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mb": round(used.ru_maxrss / 1024),
    }


def run(options: argparse.Namespace) -> None:
    """Generate, convert and print one line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        source.mkdir()
        write_mix(source / "llava_v1_5_mix665k.json", options.rows)
        size = (source / "llava_v1_5_mix665k.json").stat().st_size / 1e6
        speed = measure(source, out, ["--format", options.format, "--order", options.order])
    rate = {
        "rows": options.rows,
        "source_mb": round(size),
        "rows_per_second": round(options.rows / speed["seconds"]),
    }
    print(json.dumps({**rate, **speed, "format": options.format, "order": options.order}))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    command = "python -m data_prep.converting.conversion_speed"
    parser = Parser(command, __doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=665_000)
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--order", choices=ORDERS, default="image_first")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
