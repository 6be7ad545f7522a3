"""Score MileBench predictions.

    python -m eval.milebench.score --data DIR --predictions DIR --out DIR [--tasks TQA DocVQA ..]
        [--scoring original]

--predictions is a model's folder (<Dataset>/pred.json) or a folder of such folders. Written, all or
nothing:

    <out>/scores.json                           ours: every score with n and 95 % interval
    <out>/result.json, result.csv               as MileBench's score.py
    <out>/<model>/<Dataset>/eval.json, eval_score.json, pred_with_extracted.json (multi-choice)
                                                as its evaluate.py
    <out>/<model>/<Dataset>/sample_scores.json  ours: the score of each sample as a number

`--scoring original` gives MileBench's own numbers; `fixed` (default) repairs the defects that
README.md lists.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.intervals import CONFIDENCE, RESAMPLES, SEED
from eval.milebench.aggregate import (
    eval_json,
    eval_score_json,
    results_csv,
    results_json,
    sample_scores,
    summary,
)
from eval.milebench.metrics import ScoredTask, score_task
from eval.milebench.predictions import read_predictions
from eval.milebench.progress import RUN
from eval.milebench.tasks import DATASETS, read_json, read_task
from fmtrain.command_line import Parser, guarded

PREDICTIONS = "pred.json"


def find_models(
    predictions: Path, tasks: Sequence[str] | None
) -> dict[str, tuple[Path, list[str]]]:
    """{model: (its folder, names of its tasks)}.

    `predictions` is a model's folder or a folder of them. Without `tasks`, every data set that has
    a pred.json. Raises ValueError when a pred.json is missing.
    """
    if not predictions.is_dir():
        raise ValueError(f"{predictions}: no such folder")
    folders = [predictions]
    if not _tasks_in(predictions):
        folders = sorted(path for path in predictions.iterdir() if path.is_dir())
    models = {}
    for folder in folders:
        predicted = _tasks_in(folder)
        if not predicted:
            continue
        for name in tasks or ():
            if name not in predicted:
                raise ValueError(
                    f"{folder / name / PREDICTIONS}: no such file "
                    f"({len(predicted)} other tasks have predictions)"
                )
        model = folder.resolve().name if folder == predictions else folder.name
        models[model] = (folder, list(tasks or predicted))
    if not models:
        raise ValueError(
            f"{predictions}: holds neither <task>/{PREDICTIONS} nor <model>/<task>/{PREDICTIONS}"
        )
    return models


def _tasks_in(folder: Path) -> list[str]:
    """Names of the tasks that have predictions in a model's folder, MileBench's first."""
    names = sorted(path.parent.name for path in folder.glob(f"*/{PREDICTIONS}"))
    known = [name for name in DATASETS if name in names]
    return known + [name for name in names if name not in DATASETS]


def score_models(
    data: Path, models: Mapping[str, tuple[Path, Sequence[str]]], original: bool
) -> dict[str, list[ScoredTask]]:
    """Scored tasks of every model. Raises ValueError for the first file that cannot be scored."""
    scored: dict[str, list[ScoredTask]] = {}
    for model, (folder, names) in models.items():
        scored[model] = []
        for name in names:
            path = folder / name / PREDICTIONS
            task = read_task(data, name)
            scored[model].append(score_task(task, read_predictions(path), path, original))
    return scored


def prompts_of(folder: Path, names: Sequence[str]) -> str:
    """Whose prompts a model answered: `fixed`, `original`, or `unknown` where no run.json says.

    Raises ValueError for tasks that differ in it.
    """
    by_task = {}
    for name in names:
        path = folder / name / RUN
        settings = read_json(path).get("settings", {}) if path.is_file() else {}
        by_task[name] = settings.get("prompts", "unknown")
    if len(set(by_task.values())) > 1:
        of_tasks = ", ".join(f"{name} {prompts}" for name, prompts in by_task.items())
        raise ValueError(f"{folder}: the tasks have different prompts: {of_tasks}")
    return next(iter(by_task.values()))


def render(
    models: Mapping[str, Sequence[ScoredTask]], original: bool, prompts: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """All files to write, {path under the output folder: text}, and the content of scores.json.

    prompts: of each model.
    """
    files, evals = {}, {}
    for model, tasks in models.items():
        evals[model] = {task.name: eval_json(task) for task in tasks}
        for task in tasks:
            folder = f"{model}/{task.name}"
            files[f"{folder}/eval.json"] = json.dumps(evals[model][task.name])
            files[f"{folder}/eval_score.json"] = json.dumps(eval_score_json(task), indent=4)
            files[f"{folder}/sample_scores.json"] = json.dumps(sample_scores(task), indent=1)
            details = [sample.detail for sample in task.scored if sample.detail is not None]
            if details:
                files[f"{folder}/pred_with_extracted.json"] = json.dumps(details, indent=4)
    results = results_json(evals)
    scores = {
        "scoring": "original" if original else "fixed",
        "interval": {
            "confidence": CONFIDENCE,
            "accuracy": "Wilson",
            "Rouge-L f": f"percentile bootstrap, {RESAMPLES} resamples, seed {SEED}",
            "aggregates": "MOVER from the intervals of the parts",
        },
        "models": {},
    }
    for model, tasks in models.items():
        scores["models"][model] = {"prompts": prompts[model], **summary(tasks)}
    files["result.json"] = json.dumps(results, indent=4)
    files["result.csv"] = results_csv(results)
    files["scores.json"] = json.dumps(scores, indent=1)
    return files, scores


def write_files(out: Path, files: Mapping[str, str]) -> None:
    """Write all files under `out`, or none.

    They are written in full beside it first, then moved into place.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
            staged = Path(staging, "files")
            for name, text in files.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).write_text(text, encoding="utf-8")
            if not out.exists():
                staged.rename(out)
                return
            for name in files:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
            for name in files:
                os.replace(staged / name, out / name)
    except OSError as error:
        raise ValueError(
            f"{out}: cannot be written ({error.strerror}: {error.filename})"
        ) from error


def print_table(model: str, scores: Mapping[str, Any], scoring: str, console: Console) -> None:
    """One model's scores in percent with n and interval: tasks, then codes, groups and overall."""
    how = f"prompts {scores['prompts']}, scoring {scoring}"
    title = f"MileBench: {model} (percent, 95 % interval; {how})"
    table = Table(title=title, title_justify="left")
    for heading in ("", "code", "metric"):
        table.add_column(heading)
    for heading in ("n", "score", "interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, part in scores["tasks"].items():
        table.add_row(name, part["code"] or "", part["metric"], *_numbers(part))
    for key in ("codes", "groups", "overall"):
        table.add_section()
        for name, part in scores[key].items():
            missing = f", {len(part['missing'])} parts missing" if part["missing"] else ""
            table.add_row(name, "", f"mean{missing}", *_numbers(part))
    console.print(table)


def _numbers(part: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        str(part["n"]),
        f"{100 * part['score']:.2f}",
        f"{100 * part['low']:.1f} .. {100 * part['high']:.1f}",
    )


def score(
    data: Path, predictions: Path, tasks: list[str] | None, out: Path, original: bool
) -> None:
    """Score predictions, write all files and print the tables."""
    names = list(dict.fromkeys(tasks)) if tasks else None
    folders = find_models(predictions, names)
    prompts = {model: prompts_of(*folder) for model, folder in folders.items()}
    files, scores = render(score_models(data, folders, original), original, prompts)
    write_files(out, files)
    console = Console()
    for model, of_model in scores["models"].items():
        print_table(model, of_model, scores["scoring"], console)
        for name, part in of_model["tasks"].items():
            if name in DATASETS and part["scorer"] != DATASETS[name].scorer:
                console.print(
                    f"note: {name} is scored by {part['scorer']}, "
                    f"the paper's table has {DATASETS[name].scorer}"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("python -m eval.milebench.score", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of <task>/<task>.json")
    add(
        "--predictions",
        type=Path,
        required=True,
        metavar="DIR",
        help="a model's folder, or one of several",
    )
    add("--tasks", nargs="+", metavar="TASK", help="default: every task that has predictions")
    add("--out", type=Path, required=True, metavar="DIR")
    add("--scoring", choices=["fixed", "original"], default="fixed")
    options = parser.parse_args(arguments)
    original = options.scoring == "original"
    return guarded(
        lambda: score(options.data, options.predictions, options.tasks, options.out, original)
    )


if __name__ == "__main__":
    sys.exit(main())
