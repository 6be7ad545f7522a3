"""The documents as texts, their tables, and what the matrices of `eval/results` found."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
RESULTS = ROOT / "eval" / "results"


def table(text: str, first_header: str) -> list[list[str]]:
    """The body of the Markdown table whose first column is headed so, cell by cell."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {first_header} |"):
            next(lines)
            break
    else:
        raise AssertionError(f"no table with a first column {first_header!r}")
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def rounded(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def shows(figure: str, value: float) -> bool:
    """Whether a figure is the value, rounded to the figure's digits; of a half to either side."""
    digits = len(figure.partition(".")[2])
    return abs(float(figure) - value) <= 0.5 * 10**-digits + 1e-9


def on_one_line(name: str) -> str:
    """A document on one line."""
    return " ".join(TEXTS[name].split())


def results_of(matrix: str) -> dict:
    """What a matrix found, as shipped."""
    return json.loads((RESULTS / matrix / "results.json").read_text(encoding="utf-8"))


def scores_of(matrix: str, task: str, count: int = 8 * 7) -> dict[tuple[str, str], float]:
    """Exact answers by (mask in training, mask in inference), as shipped: so many."""
    results = results_of(matrix)
    cells = [cell for cell in results["cells"] if cell["task"] == task]
    assert len(cells) == count
    return {(cell["row"], cell["mask"]): cell["score"] for cell in cells}


def seeds_of(matrix: str, task: str) -> dict[tuple[str, str], list[float]]:
    """The same of each run."""
    cells = [cell for cell in results_of(matrix)["cells"] if cell["task"] == task]
    return {(cell["row"], cell["mask"]): cell["by_run"] for cell in cells}


def comparisons_of(matrix: str, task: str) -> list[dict]:
    """With the cell that was trained and run causally."""
    results = results_of(matrix)
    kind = "causal-causal"
    return [x for x in results["comparisons"] if (x["kind"], x["task"]) == (kind, task)]


def signed(found: dict, mean: str = "value") -> str:
    """A difference of shares in points, with its interval."""
    return "{:+.1f} [{:.1f}, {:.1f}]".format(*(100 * found[key] for key in (mean, "low", "high")))
