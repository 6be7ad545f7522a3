"""The cells of a matrix: what one checkpoint answers under one mask, each in a file of its own.

    <work>/cells/<run>/<mask>.json   {"key": what the answers depend on, "answers": [..], "scores": [..]}

A file is written when all questions are answered, so a killed evaluation loses at most the cell at hand.
"""

import functools
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import datasets
import torch
import transformers

from eval.answers import answer, questions
from eval.milebench.decoder import Variant
from eval.milebench.generate import fingerprint
from fmtrain import attached
from fmtrain.checkpoint import load
from fmtrain.data import files as data
from fmtrain.patch import VERSION, Handle
from fmtrain.tiny import digits

HELD_OUT = 1  # seed of the held-out digits; training rows come from other scans


@dataclass(frozen=True)
class Item:
    """One question: what is averaged over. `unit`: what is drawn at random, a row with all its turns."""

    task: str
    unit: str
    text: str
    reference: str


@dataclass(frozen=True)
class HeldOut:
    """The rows of the evaluation, the folder of their images, and their questions in order."""

    rows: list[dict]
    image_root: str
    items: list[Item]

    @functools.cached_property
    def digest(self) -> str:
        found = hashlib.sha256()
        for row in self.rows:
            found.update(repr((row["id"], row["messages"], row["images"])).encode())
        return found.hexdigest()


@functools.lru_cache(maxsize=1)
def held_out(
    name: str, tasks: tuple[str, ...], rows_per_task: int, image_root: str | None
) -> HeldOut:
    """`rows_per_task` rows of each task: of the digits' test scans, or the first ones of a file.

    Raises `ValueError` for a task that is not there or has no row.
    """
    if name == "digits":
        tasks = tasks or tuple(digits.TASKS)
        rows = [
            row
            for task in tasks
            for row in digits.rows("test", [task], rows_per_task, seed=HELD_OUT).with_format(None)
        ]
        return HeldOut(rows, ".", [item for row in rows for item in _items(row)])
    loaded = data.load(name, image_root=image_root)
    by_task: dict[str, list[dict]] = {}
    for row in loaded.rows.with_format(None):
        by_task.setdefault(task_of(row), []).append(row)
    for task in tasks:
        if task not in by_task:
            raise ValueError(f"{name}: no row of task {task!r}; there are {', '.join(by_task)}")
    rows = [row for task in tasks or by_task for row in by_task[task][:rows_per_task]]
    items = [item for row in rows for item in _items(row)]
    if not items:
        raise ValueError(f"{name}: no assistant's turn, so there is no question")
    return HeldOut(rows, loaded.image_root, items)


def task_of(row: dict) -> str:
    return str(row.get("task") or row.get("source") or "all")


def _items(row: dict) -> list[Item]:
    """A question for each assistant's turn, as `eval.answers.questions` makes them."""
    found, asked = [], ""
    for message in row["messages"]:
        content = message["content"]
        parts = (
            [content]
            if isinstance(content, str)
            else [part["text"] for part in content if part["type"] == "text"]
        )
        if message["role"] == "assistant":
            found.append(Item(task_of(row), str(row["id"]), asked, "".join(parts).strip()))
        asked = " ".join(parts)
    return found


def right(said: str, reference: str) -> int:
    """1 if the answers are equal but for case and blanks, else 0."""
    return int(said.casefold().split() == reference.casefold().split())


def cell_path(folder: Path, run: str, mask: str) -> Path:
    return folder / "cells" / run / f"{mask}.json"


def cell_key(checkpoint: Path, variant: Variant, there: HeldOut, max_new_tokens: int) -> dict:
    """What the answers of a cell depend on: if any of it changes, the cell is made again."""
    return {
        "checkpoint": fingerprint(checkpoint),
        "mask": variant.name,
        "merge": None if variant.merge is None else vars(variant.merge),
        "mask_definitions": VERSION,
        "questions": there.digest,
        "max_new_tokens": max_new_tokens,
    }


def read_cell(path: Path, key: dict | None = None) -> dict | None:
    """The cell in a file, or None where there is none (or, with a key, another one)."""
    if not path.is_file():
        return None
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON (line {error.lineno}); delete it, and it is made again"
        ) from error
    return cell if key is None or cell["key"] == key else None


def write_cell(path: Path, cell: dict) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    staged.write_text(json.dumps(cell, ensure_ascii=False), encoding="utf-8")
    os.replace(staged, path)


def missing(
    folder: Path,
    run: str,
    checkpoint: Path,
    variants: Sequence[Variant],
    there: HeldOut,
    max_new_tokens: int,
) -> list[Variant]:
    """The masks under which this checkpoint has not answered yet."""
    shared = cell_key(checkpoint, variants[0], there, max_new_tokens)
    found = []
    for variant in variants:
        key = {
            **shared,
            "mask": variant.name,
            "merge": None if variant.merge is None else vars(variant.merge),
        }
        if read_cell(cell_path(folder, run, variant.name), key) is None:
            found.append(variant)
    return found


def evaluate(
    folder: Path,
    run: str,
    checkpoint: Path,
    variants: Sequence[Variant],
    source: tuple,
    batch_size: int,
    max_new_tokens: int,
) -> int:
    """Answer all questions of `held_out(*source)` with one checkpoint under every mask; returns how many cells were made.

    Runs in a worker process. The model is loaded once.
    """
    there = held_out(*source)
    todo = missing(folder, run, checkpoint, variants, there, max_new_tokens)
    if not todo:
        return 0
    model, processor = load(str(checkpoint), backend="sdpa", policy="causal")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    asked = list(questions(processor, there.rows, there.image_root))
    assert [question.reference for question in asked] == [item.reference for item in there.items]
    order = sorted(
        range(len(asked)), key=lambda k: (asked[k].layout.shape[1], k)
    )  # little padding in a batch
    handle: Handle = attached(model)
    for variant in todo:
        with handle.under(variant.policy, variant.merge):
            said = answer(model, processor, [asked[k] for k in order], batch_size, max_new_tokens)
        answers = [text for _, text in sorted(zip(order, said))]
        scores = [right(text, item.reference) for text, item in zip(answers, there.items)]
        key = cell_key(checkpoint, variant, there, max_new_tokens)
        write_cell(
            cell_path(folder, run, variant.name), {"key": key, "answers": answers, "scores": scores}
        )
    return len(todo)


def prepare_worker(threads: int) -> None:
    """Of a worker process: its threads, no output of its own, and it ends when the matrix is killed."""
    if threads:
        torch.set_num_threads(threads)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers"
    )  # of names that its own code still sets
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
