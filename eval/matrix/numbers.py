"""The numbers of a matrix as tables. Every format prints the same digits."""

from eval.paired import OVERALL
from eval.tables import Table

COMPARED = "n better worse difference low high p p_holm carried".split()


def share(value: float) -> str:
    return f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.4f}" if round(value, 4) else f"{0:.4f}"


def p_value(p: float) -> str:
    return f"{p:.3g}"


def cells(results: dict) -> Table:
    """Every cell, a line each."""
    header = "task row mask_in_training mask_in_inference n runs score low high".split()
    mask_of = {row["name"]: row["mask"] for row in results["rows"]}
    rows = []
    for cell in results["cells"]:
        names = [cell["task"], cell["row"], mask_of[cell["row"]], cell["mask"]]
        counts = [str(cell["n"]), str(cell["runs"])]
        rows.append([*names, *counts, *(share(cell[key]) for key in ("score", "low", "high"))])
    return Table("All cells", header, rows, labels=4)


def comparisons(results: dict) -> Table:
    """Every comparison, a line each."""
    header = "task comparison row mask_in_inference against_row against_mask".split() + COMPARED
    keys = "task kind row mask against_row against_mask".split()
    rows = [[one[key] for key in keys] + _compared(one) for one in results["comparisons"]]
    return Table("All comparisons", header, rows, labels=6)


def comparisons_of(results: dict, task: str) -> Table:
    """The comparisons of one task, with the cell compared with as ROW / MASK."""
    header = ["comparison", "row", "mask_in_inference", "against", *COMPARED]
    rows = []
    for one in results["comparisons"]:
        if one["task"] == task:
            against = f"{one['against_row']} / {one['against_mask']}"
            rows.append([one["kind"], one["row"], one["mask"], against, *_compared(one)])
    return Table(f"Comparisons: {task}", header, rows, labels=4)


def _compared(comparison: dict) -> list[str]:
    counts = [str(comparison[key]) for key in ("n", "better", "worse")]
    points = [signed(comparison[key]) for key in ("difference", "low", "high")]
    p_values = [p_value(comparison[key]) for key in ("p", "p_holm")]
    return [*counts, *points, *p_values, "yes" if comparison["carried"] else "no"]


def cells_of(results: dict, task: str) -> dict[tuple[str, str], dict]:
    """{(row, mask in inference): cell} of one task."""
    return {(cell["row"], cell["mask"]): cell for cell in results["cells"] if cell["task"] == task}


def grid(results: dict, task: str) -> Table:
    """The matrix of one task: rows are masks in training, columns masks in inference.

    The mask of training is bold.
    """
    of_task = cells_of(results, task)
    rows, bold = [], set()
    for i, row in enumerate(results["rows"]):
        texts = [label(row)]
        for j, mask in enumerate(results["masks"], start=1):
            cell = of_task[row["name"], mask]
            texts.append(f"{share(cell['score'])} [{share(cell['low'])}, {share(cell['high'])}]")
            if mask == row["mask"]:
                bold.add((i, j))
        rows.append(texts)
    n = results["cells"][0]["n"] if task == OVERALL else results["tasks"][task]
    runs = max(len(row["runs"]) for row in results["rows"])
    title = f"{task}: {n} questions" + (f", {runs} runs a row" if runs > 1 else "")
    return Table(title, ["mask in training", *results["masks"]], rows, bold=bold)


def label(row: dict) -> str:
    """What a row is called: its mask, or its own name with the mask."""
    if row["name"] == "base":
        return f"base, not fine-tuned ({row['mask']})"
    return row["mask"] if row["name"] == row["mask"] else f"{row['name']} ({row['mask']})"


def files(results: dict) -> dict[str, str]:
    """{file name: content} in every format: the matrix and the comparisons, overall and by task."""
    names = [OVERALL, *results["tasks"]]
    every = [grid(results, name) for name in names]
    every += [comparisons_of(results, name) for name in names]
    head = (
        f"# {results['title']}\n\n`{results['made']['command']}`\n\n"
        "Bold: the mask of training in inference. Intervals are 95 %.\n\n"
    )
    packages = "% \\usepackage{longtable,booktabs}\n"
    return {
        "cells.csv": cells(results).as_csv(),
        "comparisons.csv": comparisons(results).as_csv(),
        "results.md": head + "\n".join(table.as_markdown() for table in every),
        "results.tex": packages + "\n".join(table.as_latex() for table in every),
    }
