"""A matrix in Weights & Biases: tables, heat maps, and sample answers with their pictures."""

import base64
import io
import os
from pathlib import Path

from PIL import Image

from eval.matrix import numbers
from fmtrain.training.tracking import wandb_mode


def figure(results: dict, task: str):
    """A heat map as a matplotlib figure."""
    from matplotlib.figure import Figure

    cells, values = numbers.cells_of(results, task), []
    rows, masks = results["rows"], results["masks"]
    for row in rows:
        values.append([100 * cells[row["name"], mask]["score"] for mask in masks])
    size = (2.2 + 0.9 * len(masks), 1.4 + 0.45 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(masks)), masks, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [numbers.label(row) for row in rows])
    axes.set(
        xlabel="mask in inference",
        ylabel="mask in training",
        title=f"{task}, percent right, n {numbers.questions(results, task)}",
    )
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            colour = "black" if value > middle else "white"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour)
    return figure


def log(results: dict, out: Path) -> None:
    """One W&B run with everything; offline where there is no key, and never a prompt."""
    import wandb

    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", "fmtrain"),
        job_type="matrix",
        name=results["title"],
        mode=wandb_mode(),
        config=results["made"],
    ) as run:
        logged = {name: _table(results[name], wandb) for name in ("cells", "comparisons")}
        for task in numbers.names(results):
            file = io.BytesIO()
            figure(results, task).savefig(file, format="png", dpi=140)
            logged[f"heat_map/{task}"] = wandb.Image(Image.open(file))
        logged["samples"] = _samples(results, wandb)
        headline = results["headline"]
        for (row, mask), cell in numbers.cells_of(results, headline).items():
            run.summary[f"{headline}/{row}/{mask}"] = cell["score"]
        logged["report"] = wandb.Html((out / "report.html").read_text(), inject=False)
        run.log(logged)


def _table(entries: list[dict], wandb):
    """The cells or the comparisons with all their keys; numbers are numbers."""
    rows = []
    for entry in entries:
        by_run = " ".join(map(numbers.share, entry["by_run"]))
        rows.append(list((entry | {"by_run": by_run}).values()))
    return wandb.Table(columns=list(entries[0]), data=rows)


def _samples(results: dict, wandb):
    """A line a question: pictures, question, reference, and the answer of every cell."""
    cells = list(numbers.cells_of(results, results["headline"]))
    columns = ["task", "id", "pictures", "question", "reference"]
    table = wandb.Table(columns=[*columns, *(f"{row} / {mask}" for row, mask in cells)])
    for sample in results["samples"]:
        pictures = []
        for uri in sample["images"]:
            png = base64.b64decode(uri.partition(",")[2])
            pictures.append(wandb.Image(Image.open(io.BytesIO(png))))
        texts = [sample["question"], sample["reference"]]
        answers = [sample["answers"][row][mask]["text"] for row, mask in cells]
        table.add_data(sample["task"], sample["id"], pictures, *texts, *answers)
    return table
