"""Held-out rows and their questions: a question for each assistant's turn, given its history."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fmtrain.data import files, sources
from fmtrain.data.collator import encode_prompt
from fmtrain.data.dialogue import Turn, turns
from fmtrain.data.encode import Encoded
from fmtrain.data.sources import DIGITS, Source
from fmtrain.tiny import digits

SEED = 1  # of the held-out digits; training rows come from other scans


@dataclass(frozen=True)
class Question:
    """What is averaged over. `unit` is what is drawn at random: a row with all its turns."""

    task: str
    unit: str
    text: str = ""
    reference: str = ""


@dataclass(frozen=True)
class HeldOut:
    """The rows of an evaluation and the folder of their images."""

    rows: list[dict]
    image_root: str

    def turns(self) -> Iterator[tuple[dict, Turn]]:
        """Every assistant's turn with its row, in order, but those that are context."""
        for row in self.rows:
            for turn in turns(row):
                if not turn.context:
                    yield row, turn

    @functools.cached_property
    def questions(self) -> list[Question]:
        """The questions of the turns, in order."""
        return [
            Question(task_of(row), str(row["id"]), turn.question, turn.reference)
            for row, turn in self.turns()
        ]

    @functools.cached_property
    def digest(self) -> str:
        """What the rows are, in short."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row["id"], row["messages"], row["images"])).encode())
        return digest.hexdigest()

    def prompts(self, processor) -> list[Encoded]:
        """What generation is fed before each answer."""
        return [encode_prompt(processor, row, turn, self.image_root) for row, turn in self.turns()]


@functools.lru_cache(maxsize=1)
def by_task(
    name: str, tasks: tuple[str, ...], rows_per_task: int, image_root: str | None
) -> HeldOut:
    """`rows_per_task` rows of each task: of the digits' test scans, or the first ones of a file.

    Raises `ValueError` for a task that is not there or has no row.
    """
    rows = []
    if name == DIGITS:
        for task in tasks or digits.TASKS:
            rows += digits.rows("test", [task], rows_per_task, seed=SEED).with_format(None)
        return HeldOut(rows, ".")
    loaded = files.load(sources.held_out(Source(name, split="test")), image_root=image_root)
    rows_of: dict[str, list[dict]] = {}
    for row in loaded.rows.with_format(None):
        rows_of.setdefault(task_of(row), []).append(row)
    for task in tasks or rows_of:
        if task not in rows_of:
            raise ValueError(f"{name}: no row of task {task!r}; there are {', '.join(rows_of)}")
        rows += rows_of[task][:rows_per_task]
    held_out = HeldOut(rows, loaded.image_root)
    if not held_out.questions:
        raise ValueError(f"{name}: no assistant's turn, so there is no question")
    return held_out


def mixed(
    name: str, tasks: Iterable[str], count: int, image_root: str | None, seed: int = SEED
) -> HeldOut:
    """`count` rows of all tasks: of the digits' test scans, or the first ones of a file."""
    if name == DIGITS:
        return HeldOut(list(digits.rows("test", list(tasks), count, seed).with_format(None)), ".")
    loaded = files.load(sources.held_out(Source(name, split="test")), count, image_root)
    return HeldOut(list(loaded.rows.with_format(None)), loaded.image_root)


def chance(name: str | None, tasks: Iterable[str]) -> dict[str, float]:
    """{task: share of right answers without a look at the pictures}, known of the digits' tasks."""
    if name != DIGITS:
        return {}
    by_task = dict(digits.CHANCE)
    by_task["dialogue"] = (by_task["read"] + by_task["changed"]) / 2  # a question for each turn
    return {task: by_task[task] for task in tasks if task in by_task}


def task_of(row: dict) -> str:
    """The task that a row belongs to."""
    return str(row.get("task") or row.get("source") or "all")
