"""What the runs of a matrix measured while they trained: exact answers and losses against steps.

The loss is that of training; where every row is read once, it is that of rows not seen before. A
training recipe with `eval_strategy: steps` and `eval_dataset_name` also answers held-out questions
every `eval_steps` under the mask in training, and takes the log-probability of their reference
answers: the held-out loss is minus its mean over the tokens. `curves.json` keeps what each run's
trainer_state.json says:

    {run: {"exact": [[step, share], ..], "held_out": [[step, nats a token], ..], "loss": ..}}

and from it are computed, for every row of the matrix, the mean and the range of its runs at each
step, and

    area   the mean height of the curve from its first point to its last (trapezoidal rule)
    half   the steps until half of the questions are answered rightly, on the line between the
           points before and behind; None where a run does not get there

Intervals are Student's over runs. Of digits each seed draws training rows and questions of its own,
the same under every mask; rows of files are the same for all.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
HALF = 0.5


class Kind(NamedTuple):
    """What a curve is of."""

    logged: str  # what a trainer's log calls it
    title: str  # with its unit
    scale: int  # of the figures shown
    digits: int  # of them


KINDS = {
    "exact": Kind("eval_exact_match", "exact answers, percent", 100, 1),
    "held_out": Kind("eval_loss", "held-out loss, nats a token", 1, 3),
    "loss": Kind("loss", "training loss, nats a token", 1, 3),
}

# {run: {kind: [[step, value], ..]}}, without kinds of which a run measured nothing
Raw = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


def of_runs(plan: Iterable[MatrixRun]) -> Raw:
    """What the runs that a matrix trained measured."""
    curves = {}
    for run in plan:
        path = run.folder / STATE
        if run.recipe is None or not path.is_file():
            continue
        log, of_run = json.loads(path.read_text(encoding="utf-8"))["log_history"], {}
        for kind, (key, *_) in KINDS.items():
            points = [[entry["step"], entry[key]] for entry in log if key in entry]
            of_run |= {kind: points} if points else {}
        curves |= {run.name: of_run} if of_run else {}
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
    """{"curves": {kind: a line for each row of the matrix that measured it}}; empty without any.

    Raises `ValueError` where the runs of a row were not all measured at the same steps.
    """
    curves = {}
    for kind in KINDS:
        lines = [_line(row, kind, raw) for row in rows if _measured(row, kind, raw)]
        for line in lines:
            line["more_area"] = _more(line, _of_causal(lines))
        curves |= {kind: lines} if lines else {}
    return {"curves": curves} if curves else {}


def _measured(row: MatrixRow, kind: str, raw: Raw) -> bool:
    return any(kind in raw.get(run, {}) for run in row.runs)


def _of_causal(lines: Sequence[dict]) -> dict | None:
    return next((line for line in lines if line["mask"] == CAUSAL), None)


def _line(row: MatrixRow, kind: str, raw: Raw) -> dict:
    """The mean and the range of a row's runs, and the figures of each run."""
    for run in row.runs:
        if kind not in raw.get(run, {}):
            raise ValueError(f"row {row.name!r}: {run} has no curve of {KINDS[kind].title}")
    steps = [[step for step, _ in raw[run][kind]] for run in row.runs]
    for run, of_run in zip(row.runs, steps):
        if of_run != steps[0]:
            raise ValueError(
                f"row {row.name!r}: {run} was measured at steps {of_run}, "
                f"{row.runs[0]} at {steps[0]}"
            )
    by_run = [[value for _, value in raw[run][kind]] for run in row.runs]
    values_SP = np.array(by_run)
    line: dict = {
        "row": row.name,
        "mask": row.mask,
        "steps": steps[0],
        "mean": values_SP.mean(0).tolist(),
        "low": values_SP.min(0).tolist(),
        "high": values_SP.max(0).tolist(),
        "area": _student([area(steps[0], values) for values in by_run]),
    }
    if kind == "exact":
        line["half"] = [half(steps[0], values) for values in by_run]
    return line


def _more(line: dict, causal: dict | None) -> dict | None:
    """By how much the area is more than that of causal training with the same seeds."""
    if causal in (None, line) or causal["steps"] != line["steps"]:
        return None
    areas, others = line["area"]["by_run"], causal["area"]["by_run"]
    return _student(np.subtract(areas, others)) if len(areas) == len(others) else None


def _student(values: Sequence[float]) -> dict:
    """Mean of some runs with its interval and p of zero; of one run there is neither."""
    values_S, count = np.asarray(values, np.float64), len(values)
    found = {"value": float(values_S.mean()), "by_run": values_S.tolist()}
    if count > 1:
        error = max(values_S.std(ddof=1) / count**0.5, 1e-12)  # runs may be alike
        low, high = stats.t.interval(CONFIDENCE, count - 1, values_S.mean(), error)
        p = 2 * stats.t.sf(abs(values_S.mean()) / error, count - 1)
        found |= {"low": float(low), "high": float(high), "p": float(p)}
    return found


def shown(curves: dict | None) -> dict | None:
    """What the page shows: charts of each kind, and a table."""
    return curves and {"panels": [_panel(*one) for one in curves.items()], "table": table(curves)}


def _panel(kind: str, lines: Sequence[dict]) -> dict:
    """The title of a kind, and a chart for each row beside causal training, if there is any.

    A loss is drawn from its second point on: in the first the form of an answer is learnt, which
    would leave no height for the rest.
    """
    if kind != "exact":
        lines = [_without_first(line) for line in lines]
    causal, figures = _of_causal(lines), []
    top = 1.0 if kind == "exact" else max(max(line["high"]) for line in lines)
    for line in lines:
        if line is causal and len(lines) > 1:
            continue
        series = {"trained": line}
        if causal not in (None, line):
            series = {"reference": causal, "trained": line}
        title = f"{line['row']}: {KINDS[kind].title}"
        chart = Markup(charts.curves(series, top, KINDS[kind].scale, title))
        figures.append({"name": line["row"], "chart": chart})
    return {"title": KINDS[kind].title, "figures": figures}


def _without_first(line: dict) -> dict:
    first = 1 if len(line["steps"]) > 2 else 0
    return line | {key: line[key][first:] for key in ("steps", "mean", "low", "high")}


def table(curves: dict) -> list[list[str]]:
    """A line for each kind and row: area, how much more than causal, steps to half by run."""
    rows = []
    for kind, lines in curves.items():
        for line in lines:
            more = _told(line["more_area"], kind, "+") if line["more_area"] else "–"
            steps = ["never" if step is None else f"{step:.0f}" for step in line.get("half", [])]
            height, name = _told(line["area"], kind), KINDS[kind].title.partition(",")[0]
            rows.append([name, line["row"], height, more, " ".join(steps) or "–"])
    return rows


def _told(mean: dict, kind: str, sign: str = "") -> str:
    """A mean and its interval, if it has one."""
    digits, texts = KINDS[kind].digits, []
    for key in ("value", "low", "high"):
        if key in mean:
            figure = round(KINDS[kind].scale * mean[key], digits) + 0.0  # no -0
            texts.append(f"{figure:{sign}.{digits}f}".replace("-", "\N{MINUS SIGN}"))
    return texts[0] if len(texts) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"
