"""A matrix in Weights & Biases: the tables, the heat maps and the sample answers with their pictures."""

import base64
import io
import os
from pathlib import Path

from PIL import Image

from eval.matrix import tables
from eval.paired import OVERALL


def figure(results: dict, task: str):
    """A heat map as a matplotlib figure."""
    from matplotlib.figure import Figure

    found = {
        (cell["row"], cell["mask"]): cell["score"]
        for cell in results["cells"]
        if cell["task"] == task
    }
    names, masks = [row["name"] for row in results["rows"]], results["masks"]
    values = [[100 * found[name, mask] for mask in masks] for name in names]
    drawn = Figure(figsize=(2.2 + 0.9 * len(masks), 1.4 + 0.45 * len(names)), layout="constrained")
    axes = drawn.subplots()
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(masks)), masks, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), [tables.label(row) for row in results["rows"]])
    axes.set(
        xlabel="mask in inference",
        ylabel="mask in training",
        title=f"{task}, percent right, n {_questions(results, task)}",
    )
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            axes.text(
                j,
                i,
                f"{value:.1f}",
                ha="center",
                va="center",
                color="black" if value > middle else "white",
            )
    return drawn


def _questions(results: dict, task: str) -> int:
    return sum(results["tasks"].values()) if task == OVERALL else results["tasks"][task]


def log(results: dict, out: Path) -> None:
    """One W&B run with everything; offline where there is no key, and never a prompt."""
    import wandb

    key = os.environ.get("WANDB_API_KEY") or any(
        (Path.home() / name).exists() for name in (".netrc", "_netrc")
    )
    mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
    project = os.environ.get("WANDB_PROJECT", "fmtrain")
    with wandb.init(
        project=project, job_type="matrix", name=results["title"], mode=mode, config=results["made"]
    ) as run:
        logged = {}
        for table in (tables.cells(results), tables.comparisons(results)):
            typed = [
                [_typed(text, k >= table.labels) for k, text in enumerate(row)]
                for row in table.rows
            ]
            logged["cells" if "mask_in_training" in table.header else "comparisons"] = wandb.Table(
                columns=table.header, data=typed
            )
        for task in (OVERALL, *results["tasks"]):
            file = io.BytesIO()
            figure(results, task).savefig(file, format="png", dpi=140)
            logged[f"heat_map/{task}"] = wandb.Image(Image.open(file))
        logged["samples"] = _samples(results, wandb)
        for cell in results["cells"]:
            if cell["task"] == OVERALL:
                run.summary[f"overall/{cell['row']}/{cell['mask']}"] = cell["score"]
        logged["report"] = wandb.Html((out / "report.html").read_text(), inject=False)
        run.log(logged)


def _typed(text: str, number: bool) -> str | float:
    return text if not number or text in ("yes", "no") else float(text)


def _samples(results: dict, wandb):
    """A line a question: pictures, question, reference, and the answer of every cell."""
    names = [row["name"] for row in results["rows"]]
    columns = [
        "task",
        "id",
        "pictures",
        "question",
        "reference",
        *(f"{name} / {mask}" for name in names for mask in results["masks"]),
    ]
    table = wandb.Table(columns=columns)
    for sample in results["samples"]:
        pictures = [
            wandb.Image(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
            for uri in sample["images"]
        ]
        answers = [
            sample["answers"][name][mask]["text"] for name in names for mask in results["masks"]
        ]
        table.add_data(
            sample["task"],
            sample["id"],
            pictures,
            sample["question"],
            sample["reference"],
            *answers,
        )
    return table
