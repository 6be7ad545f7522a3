"""From scores to results: every cell with its interval, every comparison with its corrected p, as one plain dict.

The comparisons, each on the same questions:

    causal-causal    a cell against causal in training and inference
    diagonal         a cell against the one of its row where inference has the mask of training: what a mismatch costs
    inference-only   a cell of the diagonal against causal training with the same mask in inference: what training brings

Two families are corrected on their own (Holm): all comparisons of the overall score, and all comparisons of single tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from eval import paired
from eval.intervals import CONFIDENCE, RESAMPLES
from eval.matrix.cells import Item
from eval.paired import OVERALL, Task

CAUSAL = "causal"


@dataclass(frozen=True)
class Row:
    """A row of the matrix: the mask in training and the runs that were trained so (names of their cells' folders)."""

    name: str
    mask: str
    runs: tuple[str, ...]


Pair = tuple[str, str]  # row, mask in inference


def tasks_of(items: Sequence[Item]) -> list[Task]:
    """The tasks in the order of their first question."""
    found = []
    for name in dict.fromkeys(item.task for item in items):
        units: dict[str, int] = {}
        found.append(
            Task(
                name,
                np.array(
                    [units.setdefault(item.unit, len(units)) for item in items if item.task == name]
                ),
            )
        )
    return found


def by_task(items: Sequence[Item], runs: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """Scores of several runs [S, all questions] as {task: [S, questions]}."""
    scores = np.asarray(runs, dtype=np.float64)
    names = np.array([item.task for item in items])
    return {name: scores[:, names == name] for name in dict.fromkeys(names.tolist())}


def reference(rows: Sequence[Row], masks: Sequence[str]) -> Pair | None:
    """The causal-causal cell: of a row trained causally, not the base if another one is there."""
    causal = [row.name for row in rows if row.mask == CAUSAL]
    causal = [name for name in causal if name != "base"] or causal
    return (causal[0], CAUSAL) if causal and CAUSAL in masks else None


def pairs(rows: Sequence[Row], masks: Sequence[str]) -> list[tuple[str, Pair, Pair]]:
    """(kind, cell, the cell that it is compared with), none of them twice."""
    base, found = reference(rows, masks), []
    for row in rows:
        for mask in masks:
            cell, own = (row.name, mask), (row.name, row.mask)
            if base and cell != base:
                found.append(("causal-causal", cell, base))
            if row.mask in masks and cell != own and own != base:
                found.append(("diagonal", cell, own))
        if base and row.mask in masks and row.mask != CAUSAL:
            found.append(("inference-only", (row.name, row.mask), (base[0], row.mask)))
    return sorted(found, key=lambda one: one[0])  # stable: kind by kind


def results(
    rows: Sequence[Row],
    masks: Sequence[str],
    items: Sequence[Item],
    scores: Mapping[tuple[str, str], Sequence[float]],
) -> dict:
    """All numbers of the report. scores: {(run, mask): score of each item}."""
    tasks = tasks_of(items)
    cells = {
        (row.name, mask): by_task(items, [scores[run, mask] for run in row.runs])
        for row in rows
        for mask in masks
    }
    compared = pairs(rows, masks)
    differences = [paired.difference(cells[a], cells[b]) for _, a, b in compared]
    drawn = paired.replicates(tasks, [*cells.values(), *differences])
    names = [OVERALL, *(task.name for task in tasks)]
    return {
        "tasks": {task.name: len(task.unit) for task in tasks},
        "rows": [asdict(row) | {"runs": list(row.runs)} for row in rows],
        "masks": list(masks),
        "reference": reference(rows, masks),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "cells": _cells(rows, tasks, cells, drawn, names),
        "comparisons": _comparisons(tasks, compared, differences, drawn, len(cells), names),
    }


def _cells(rows, tasks, cells, drawn, names) -> list[dict]:
    runs = {row.name: len(row.runs) for row in rows}
    found = {}
    for k, (pair, scores) in enumerate(cells.items()):
        found[pair] = paired.estimates(tasks, scores, {name: drawn[name][k] for name in names})
    return [
        {
            "task": name,
            "row": row,
            "mask": mask,
            "runs": runs[row],
            **asdict(found[row, mask][name]),
        }
        for name in names
        for row, mask in cells
    ]


def _comparisons(tasks, compared, differences, drawn, offset: int, names) -> list[dict]:
    found = []
    for k, (kind, cell, other) in enumerate(compared):
        by_name = paired.compare(
            tasks, differences[k], {name: drawn[name][offset + k] for name in names}
        )
        for name in names:
            at = {
                "task": name,
                "kind": kind,
                "row": cell[0],
                "mask": cell[1],
                "against_row": other[0],
                "against_mask": other[1],
            }
            found.append(at | asdict(by_name[name]))
    found.sort(key=lambda one: names.index(one["task"]))  # stable: overall first
    for family in (
        [one for one in found if one["task"] == OVERALL],
        [one for one in found if one["task"] != OVERALL],
    ):
        for one, p in zip(family, paired.holm([one["p"] for one in family])):
            one["p_holm"] = p
            one["carried"] = bool(p < 1 - CONFIDENCE and (one["low"] > 0 or one["high"] < 0))
    return found
