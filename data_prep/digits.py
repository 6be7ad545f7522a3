"""The embedded digit questions (`fmtrain.tiny`) as files.

    python -m data_prep.digits --out DIR                rows
    python -m data_prep.digits --out DIR --milebench    MileBench's format

Rows are in DIR/train/rows.jsonl and DIR/test/rows.jsonl, MileBench's samples in
DIR/DigitsRead/DigitsRead.json and so on; images lie in a folder images beside each of these files.

The splits are folders of their own, so that `dataset_name: DIR/train` is training data and no more.
MileBench's format holds one split; there `read` and `count` are multiple-choice, the others
open-ended, and of a dialogue the last question is asked, with the turn before it as text.
"""

import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.converting.writing import encoded, write_json
from fmtrain.command_line import Parser, guarded
from fmtrain.data.row_format import COLUMNS
from fmtrain.tiny.digits import MOST, PROBES, SPLITS, TASKS, row

CHOICES = {
    "read": [str(digit) for digit in range(10)],
    "count": [str(number) for number in range(MOST + 1)],
}
INSTRUCTION = "Answer the question about the pictures."


def main(arguments: list[str] | None = None) -> int:
    """Write the files. Returns 0, or 2 after one line on stderr if `--out` holds anything or cannot
    be written."""
    parser = Parser("python -m data_prep.digits", __doc__)
    add, tasks = parser.add_argument, list(TASKS)
    add("--out", type=Path, required=True, help="a new folder")
    add("--split", choices=SPLITS, help="default: both, or test with --milebench")
    known = [*tasks, *PROBES]
    add("--tasks", nargs="+", choices=known, default=tasks, help=f"default: {' '.join(tasks)}")
    add("--count", type=int, default=200, help="rows a task and split (default: 200)")
    add("--seed", type=int, default=0)
    add("--milebench", action="store_true")
    options = parser.parse_args(arguments)
    return guarded(lambda: write(options))


def write(options: Namespace) -> None:
    """Write the files that `options` ask for, or none. Raises `ValueError` as `new_folder`."""
    count, seed = options.count, options.seed
    if count < 1 or seed < 0:
        raise ValueError(
            f"--count is {count}, --seed {seed}: at least 1 row and a seed from 0 on are needed"
        )
    with new_folder(options.out) as folder:
        if options.milebench:
            for task in options.tasks:
                write_milebench(folder, options.split or "test", task, count, seed)
        else:
            for split in [options.split] if options.split else SPLITS:
                write_rows(folder / split, split, options.tasks, count, seed)
    print(f"{options.out}: {count} rows each of {', '.join(options.tasks)}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A staging folder that becomes `out` when the block ends, and vanishes when it raises. Raises
    `ValueError` if `out` holds anything."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(
            f"{out} {'is a file' if out.is_file() else 'is not empty'}; choose a new folder"
        )
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        staging.replace(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_rows(folder: Path, split: str, tasks: Iterable[str], count: int, seed: int) -> None:
    """Rows of a split, the tasks taking turns, into `folder`/rows.jsonl and their images beside
    it."""
    folder.mkdir()
    with (folder / "rows.jsonl").open("wb") as file:
        for index in range(count):
            for task in tasks:
                dialogue = row(split, task, seed, index)
                names = _write_images(dialogue, folder / "images")
                dialogue["images"] = [f"images/{name}" for name in names]
                file.write(encoded({key: dialogue[key] for key in COLUMNS}) + b"\n")


def write_milebench(folder: Path, split: str, task: str, count: int, seed: int) -> None:
    """A task as a data set of MileBench: `folder`/DigitsTASK/DigitsTASK.json and images."""
    name = f"Digits{task.capitalize()}"
    samples = []
    for index in range(count):
        dialogue = row(split, task, seed, index)
        *history, last = dialogue["messages"]
        places = iter(range(1, len(dialogue["images"]) + 1))
        parts = chain.from_iterable(message["content"] for message in history)
        context = " ".join(part["text"] or f"{{image#{next(places)}}}" for part in parts)
        instance: dict[str, Any] = {
            "context": context,
            "images_path": _write_images(dialogue, folder / name / "images"),
        }
        if task in CHOICES:
            instance["choice_list"] = CHOICES[task]
        samples.append(
            {
                "sample_id": index,
                "task_instruction_id": 0,
                "task_instance": instance,
                "response": last["content"][0]["text"],
                "image_quantity_level": "Few",
            }
        )
    meta = {
        "dataset": name,
        "split": split,
        "num_sample": count,
        "task_instruction": [INSTRUCTION],
        "question_type": "multi-choice" if task in CHOICES else "open-ended",
    }
    write_json(folder / name / f"{name}.json", {"meta_data": meta, "data": samples})


def _write_images(dialogue: dict[str, Any], folder: Path) -> list[str]:
    """The images of a row as files of `folder`; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in dialogue["images"]:
        (folder / image["path"]).write_bytes(image["bytes"])
    return [image["path"] for image in dialogue["images"]]


if __name__ == "__main__":
    sys.exit(main())
