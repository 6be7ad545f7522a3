"""What the runs of a matrix measured while they trained: exact answers and loss against steps.

A training recipe with `eval_strategy: steps` and `eval_dataset_name` answers held-out questions
every `eval_steps` under the mask in training; the loss is that of training. `curves.json` keeps
what each run's trainer_state.json says:

    {run: {"exact": [[step, share], ..], "loss": [[step, nats a token], ..]}}

and from it are computed, for every row of the matrix, the mean and the range of its runs at each
step and, of the exact answers,

    area   the mean height of the curve from its first point to its last (trapezoidal rule)
    half   the steps until half of the questions are answered rightly, on the line between the
           points before and behind; None where a run does not get there

Intervals are Student's over runs. Of digits each seed draws training rows and questions of its own,
the same under every mask; rows of files are the same for all.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from scipy import stats

from eval.intervals import CONFIDENCE
from eval.matrix import charts
from eval.matrix.analysis import CAUSAL, MatrixRow
from eval.matrix.runs import MatrixRun
from fmtrain.command_line import write_whole
from fmtrain.training.checkpoints import STATE

NAME = "curves.json"
LOGGED = {"exact": "eval_exact_match", "loss": "loss"}  # what a trainer's log calls them
TITLES = {"exact": "exact answers, percent", "loss": "training loss, nats a token"}
HALF = 0.5

Raw = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]  # {run: {kind: [[step, value], ..]}}


def of_runs(plan: Iterable[MatrixRun]) -> Raw:
    """What the runs of a matrix measured; those that answered nothing while training are left
    out."""
    curves = {}
    for run in plan:
        path = run.folder / STATE
        if run.recipe is None or not path.is_file():
            continue
        log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        of_run = {}
        for kind, key in LOGGED.items():
            of_run[kind] = [[entry["step"], entry[key]] for entry in log if key in entry]
        if of_run["exact"]:
            curves[run.name] = of_run
    return curves


def read(folder: Path) -> Raw:
    """The file of a matrix's folder; empty where it has none. Raises `ValueError` if torn."""
    path = folder / NAME
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def area(steps: Sequence[float], values: Sequence[float]) -> float:
    """The mean height of a curve; of one point its own."""
    if len(steps) == 1:
        return float(values[0])
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def half(steps: Sequence[float], values: Sequence[float]) -> float | None:
    """The first step at which a curve is at `HALF`."""
    if values[0] >= HALF:
        return float(steps[0])
    for k in range(1, len(steps)):
        if values[k] >= HALF:
            part = (HALF - values[k - 1]) / (values[k] - values[k - 1])
            return float(steps[k - 1] + part * (steps[k] - steps[k - 1]))
    return None


def write(folder: Path, raw: Raw) -> None:
    """Write the file, where there is anything to keep."""
    if raw:
        write_whole(folder / NAME, json.dumps(raw))


def results(rows: Sequence[MatrixRow], raw: Raw) -> dict:
    """{"curves": {kind: a line for each row of the matrix that has curves}}; empty without any.

    Raises `ValueError` where the runs of a row were not all measured at the same steps.
    """
    measured = [row for row in rows if any(run in raw for run in row.runs)]
    lines = {kind: [_line(row, kind, raw) for row in measured] for kind in LOGGED}
    for line in lines["exact"]:
        line |= _areas(line, _of_causal(lines["exact"]))
    return {"curves": lines} if measured else {}


def _line(row: MatrixRow, kind: str, raw: Raw) -> dict:
    """The values of a row's runs [S, points], their mean and their range."""
    lacking = [run for run in row.runs if run not in raw]
    if lacking:
        raise ValueError(f"row {row.name!r}: {lacking[0]} answered nothing while it trained")
    steps = [[step for step, _ in raw[run][kind]] for run in row.runs]
    for run, of_run in zip(row.runs, steps):
        if of_run != steps[0]:
            raise ValueError(
                f"row {row.name!r}: {run} was measured at steps {of_run}, "
                f"{row.runs[0]} at {steps[0]}"
            )
    values_SP = np.array([[value for _, value in raw[run][kind]] for run in row.runs])
    return {
        "row": row.name,
        "mask": row.mask,
        "steps": steps[0],
        "by_run": values_SP.tolist(),
        "mean": values_SP.mean(0).tolist(),
        "low": values_SP.min(0).tolist(),
        "high": values_SP.max(0).tolist(),
    }


def _areas(line: dict, reference: dict | None) -> dict:
    """Area and steps to half of each run, and by how much the area is more than that of causal
    training with the same seed."""
    areas = [area(line["steps"], values) for values in line["by_run"]]
    more = None
    if reference not in (None, line) and reference["steps"] == line["steps"]:
        causal = [area(line["steps"], values) for values in reference["by_run"]]
        if len(causal) == len(areas):
            more = _student(np.subtract(areas, causal))
    return {
        "area": _student(areas),
        "half": [half(line["steps"], values) for values in line["by_run"]],
        "more_area": more,
    }


def _student(values: Sequence[float]) -> dict:
    """Mean of some runs with its interval and p of zero; of one run there is neither."""
    values_S, count = np.asarray(values, np.float64), len(values)
    found = {"value": float(values_S.mean()), "by_run": values_S.tolist()}
    if count > 1:
        error = values_S.std(ddof=1) / count**0.5
        low, high = stats.t.interval(CONFIDENCE, count - 1, values_S.mean(), max(error, 1e-12))
        p = 2 * stats.t.sf(abs(values_S.mean()) / max(error, 1e-12), count - 1)
        found |= {"low": float(low), "high": float(high), "p": float(p)}
    return found


def shown(curves: dict | None) -> dict | None:
    """What the page shows: charts of each kind, and a table."""
    return curves and {"panels": [_panel(*one) for one in curves.items()], "table": table(curves)}


def _panel(kind: str, lines: Sequence[dict]) -> dict:
    """The title of a kind, and a chart for each row beside causal training, if there is any."""
    causal, figures = _of_causal(lines), []
    top = 1.0 if kind == "exact" else max(max(line["high"]) for line in lines)
    for line in lines:
        if line is causal and len(lines) > 1:
            continue
        series = {"trained": line}
        if causal not in (None, line):
            series = {"reference": causal, "trained": line}
        title, scale = f"{line['row']}: {TITLES[kind]}", 100 if kind == "exact" else 1
        chart = Markup(charts.curves(series, top, scale, title))
        figures.append({"name": line["row"], "chart": chart})
    return {"title": TITLES[kind], "figures": figures}


def _of_causal(lines: Sequence[dict]) -> dict | None:
    return next((line for line in lines if line["mask"] == CAUSAL), None)


def table(curves: dict) -> list[list[str]]:
    """A line for each row: its name, area, how much more than causal, steps to half by run."""
    rows = []
    for line in curves["exact"]:
        steps = ["never" if step is None else f"{step:.0f}" for step in line["half"]]
        more = _percent(line["more_area"], "+.1f") if line["more_area"] else "–"
        rows.append([line["row"], _percent(line["area"], ".1f"), more, " ".join(steps)])
    return rows


def _percent(mean: dict, form: str) -> str:
    """A mean and its interval, if it has one."""
    values = [mean["value"], *(mean[key] for key in ("low", "high") if key in mean)]
    texts = [format(100 * value, form).replace("-", "\N{MINUS SIGN}") for value in values]
    return texts[0] if len(texts) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"
