"""From scored tasks to MileBench's result files, and to scores with intervals.

`eval_json` .. `results_csv` give MileBench's formats. `summary` gives ours: per task and level, per
task code of the paper (T-1 .. S-5, N-1, N-2, I-1; a code is the mean over its data sets), per
group, and overall.
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
    """Content of eval.json: the score, and mean and [sum, count] per image level.

    The mean of an empty level is 0.
    """
    scores = [sample.score for sample in task.scored]
    means, sums = {}, {}
    for level, samples in by_level(task).items():
        of_level = [sample.score for sample in samples]
        means[level] = float(np.mean(of_level)) if of_level else 0
        sums[level] = [sum(of_level), len(of_level)]
    return {
        task.metric: float(np.mean(scores))
        if task.scorer == ROUGE_L
        else sum(scores) / len(scores),
        "image_quantity_level-Accuracy": means,
        "image_quantity_level-Result": sums,
    }


def by_level(task: ScoredTask) -> dict[str, list[Scored]]:
    """The samples of each image level."""
    levels: dict[str, list[Scored]] = {level: [] for level in LEVELS}
    for sample in task.scored:
        levels[sample.level].append(sample)
    return levels


def eval_score_json(task: ScoredTask) -> list[dict[str, str]]:
    """Content of eval_score.json: ids and scores as strings, Rouge-L to three digits (Q11)."""
    return [
        {"id": str(sample.record["sample_id"]), "score": str(round(sample.score, 3))}
        for sample in task.scored
    ]


def sample_scores(task: ScoredTask) -> list[dict[str, Any]]:
    """Scores of the samples as numbers, in the order of pred.json.

    `extracted` is for multiple choice only.
    """
    entries = []
    for scored in task.scored:
        number, level = scored.sample.number, scored.level
        entries.append({"sample_id": number, "score": scored.score, "level": level})
        if scored.extracted is not None:
            entries[-1]["extracted"] = scored.extracted
    return entries


def results_json(
    models: Mapping[str, Mapping[str, dict[str, Any]]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Content of result.json from {model: {data set: content of eval.json}}.

    Data sets that MileBench lacks are left out.
    """
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for model, tasks in models.items():
        results[model] = {group: {} for group in GROUPS}
        for name, data in DATASETS.items():
            results[model][data.group][name] = tasks.get(name, {})
    return results


def results_csv(results: Mapping[str, Mapping[str, Mapping[str, dict[str, Any]]]]) -> str:
    """Text of result.csv from the content of result.json.

    One row a model, scores in percent to two digits.
    """
    rows, columns = [], {"Model": None}
    for model, groups in results.items():
        row = {"Model": model}
        for group in groups.values():
            for name, scores in group.items():
                metrics = [key for key in scores if not key.startswith("image_quantity_level-")]
                for metric in metrics:
                    row[f"{name} ({metric})"] = str(round(100 * scores[metric], 2))
        rows.append(row)
        columns |= dict.fromkeys(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def estimate(scorer: str, scored: Sequence[Scored]) -> Estimate:
    """Mean score with its interval: bootstrap for Rouge-L, Wilson for the accuracies."""
    scores = [sample.score for sample in scored]
    return intervals.mean(scores) if scorer == ROUGE_L else intervals.accuracy(scores)


def summary(tasks: Sequence[ScoredTask]) -> dict[str, Any]:
    """Scores of one model, fractions, each with n and interval: {tasks, codes, groups, overall}.

    An aggregate over less than all its parts says which are `missing` and does not stand for the
    paper's number.
    """
    scores = {task.name: estimate(task.scorer, task.scored) for task in tasks}
    of_code = {code: [] for code in CODES}
    of_group = {group: [] for group in GROUPS}
    for name, data in DATASETS.items():
        of_code[data.code].append(name)
        of_group[data.group].append(name)
    codes = {code: _mean_over(scores, names) for code, names in of_code.items()}
    groups = {group: _mean_over(scores, names) for group, names in of_group.items()}
    known = {code: mean[0] for code, mean in codes.items() if mean}
    incomplete = [code for code, mean in codes.items() if not mean or mean[1]]
    overall = {
        "Realistic": _mean_over(known, REALISTIC, incomplete),
        DIAGNOSTIC: _mean_over(known, ("N-1", "N-2", "I-1"), incomplete),
        "N": _mean_over(known, ("N-1", "N-2"), incomplete),
        "I": _mean_over(known, ("I-1",), incomplete),
    }
    return {
        "tasks": {task.name: _task_summary(task, scores[task.name]) for task in tasks},
        "codes": _with_missing(codes),
        "groups": _with_missing(groups),
        "overall": _with_missing(overall),
    }


Mean = tuple[Estimate, list[str]]  # and the parts that are missing


def _with_missing(means: Mapping[str, Mean | None]) -> dict[str, dict[str, Any]]:
    """The means as data, without those that have no part."""
    entries = {}
    for name, mean in means.items():
        if mean is not None:
            entries[name] = {**asdict(mean[0]), "missing": mean[1]}
    return entries


def _task_summary(task: ScoredTask, score: Estimate) -> dict[str, Any]:
    data = DATASETS.get(task.name)
    levels = {}
    for level, samples in by_level(task).items():
        if samples:
            levels[level] = asdict(estimate(task.scorer, samples))
    return {
        "code": data.code if data else None,
        "group": data.group if data else None,
        "metric": task.metric,
        "scorer": task.scorer,
        **asdict(score),
        "levels": levels,
    }


def _mean_over(
    scores: Mapping[str, Estimate], parts: Sequence[str], incomplete: Sequence[str] = ()
) -> Mean | None:
    """Mean over the `parts` that have a score, and the parts with none or an incomplete one.

    None without any.
    """
    known = [scores[name] for name in parts if name in scores]
    missing = [name for name in parts if name not in scores or name in incomplete]
    return (intervals.average(known), missing) if known else None
