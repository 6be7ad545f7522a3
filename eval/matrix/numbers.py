"""The numbers of a matrix as tables. Every format prints the same digits."""

from eval.matrix.findings import findings
from eval.paired import OVERALL
from eval.tables import Table

COMPARED = "n better worse difference low high p p_holm carried by_run".split()
SMALLEST = 1e-6  # a p-value below it is not told apart from others


def share(value: float) -> str:
    return f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.4f}" if round(value, 4) else f"{0:.4f}"


def p_value(p: float) -> str:
    return f"{p:.3g}" if p >= SMALLEST else "< 1e-6"


def runs(values: list[float], form=share) -> str:
    """The value of each run."""
    return " ".join(map(form, values))


def names(results: dict) -> list[str]:
    """What there are cells of: the headline, and the tasks where there are several."""
    return list(dict.fromkeys([results["headline"], *results["tasks"]]))


def of_what(name: str) -> str:
    return "mean of the tasks" if name == OVERALL else f"task {name}"


def questions(results: dict, name: str) -> int:
    return sum(results["tasks"].values()) if name == OVERALL else results["tasks"][name]


def chance(results: dict, name: str) -> float | None:
    """The share that is right by chance, where it is known."""
    tasks = results["tasks"] if name == OVERALL else [name]
    known = [results["chance"][task] for task in tasks if task in results["chance"]]
    return sum(known) / len(known) if len(known) == len(tasks) else None


def cells(results: dict) -> Table:
    """Every cell, a line each."""
    header = "task row mask_in_training mask_in_inference n runs score low high by_run".split()
    mask_of = {row["name"]: row["mask"] for row in results["rows"]}
    rows = []
    for cell in results["cells"]:
        names = [cell["task"], cell["row"], mask_of[cell["row"]], cell["mask"]]
        counts = [str(cell["n"]), str(cell["runs"])]
        scores = [share(cell[key]) for key in ("score", "low", "high")]
        rows.append([*names, *counts, *scores, runs(cell["by_run"])])
    return Table("All cells", header, rows, labels=4)


def comparisons(results: dict) -> Table:
    """Every comparison, a line each."""
    names = "task family comparison row mask_in_inference against_row against_mask".split()
    keys = "task family kind row mask against_row against_mask".split()
    rows = [[one[key] for key in keys] + _compared(one) for one in results["comparisons"]]
    return Table("All comparisons", names + COMPARED, rows, labels=7)


def comparisons_of(results: dict, task: str) -> Table:
    """The comparisons of one task, with the cell compared with as ROW / MASK."""
    header = ["row", "mask_in_inference", "comparison", "against", "family", *COMPARED]
    rows = []
    for one in results["comparisons"]:
        if one["task"] == task:
            against = f"{one['against_row']} / {one['against_mask']}"
            cell = [one["row"], one["mask"], one["kind"], against, one["family"]]
            rows.append([*cell, *_compared(one)])
    return Table(f"Comparisons: {task}", header, rows, labels=5)


def _compared(comparison: dict) -> list[str]:
    counts = [str(comparison[key]) for key in ("n", "better", "worse")]
    points = [signed(comparison[key]) for key in ("difference", "low", "high")]
    p_values = [p_value(comparison[key]) for key in ("p", "p_holm")]
    carried, by_run = "yes" if comparison["carried"] else "no", comparison["by_run"]
    return [*counts, *points, *p_values, carried, runs(by_run, signed)]


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
    seeds = max(len(row["runs"]) for row in results["rows"])
    title = f"{task}: {questions(results, task)} questions"
    title += f", {seeds} runs a row" if seeds > 1 else ""
    return Table(title, ["mask in training", *results["masks"]], rows, bold=bold)


def label(row: dict) -> str:
    """What a row is called: its mask, or its own name with the mask."""
    if row["name"] == "base":
        return f"base, not fine-tuned ({row['mask']})"
    return row["mask"] if row["name"] == row["mask"] else f"{row['name']} ({row['mask']})"


def files(results: dict) -> dict[str, str]:
    """{file name: content} in every format: the matrix and the comparisons, overall and by task."""
    every = [grid(results, name) for name in names(results)]
    every += [comparisons_of(results, name) for name in names(results)]
    head = (
        f"# {results['title']}\n\n{' '.join(findings(results))}\n\n"
        f"`{results['made']['command']}`\n\n"
        "Bold: the mask of training in inference. Intervals are 95 %; `by_run` holds the value of "
        "each training run.\n\n"
    )
    packages = "% \\usepackage{longtable,booktabs}\n"
    return {
        "cells.csv": cells(results).as_csv(),
        "comparisons.csv": comparisons(results).as_csv(),
        "results.md": head + "\n".join(table.as_markdown() for table in every),
        "results.tex": packages + "\n".join(table.as_latex() for table in every),
    }
