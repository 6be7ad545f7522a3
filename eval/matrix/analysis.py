"""From scores to results: every cell with its interval, every comparison with its corrected p.

The comparisons, each on the same questions:

    causal-causal    a cell against causal in training and inference
    diagonal         a cell against the one of its row where inference has the mask of training:
                     what a mismatch costs
    inference-only   a cell of the diagonal against causal training with the same mask in inference:
                     what training brings

Two families are corrected on their own (Holm): all comparisons of the overall score, and all
comparisons of single tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np

from eval import paired
from eval.held_out import Question
from eval.intervals import CONFIDENCE, RESAMPLES
from eval.paired import OVERALL, QuestionsOfTask

CAUSAL = "causal"


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
    compared = pairs(rows, masks)
    differences = [paired.difference(cells[a], cells[b]) for _, a, b in compared]
    replicates = paired.replicates(tasks, [*cells.values(), *differences])
    of_cells = {name: values[: len(cells)] for name, values in replicates.items()}
    of_differences = {name: values[len(cells) :] for name, values in replicates.items()}
    return {
        "tasks": {task.name: len(task.unit) for task in tasks},
        "rows": [asdict(row) | {"runs": list(row.runs)} for row in rows],
        "masks": list(masks),
        "reference": reference(rows, masks),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "cells": _cells(rows, tasks, cells, of_cells),
        "comparisons": _comparisons(tasks, compared, differences, of_differences),
    }


def _names(tasks: Sequence[QuestionsOfTask]) -> list[str]:
    return [OVERALL, *(task.name for task in tasks)]


def _cells(rows, tasks, cells: dict[Pair, dict], replicates: dict[str, np.ndarray]) -> list[dict]:
    runs, estimates = {row.name: len(row.runs) for row in rows}, {}
    for k, (pair, scores) in enumerate(cells.items()):
        own = {name: values[k] for name, values in replicates.items()}
        estimates[pair] = paired.estimates(tasks, scores, own)
    entries = []
    for name in _names(tasks):
        for (row, mask), by_name in estimates.items():
            entry = {"task": name, "row": row, "mask": mask, "runs": runs[row]}
            entries.append(entry | asdict(by_name[name]))
    return entries


def _comparisons(tasks, compared, differences, replicates: dict[str, np.ndarray]) -> list[dict]:
    by_name: dict[str, list[dict]] = {name: [] for name in _names(tasks)}
    for k, (kind, cell, other) in enumerate(compared):
        own = {name: values[k] for name, values in replicates.items()}
        comparisons = paired.compare(tasks, differences[k], own)
        for name, entries in by_name.items():
            entry = {
                "task": name,
                "kind": kind,
                "row": cell[0],
                "mask": cell[1],
                "against_row": other[0],
                "against_mask": other[1],
            }
            entries.append(entry | asdict(comparisons[name]))
    overall = by_name.pop(OVERALL)
    single = list(chain.from_iterable(by_name.values()))
    for family in (overall, single):
        p_values = paired.holm([entry["p"] for entry in family])
        for entry, p in zip(family, p_values):
            entry["p_holm"] = p
            excludes_0 = entry["low"] > 0 or entry["high"] < 0
            entry["carried"] = bool(p < 1 - CONFIDENCE and excludes_0)
    return [*overall, *single]
