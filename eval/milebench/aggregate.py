"""From scored tasks to MileBench's result files, and to scores with intervals.

`eval_json` .. `results_csv` give MileBench's formats. `summary` gives ours: per task and level, per task code of the
paper (T-1 .. S-5, N-1, N-2, I-1; a code is the mean over its data sets), per group, and overall.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from eval import intervals
from eval.intervals import Estimate
from eval.milebench.metrics import LEVELS, Scored, ScoredTask
from eval.milebench.tasks import DATASETS, DIAGNOSTIC, ROUGE_L

CODES = tuple(
    sorted(
        {data.code for data in DATASETS.values()}, key=lambda code: ("TSNI".index(code[0]), code)
    )
)
GROUPS = tuple(dict.fromkeys(data.group for data in DATASETS.values()))
REALISTIC = tuple(code for code in CODES if code[0] in "TS")


def eval_json(task: ScoredTask) -> dict[str, Any]:
    """Content of eval.json: the score, and mean and [sum, count] per image level (mean 0 for an empty level)."""
    scores = [one.score for one in task.scored]
    total = float(np.mean(scores)) if task.scorer == ROUGE_L else sum(scores) / len(scores)
    levels = {level: [one.score for one in task.scored if one.level == level] for level in LEVELS}
    return {
        task.metric: total,
        "image_quantity_level-Accuracy": {
            level: float(np.mean(some)) if some else 0 for level, some in levels.items()
        },
        "image_quantity_level-Result": {
            level: [sum(some), len(some)] for level, some in levels.items()
        },
    }


def eval_score_json(task: ScoredTask) -> list[dict[str, str]]:
    """Content of eval_score.json: ids and scores as strings, Rouge-L to three digits (Q11)."""
    return [
        {"id": str(one.record["sample_id"]), "score": str(round(one.score, 3))}
        for one in task.scored
    ]


def sample_scores(task: ScoredTask) -> list[dict[str, Any]]:
    """Per-sample scores as numbers, in the order of pred.json; `extracted` for multiple choice only."""
    return [_sample_score(one) for one in task.scored]


def _sample_score(one: Scored) -> dict[str, Any]:
    found = {"sample_id": one.sample.number, "score": one.score, "level": one.level}
    return found if one.extracted is None else {**found, "extracted": one.extracted}


def results_json(
    models: Mapping[str, Mapping[str, dict[str, Any]]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Content of result.json from {model: {data set: content of eval.json}}, without data sets that MileBench lacks."""
    return {
        model: {
            group: {
                name: tasks.get(name, {}) for name, data in DATASETS.items() if data.group == group
            }
            for group in GROUPS
        }
        for model, tasks in models.items()
    }


def results_csv(results: Mapping[str, Mapping[str, Mapping[str, dict[str, Any]]]]) -> str:
    """Text of result.csv from the content of result.json: one row a model, scores in percent to two digits."""
    rows = []
    for model, groups in results.items():
        row = {"Model": model}
        for name, found in (
            (name, found) for group in groups.values() for name, found in group.items()
        ):
            metrics = [key for key in found if not key.startswith("image_quantity_level-")]
            row |= {f"{name} ({metric})": str(round(100 * found[metric], 2)) for metric in metrics}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def estimate(scorer: str, scored: Sequence[Scored]) -> Estimate:
    """Mean score with its interval: bootstrap for Rouge-L, Wilson for the accuracies."""
    scores = [one.score for one in scored]
    return intervals.mean(scores) if scorer == ROUGE_L else intervals.accuracy(scores)


def summary(tasks: Sequence[ScoredTask]) -> dict[str, Any]:
    """Scores of one model, fractions, each with n and interval: {tasks, codes, groups, overall}.

    An aggregate over less than all its parts says which are `missing` and does not stand for the paper's number.
    """
    scores = {task.name: estimate(task.scorer, task.scored) for task in tasks}
    codes = {
        code: _mean_over(scores, [n for n, data in DATASETS.items() if data.code == code])
        for code in CODES
    }
    groups = {
        group: _mean_over(scores, [n for n, data in DATASETS.items() if data.group == group])
        for group in GROUPS
    }
    found = {code: part[0] for code, part in codes.items() if part}
    incomplete = [code for code, part in codes.items() if not part or part[1]]
    overall = {
        "Realistic": _mean_over(found, REALISTIC, incomplete),
        DIAGNOSTIC: _mean_over(found, ("N-1", "N-2", "I-1"), incomplete),
        "N": _mean_over(found, ("N-1", "N-2"), incomplete),
        "I": _mean_over(found, ("I-1",), incomplete),
    }
    return {
        "tasks": {task.name: _task_summary(task, scores[task.name]) for task in tasks},
        **{
            key: {
                name: {**asdict(part[0]), "missing": part[1]}
                for name, part in parts.items()
                if part
            }
            for key, parts in (("codes", codes), ("groups", groups), ("overall", overall))
        },
    }


def _task_summary(task: ScoredTask, score: Estimate) -> dict[str, Any]:
    data = DATASETS.get(task.name)
    by_level = {level: [one for one in task.scored if one.level == level] for level in LEVELS}
    return {
        "code": data.code if data else None,
        "group": data.group if data else None,
        "metric": task.metric,
        "scorer": task.scorer,
        **asdict(score),
        "levels": {
            level: asdict(estimate(task.scorer, some)) for level, some in by_level.items() if some
        },
    }


def _mean_over(
    scores: Mapping[str, Estimate], parts: Sequence[str], incomplete: Sequence[str] = ()
) -> tuple[Estimate, list[str]] | None:
    """Mean over the `parts` that have a score, and the parts with none or an incomplete one; None without any."""
    there = [scores[name] for name in parts if name in scores]
    missing = [name for name in parts if name not in scores or name in incomplete]
    return (intervals.average(there), missing) if there else None
