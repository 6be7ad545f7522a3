"""The numbers of a matrix as tables, and tables as CSV, Markdown and LaTeX. Every format prints the same digits."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.paired import OVERALL

COMPARED = "n better worse difference low high p p_holm carried".split()
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: "\\" + c for c in "&%$#_{}"
}


@dataclass(frozen=True)
class Table:
    """A table of text; its first `labels` columns are names, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    labels: int = 1
    bold: set[tuple[int, int]] = field(default_factory=set)  # (row, column)


def share(value: float) -> str:
    return f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.4f}" if round(value, 4) else f"{0:.4f}"


def p_value(p: float) -> str:
    return f"{p:.3g}"


def cells(results: dict) -> Table:
    """Every cell, a line each."""
    header = [
        "task",
        "row",
        "mask_in_training",
        "mask_in_inference",
        "n",
        "runs",
        "score",
        "low",
        "high",
    ]
    mask = {row["name"]: row["mask"] for row in results["rows"]}
    rows = [
        [
            cell["task"],
            cell["row"],
            mask[cell["row"]],
            cell["mask"],
            str(cell["n"]),
            str(cell["runs"]),
        ]
        + [share(cell[key]) for key in ("score", "low", "high")]
        for cell in results["cells"]
    ]
    return Table("All cells", header, rows, labels=4)


def comparisons(results: dict) -> Table:
    """Every comparison, a line each."""
    header = "task comparison row mask_in_inference against_row against_mask".split() + COMPARED
    rows = [
        [one[key] for key in ("task", "kind", "row", "mask", "against_row", "against_mask")]
        + _compared(one)
        for one in results["comparisons"]
    ]
    return Table("All comparisons", header, rows, labels=6)


def comparisons_of(results: dict, task: str) -> Table:
    """The comparisons of one task, with the cell compared with as ROW / MASK."""
    rows = [
        [
            one["kind"],
            one["row"],
            one["mask"],
            f"{one['against_row']} / {one['against_mask']}",
            *_compared(one),
        ]
        for one in results["comparisons"]
        if one["task"] == task
    ]
    return Table(
        f"Comparisons: {task}",
        ["comparison", "row", "mask_in_inference", "against", *COMPARED],
        rows,
        labels=4,
    )


def _compared(one: dict) -> list[str]:
    counts, points = (
        [str(one[key]) for key in ("n", "better", "worse")],
        [signed(one[key]) for key in ("difference", "low", "high")],
    )
    return [
        *counts,
        *points,
        p_value(one["p"]),
        p_value(one["p_holm"]),
        "yes" if one["carried"] else "no",
    ]


def grid(results: dict, task: str) -> Table:
    """The matrix of one task: rows are masks in training, columns masks in inference; the mask of training is bold."""
    found = {(cell["row"], cell["mask"]): cell for cell in results["cells"] if cell["task"] == task}
    rows, bold = [], set()
    for k, row in enumerate(results["rows"]):
        line = [found[row["name"], mask] for mask in results["masks"]]
        bold |= {(k, 1 + j) for j, mask in enumerate(results["masks"]) if mask == row["mask"]}
        rows.append(
            [
                label(row),
                *(
                    f"{share(cell['score'])} [{share(cell['low'])}, {share(cell['high'])}]"
                    for cell in line
                ),
            ]
        )
    n, runs = (
        results["cells"][0]["n"] if task == OVERALL else results["tasks"][task],
        max(len(row["runs"]) for row in results["rows"]),
    )
    title = f"{task}: {n} questions" + (f", {runs} runs a row" if runs > 1 else "")
    return Table(title, ["mask in training", *results["masks"]], rows, bold=bold)


def label(row: dict) -> str:
    """What a row is called: its mask, or its own name with the mask."""
    if row["name"] == "base":
        return f"base, not fine-tuned ({row['mask']})"
    return row["mask"] if row["name"] == row["mask"] else f"{row['name']} ({row['mask']})"


def as_csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([table.header, *table.rows])
    return file.getvalue()


def as_markdown(table: Table) -> str:
    def line(texts: Sequence[str]) -> str:
        return (
            "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"
        )

    marked = [
        [f"**{text}**" if (i, j) in table.bold else text for j, text in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    rule = "|" + "---|" * table.labels + "---:|" * (len(table.header) - table.labels)
    return "\n".join([f"### {table.title}", "", line(table.header), rule, *map(line, marked), ""])


def as_latex(table: Table) -> str:
    """A longtable (packages longtable, booktabs)."""

    def line(texts: Sequence[str], i: int = -1) -> str:
        shown = ["".join(LATEX.get(character, character) for character in text) for text in texts]
        return (
            " & ".join(
                rf"\textbf{{{text}}}" if (i, j) in table.bold else text
                for j, text in enumerate(shown)
            )
            + r" \\"
        )

    columns = "l" * table.labels + "r" * (len(table.header) - table.labels)
    title = "".join(LATEX.get(character, character) for character in table.title)
    head = [
        rf"\begin{{longtable}}{{{columns}}}",
        rf"\caption{{{title}}} \\",
        r"\toprule",
        line(table.header),
        r"\midrule",
        r"\endhead",
    ]
    return "\n".join(
        [
            *head,
            *(line(row, i) for i, row in enumerate(table.rows)),
            r"\bottomrule",
            r"\end{longtable}",
            "",
        ]
    )


def every(results: dict) -> list[Table]:
    """The tables of a document: the matrix overall and of each task, then the comparisons."""
    names = [OVERALL, *results["tasks"]]
    return [
        *(grid(results, name) for name in names),
        *(comparisons_of(results, name) for name in names),
    ]


def files(results: dict) -> dict[str, str]:
    """{file name: content} in every format."""
    head = f"# {results['title']}\n\n`{results['made']['command']}`\n\nBold: the mask of training in inference. Intervals are 95 %.\n\n"
    return {
        "cells.csv": as_csv(cells(results)),
        "comparisons.csv": as_csv(comparisons(results)),
        "results.md": head + "\n".join(map(as_markdown, every(results))),
        "results.tex": "% \\usepackage{longtable,booktabs}\n"
        + "\n".join(map(as_latex, every(results))),
    }
