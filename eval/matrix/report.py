"""The report of a matrix: one self-contained HTML page, and its numbers as CSV, Markdown and LaTeX.

    python -m eval.matrix.report DIR [--out DIR] [--published TABLE=FILE.csv ..]

It computes every figure again from answers.jsonl.gz and curves.json in the folder of a matrix; what
the rows are, the samples and what it was made with are in its results.json. Nothing in the page
comes from elsewhere, and no script runs in it; what models answered is untrusted text.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.matrix import analysis, answers, charts, curves, numbers, published
from eval.matrix.analysis import CAUSAL, MatrixRow
from eval.matrix.charts import Point
from eval.matrix.findings import OPENINGS, findings, points, primary
from fmtrain.command_line import Parser, guarded, write_whole
from fmtrain.masks import Mask
from fmtrain.preview.drawing import in_words

TEMPLATE = "report.html"
KINDS = ("causal-causal", "diagonal", "inference-only")
SERIES = {
    "base": "base, mask switched on",
    "inference-only": "causal training, mask switched on",
    "trained": "trained with the mask",
}
SCALE = (-4, -2, -1, -0.25, 0, 0.25, 1, 2, 4)  # quarters of the full colour, in the legend


def comparisons_of(results: dict, task: str) -> dict[tuple[str, str, str], dict]:
    """{(kind, row, mask in inference): comparison} of one task."""
    comparisons = [one for one in results["comparisons"] if one["task"] == task]
    return {(one["kind"], one["row"], one["mask"]): one for one in comparisons}


def heat_map(results: dict, task: str) -> dict:
    """A task's matrix as rows of coloured cells: scores, and differences from causal-causal."""
    cells, against = numbers.cells_of(results, task), {}
    for (kind, row, mask), comparison in comparisons_of(results, task).items():
        if kind == "causal-causal":
            against[row, mask] = comparison
    scores = [cell["score"] for cell in cells.values()]
    rows = []
    for row in results["rows"]:
        line, changes = [], []
        for mask in results["masks"]:
            pair, own = (row["name"], mask), {"own": mask == row["mask"]}
            line.append(_cell(cells[pair], min(scores), max(scores)) | own)
            changes.append(_change(against.get(pair), cells[pair]["score"]) | own)
        rows.append(
            {
                "name": row["name"],
                "label": numbers.label(row),
                "cells": line,
                "changes": changes,
            }
        )
    return {
        "task": task,
        "n": numbers.questions(results, task),
        "chance": numbers.chance(results, task),
        "rows": rows,
        "ends": [f"{100 * value:.1f}" for value in (min(scores), max(scores))],
        "styles": [charts.heat(k / 8) for k in range(9)],
        "compared": bool(against),
    }


def _cell(cell: dict, low: float, high: float) -> dict:
    part = (cell["score"] - low) / (high - low) if high > low else 0.5
    return {
        "text": f"{100 * cell['score']:.1f}",
        "small": f"{100 * cell['low']:.0f}–{100 * cell['high']:.0f}",
        "style": charts.heat(part),
        "carried": False,
    }


def _change(comparison: dict | None, score: float) -> dict:
    """A difference from causal-causal; None: that cell itself, or nothing to compare with."""
    if comparison is None:
        texts, carried, value = ("0", ""), False, 0.0
    else:
        value, carried = comparison["difference"], comparison["carried"]
        texts = points(value), _interval(comparison)
    return {
        "text": texts[0],
        "small": texts[1],
        "score": f"{100 * score:.1f}",
        "style": charts.change(value),
        "carried": carried,
    }


def _interval(comparison: dict) -> str:
    return f"{points(comparison['low'])} .. {points(comparison['high'])}"


def glance(results: dict) -> list[dict]:
    """For each mask of training: what it brings switched on, what trained with.

    And what training so costs where the mask in inference is causal.
    """
    comparisons = comparisons_of(results, results["headline"])
    base, lines = results["reference"], []
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
    p = numbers.p_value(comparison["p_holm"])
    return {
        "text": points(comparison["difference"]),
        "interval": _interval(comparison),
        "p": p if p.startswith("<") else f"= {p}",
        "carried": comparison["carried"],
    }


def forests(results: dict) -> list[tuple[str, Markup]]:
    """(what is compared, the primary family's differences of that kind, drawn)."""
    drawn = []
    for kind, opening in OPENINGS.items():
        groups = []
        for one in primary(results, kind):
            text = f"{points(one['difference'])} [{points(one['low'])}, {points(one['high'])}]"
            css = "trained" if one["carried"] else "open"
            groups.append((one["row"], [_point(one, "difference", css, text)]))
        if groups:
            drawn.append((opening, Markup(charts.points(groups, {}, f"{opening}: differences"))))
    return drawn


def _point(entry: dict, key: str, css: str, text: str) -> Point:
    return Point(css, entry[key], entry["low"], entry["high"], entry["by_run"], text)


def score_chart(results: dict, task: str) -> Markup:
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
        of_mask = []
        for css, cell in series.items():
            figures = [f"{100 * cell[name]:.1f}" for name in ("score", "low", "high")]
            text = f"{figures[0]} [{figures[1]}, {figures[2]}]"
            of_mask.append(_point(cell, "score", css, text))
        if of_mask:
            groups.append((mask, of_mask))
    lines = {"reference": cells[tuple(base)]["score"]} if base else {}
    chance = numbers.chance(results, task)
    lines |= {} if chance is None else {"chance": chance}
    return Markup(charts.points(groups, lines, f"{task}: share of right answers under each mask"))


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
    names, masks = numbers.names(results), _masks(results)
    kinds = [one["kind"] for one in comparisons_of(results, results["headline"]).values()]
    families = [one["family"] for one in results["comparisons"]]
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            results=results,
            findings=findings(results),
            what=numbers.of_what(results["headline"]),
            heat_maps=[heat_map(results, name) for name in names],
            scale=[
                (points(k * charts.MOST / 4), charts.change(k * charts.MOST / 4)) for k in SCALE
            ],
            forests=forests(results),
            glance=glance(results),
            scores=[(name, score_chart(results, name)) for name in names],
            series=SERIES,
            curves=curves.shown(results.get("curves")),
            masks=masks,
            light=any(mask["light"] for mask in masks),
            own={row["name"]: row["mask"] for row in results["rows"]},
            comparisons=[(name, numbers.comparisons_of(results, name)) for name in names],
            compared={kind: kinds.count(kind) for kind in KINDS},
            families={name: families.count(name) for name in (analysis.PRIMARY, analysis.OTHER)},
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


def compute_again(folder: Path) -> dict:
    """The results of a matrix's folder, with every figure from its answers."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = [MatrixRow(row["name"], row["mask"], tuple(row["runs"])) for row in results["rows"]]
        raw = answers.read(folder)
        results |= analysis.results(rows, results["masks"], raw.questions, raw.scores)
        return results | curves.results(rows, curves.read(folder))
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path}: is not that of a matrix: {error!r}") from error


def render_again(options: argparse.Namespace) -> None:
    """Make page and tables from the folder of a matrix."""
    files = dict(pair.split("=", 1) for pair in options.published if "=" in pair)
    if len(files) < len(options.published):
        raise ValueError("--published: expected TABLE=FILE.csv, each table once")
    out = options.out or options.folder
    write(out, compute_again(options.folder), files)
    print(f"wrote {out}/report.html")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m eval.matrix.report", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of a matrix's results")
    add("--out", type=Path, help="by default the same folder")
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
