"""From scores to results: every cell with its interval, every comparison with its corrected p.

The comparisons, each on the same questions:

    causal-causal    a cell against causal in training and inference
    diagonal         a cell against the one of its row where inference has the mask of training:
                     what a mismatch costs
    inference-only   a cell of the diagonal against causal training with the same mask in inference:
                     what training brings

Two families are corrected on their own (Holm). `primary`, what a matrix is made for: every cell of
the diagonal against causal training with its mask switched on, and against causal-causal, by the
mean of the tasks. `other`: all the rest, single tasks among them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from eval import paired
from eval.held_out import Question
from eval.intervals import CONFIDENCE
from eval.paired import OVERALL, QuestionsOfTask

CAUSAL = "causal"
PRIMARY, OTHER = "primary", "other"


@dataclass(frozen=True)
class MatrixRow:
    """A row of the matrix: the mask in training, and the runs that were trained so."""

    name: str
    mask: str
    runs: tuple[str, ...]


Pair = tuple[str, str]  # row, mask in inference


def tasks_of(questions: Sequence[Question]) -> list[QuestionsOfTask]:
    """The tasks in the order of their first question."""
    units: dict[str, dict[str, int]] = {}
    indices: dict[str, list[int]] = {}
    for question in questions:
        known = units.setdefault(question.task, {})
        index = known.setdefault(question.unit, len(known))
        indices.setdefault(question.task, []).append(index)
    return [QuestionsOfTask(name, np.array(unit)) for name, unit in indices.items()]


def by_task(
    questions: Sequence[Question], runs: Sequence[Sequence[float]]
) -> dict[str, np.ndarray]:
    """Scores of several runs [S, all questions] as {task: [S, questions]}."""
    scores = np.asarray(runs, dtype=np.float64)
    names = np.array([question.task for question in questions])
    return {name: scores[:, names == name] for name in dict.fromkeys(names.tolist())}


def reference(rows: Sequence[MatrixRow], masks: Sequence[str]) -> Pair | None:
    """The causal-causal cell: of a row trained causally, not the base if another one is there."""
    causal = [row.name for row in rows if row.mask == CAUSAL]
    causal = [name for name in causal if name != "base"] or causal
    return (causal[0], CAUSAL) if causal and CAUSAL in masks else None


def pairs(rows: Sequence[MatrixRow], masks: Sequence[str]) -> list[tuple[str, Pair, Pair]]:
    """(kind, cell, the cell that it is compared with), none of them twice."""
    base, pairs = reference(rows, masks), []
    for row in rows:
        own = (row.name, row.mask)
        for mask in masks:
            cell = (row.name, mask)
            if base and cell != base:
                pairs.append(("causal-causal", cell, base))
            if row.mask in masks and cell != own and own != base:
                pairs.append(("diagonal", cell, own))
        if base and row.mask in masks and row.mask != CAUSAL:
            pairs.append(("inference-only", own, (base[0], row.mask)))
    return sorted(pairs, key=lambda pair: pair[0])  # stable: kind by kind


def results(
    rows: Sequence[MatrixRow],
    masks: Sequence[str],
    questions: Sequence[Question],
    scores: Mapping[tuple[str, str], Sequence[float]],
) -> dict:
    """All numbers of the report. scores: {(run, mask): score of each question}."""
    tasks, cells = tasks_of(questions), {}
    for row in rows:
        for mask in masks:
            runs = [scores[run, mask] for run in row.runs]
            cells[row.name, mask] = by_task(questions, runs)
    compared = []
    for kind, cell, other in pairs(rows, masks):
        compared.append((kind, cell, other, paired.difference(cells[cell], cells[other])))
    return {
        "tasks": {task.name: len(task.unit) for task in tasks},
        "headline": headline(tasks),
        "rows": [asdict(row) | {"runs": list(row.runs)} for row in rows],
        "masks": list(masks),
        "reference": reference(rows, masks),
        "confidence": CONFIDENCE,
        "cells": _cells(rows, tasks, cells),
        "comparisons": _comparisons(rows, tasks, compared),
    }


def headline(tasks: Sequence[QuestionsOfTask]) -> str:
    """The name of what is told first: the mean of the tasks, or the only one."""
    return OVERALL if len(tasks) > 1 else tasks[0].name


def _averaged(tasks: Sequence[QuestionsOfTask]) -> dict[str, list[QuestionsOfTask]]:
    """{name: the tasks that it averages}: that of the headline, then each task."""
    return {headline(tasks): list(tasks)} | {task.name: [task] for task in tasks}


def _cells(rows, tasks, cells: dict[Pair, dict]) -> list[dict]:
    runs, entries = {row.name: len(row.runs) for row in rows}, []
    for name, of_name in _averaged(tasks).items():
        for (row, mask), scores in cells.items():
            entry = {"task": name, "row": row, "mask": mask, "runs": runs[row]}
            by_run = paired.by_run(of_name, scores)
            entries.append(entry | asdict(paired.estimate(of_name, scores)) | {"by_run": by_run})
    return entries


def _comparisons(rows, tasks, compared: Sequence[tuple]) -> list[dict]:
    own, entries = {row.name: row.mask for row in rows}, []
    for name, of_name in _averaged(tasks).items():
        for kind, cell, other, differences in compared:
            trained = own[cell[0]] == cell[1] != CAUSAL
            primary = trained and kind != "diagonal" and name == headline(tasks)
            entry = {
                "task": name,
                "family": PRIMARY if primary else OTHER,
                "kind": kind,
                "row": cell[0],
                "mask": cell[1],
                "against_row": other[0],
                "against_mask": other[1],
            }
            entries.append(entry | asdict(paired.compare(of_name, differences)))
    for family in (PRIMARY, OTHER):
        of_family = [entry for entry in entries if entry["family"] == family]
        p_values = paired.holm([entry["p"] for entry in of_family])
        for entry, p in zip(of_family, p_values):
            entry["p_holm"], entry["carried"] = p, p < 1 - CONFIDENCE
    return entries
