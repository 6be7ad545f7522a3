"""The report of a matrix: one self-contained HTML page, and its numbers as CSV, Markdown and LaTeX.

    python -m eval.matrix.report DIR/results.json [--out DIR] [--published TABLE=FILE.csv ..]

Nothing in the page comes from elsewhere, and no script runs in it; what models answered is
untrusted text.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.matrix import charts, numbers, published
from eval.matrix.analysis import CAUSAL
from eval.paired import OVERALL
from fmtrain.command_line import Parser, guarded, write_whole
from fmtrain.masks import Mask
from fmtrain.preview.drawing import in_words

TEMPLATE = "report.html"
KINDS = {
    "causal-causal": "against causal-causal",
    "diagonal": "against the diagonal",
    "inference-only": "training against inference only",
}


def comparisons_of(results: dict, task: str) -> dict[tuple[str, str, str], dict]:
    """{(kind, row, mask in inference): comparison} of one task."""
    comparisons = [one for one in results["comparisons"] if one["task"] == task]
    return {(one["kind"], one["row"], one["mask"]): one for one in comparisons}


def heat_map(results: dict, task: str) -> dict:
    """A task's matrix as rows of coloured cells, with their range.

    Beside them are the differences from causal-causal.
    """
    cells, comparisons = numbers.cells_of(results, task), comparisons_of(results, task)
    scores = [cell["score"] for cell in cells.values()]
    low, high = min(scores), max(scores)
    against = {}
    for (kind, row, mask), comparison in comparisons.items():
        if kind == "causal-causal":
            against[row, mask] = comparison
    most = max((abs(one["difference"]) for one in against.values()), default=0.0) or 1.0
    rows = []
    for row in results["rows"]:
        line, changes = [], []
        for mask in results["masks"]:
            pair, own = (row["name"], mask), {"own": mask == row["mask"]}
            line.append(_cell(cells[pair], low, high) | own)
            changes.append(_change(against.get(pair), most) | own)
        n, runs = cells[row["name"], results["masks"][0]]["n"], len(row["runs"])
        rows.append(
            {
                "name": row["name"],
                "label": numbers.label(row),
                "n": f"{n} × {runs}" if runs > 1 else str(n),
                "cells": line,
                "changes": changes,
            }
        )
    return {
        "task": task,
        "rows": rows,
        "ends": [f"{100 * value:.1f}" for value in (low, high)],
        "styles": [charts.heat(k / 8) for k in range(9)],
        "compared": bool(against),
    }


def _cell(cell: dict, low: float, high: float) -> dict:
    interval = f"[{cell['low']:.4f}, {cell['high']:.4f}]"
    return {
        "text": f"{100 * cell['score']:.1f}",
        "style": charts.heat((cell["score"] - low) / (high - low) if high > low else 0.5),
        "carried": False,
        "tip": f"{cell['score']:.4f} {interval}, n {cell['n']}, runs {cell['runs']}",
    }


def _change(comparison: dict | None, most: float) -> dict:
    if comparison is None:
        return {
            "text": "0",
            "style": charts.change(0.0),
            "carried": False,
            "tip": "causal-causal itself",
        }
    points = [numbers.signed(comparison[key]) for key in ("difference", "low", "high")]
    p = numbers.p_value(comparison["p_holm"])
    return {
        "text": _points(comparison["difference"]),
        "style": charts.change(comparison["difference"] / most),
        "carried": comparison["carried"],
        "tip": f"{points[0]} [{points[1]}, {points[2]}], corrected p {p}",
    }


def _points(difference: float) -> str:
    """Percentage points with a sign."""
    if not round(difference, 3):
        return "0"
    return f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")


def glance(results: dict) -> list[dict]:
    """For each mask of training: what it brings switched on, what trained with.

    And what training so costs where the mask in inference is causal.
    """
    comparisons, base, lines = comparisons_of(results, OVERALL), results["reference"], []
    for row in results["rows"]:
        mask = row["mask"]
        if base is None or mask == CAUSAL or mask not in results["masks"]:
            continue
        keys = {
            "switched": ("causal-causal", base[0], mask),
            "trained": ("causal-causal", row["name"], mask),
            "training": ("inference-only", row["name"], mask),
            "mismatch": ("diagonal", row["name"], CAUSAL),
        }
        line = {"label": numbers.label(row)}
        for name, key in keys.items():
            line[name] = _summary(comparisons[key]) if key in comparisons else None
        lines.append(line)
    return lines


def _summary(comparison: dict) -> dict:
    points = [_points(comparison[key]) for key in ("difference", "low", "high")]
    return {
        "text": points[0],
        "interval": f"{points[1]} .. {points[2]}",
        "p": numbers.p_value(comparison["p_holm"]),
        "carried": comparison["carried"],
    }


def bar_chart(results: dict, task: str) -> Markup:
    """Per mask: switched on in the base and after causal training, and trained with it."""
    cells, base, groups = numbers.cells_of(results, task), results["reference"], []
    for mask in results["masks"]:
        series = {"base": cells["base", mask]} if ("base", mask) in cells else {}
        if base and base[0] != "base" and mask != CAUSAL:
            series["inference-only"] = cells[base[0], mask]
        for row in results["rows"]:
            if row["mask"] == mask and row["name"] != "base":
                series["trained"] = cells[row["name"], mask]
                break
        if series:
            groups.append((mask, series))
    line = cells[tuple(base)]["score"] if base else None
    return Markup(charts.bars(groups, line, f"{task}: share of right answers under each mask"))


def _published(results: dict, files: Mapping[str, str]) -> list[dict]:
    """The published tables, each with the rows of the user's numbers."""
    own: dict[str, dict[str, float]] = {}
    for cell in results["cells"]:
        own.setdefault(f"{cell['row']} / {cell['mask']}", {})[cell["task"]] = cell["score"]
    tables = published.tables()
    known = [table.name for table in tables]
    for name in files:
        if name not in known:
            raise ValueError(f"unknown published table {name!r}; known are {', '.join(known)}")
    return [
        {"table": table, "yours": published.beside(table, own, files.get(table.name))}
        for table in tables
    ]


def _masks(results: dict) -> list[dict]:
    """Every mask of the matrix with its picture, and what its policy reveals in words."""
    names = [*results["masks"], *(row["mask"] for row in results["rows"])]
    pictures = []
    for name in dict.fromkeys(names):
        mask = Mask.parse(name)
        pictures.append(
            {
                "name": name,
                "picture": Markup(charts.mask_picture(name)),
                "words": in_words(mask),
                "light": mask.merge is not None,
            }
        )
    return pictures


def environment() -> Environment:
    """Templates with escaping on, and names that may break behind a `_` or a `+`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["wbr"] = lambda name: Markup("<wbr>").join(re.split(r"(?<=[_+])", name))
    return environment


def render(results: dict, files: Mapping[str, str] | None = None) -> str:
    """The page. files: {published table: CSV file of numbers to put beside it}."""
    names = [OVERALL, *results["tasks"]]
    overall = list(comparisons_of(results, OVERALL).values())
    kinds = [one["kind"] for one in overall]
    masks = _masks(results)
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            results=results,
            overall=OVERALL,
            heat_maps=[heat_map(results, name) for name in names],
            glance=glance(results),
            bars=[(name, bar_chart(results, name)) for name in names],
            series=charts.SERIES,
            masks=masks,
            light=any(mask["light"] for mask in masks),
            own={row["name"]: row["mask"] for row in results["rows"]},
            comparisons=[(name, numbers.comparisons_of(results, name)) for name in names],
            compared={kind: kinds.count(kind) for kind in KINDS},
            carried=sum(one["carried"] for one in overall),
            kinds=KINDS,
            cells=numbers.cells(results),
            published=_published(results, files or {}),
            runs=max(len(row["runs"]) for row in results["rows"]),
            questions=sum(results["tasks"].values()),
        )
    )


def write(out: Path, results: dict, files: Mapping[str, str] | None = None) -> None:
    """report.html, the tables and results.json in the folder `out`, each replaced whole."""
    page = render(results, files)
    write_whole(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
    for name, text in numbers.files(results).items():
        write_whole(out / name, text)
    write_whole(out / "report.html", page)


def render_again(options: argparse.Namespace) -> None:
    """Make page and tables from a results.json."""
    files = dict(pair.split("=", 1) for pair in options.published if "=" in pair)
    if len(files) < len(options.published):
        raise ValueError("--published: expected TABLE=FILE.csv, each table once")
    results = json.loads(options.results.read_text(encoding="utf-8"))
    out = options.out or options.results.parent
    write(out, results, files)
    print(f"wrote {out}/report.html")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m eval.matrix.report", __doc__)
    add = parser.add_argument
    add("results", type=Path, help="results.json of a matrix")
    add("--out", type=Path, help="by default the folder of results.json")
    add(
        "--published",
        nargs="+",
        default=[],
        metavar="TABLE=FILE.csv",
        help="your numbers beside a published table",
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: render_again(options))


if __name__ == "__main__":
    sys.exit(main())
