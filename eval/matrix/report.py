"""The report of a matrix: one self-contained HTML page, and the same numbers as CSV, Markdown and LaTeX.

    python -m eval.matrix.report DIR/results.json [--out DIR] [--published TABLE=FILE.csv ..]

Nothing in the page comes from elsewhere, and no script runs in it; what models answered is untrusted text.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.matrix import charts, published, tables
from eval.matrix.analysis import CAUSAL
from eval.paired import OVERALL
from fmtrain.policies import get_policy
from fmtrain.preview.drawing import in_words

TEMPLATE = "report.html"
NAMES = {
    "causal-causal": "against causal-causal",
    "diagonal": "against the diagonal",
    "inference-only": "training against inference only",
}


def heat_map(results: dict, task: str) -> dict:
    """A task's matrix as rows of coloured cells, its range, and the range of the differences from causal-causal."""
    found = {(cell["row"], cell["mask"]): cell for cell in results["cells"] if cell["task"] == task}
    scores = [cell["score"] for cell in found.values()]
    low, high = min(scores), max(scores)
    against = {
        (c["row"], c["mask"]): c
        for c in results["comparisons"]
        if c["task"] == task and c["kind"] == "causal-causal"
    }
    most = max((abs(one["difference"]) for one in against.values()), default=0.0) or 1.0
    rows = []
    for row in results["rows"]:
        line, changes = [], []
        for mask in results["masks"]:
            cell, compared = found[row["name"], mask], against.get((row["name"], mask))
            part = (cell["score"] - low) / (high - low) if high > low else 0.5
            tip = f"{cell['score']:.4f} [{cell['low']:.4f}, {cell['high']:.4f}], n {cell['n']}, runs {cell['runs']}"
            line.append(
                {
                    "text": f"{100 * cell['score']:.1f}",
                    "style": charts.heat(part),
                    "own": mask == row["mask"],
                    "carried": False,
                    "tip": tip,
                }
            )
            changes.append(_change(compared, most) | {"own": mask == row["mask"]})
        n, runs = found[row["name"], results["masks"][0]]["n"], len(row["runs"])
        rows.append(
            {
                "name": row["name"],
                "label": tables.label(row),
                "n": f"{n} × {runs}" if runs > 1 else str(n),
                "cells": line,
                "changes": changes,
            }
        )
    ends = [f"{100 * value:.1f}" for value in (low, high)]
    return {
        "task": task,
        "rows": rows,
        "ends": ends,
        "styles": [charts.heat(k / 8) for k in range(9)],
        "compared": bool(against),
    }


def _change(one: dict | None, most: float) -> dict:
    if one is None:
        return {
            "text": "0",
            "style": charts.change(0.0),
            "carried": False,
            "tip": "causal-causal itself",
        }
    tip = f"{_interval(one)}, corrected p {tables.p_value(one['p_holm'])}"
    text = _points(one["difference"])
    return {
        "text": text,
        "style": charts.change(one["difference"] / most),
        "carried": one["carried"],
        "tip": tip,
    }


def _points(difference: float) -> str:
    """Percentage points with a sign."""
    return (
        f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}") if round(difference, 3) else "0"
    )


def _interval(one: dict) -> str:
    return f"{tables.signed(one['difference'])} [{tables.signed(one['low'])}, {tables.signed(one['high'])}]"


def glance(results: dict) -> list[dict]:
    """For each mask that a row was trained with: what switching it on brings, what training brings, what a mismatch costs."""
    found = {
        (c["kind"], c["row"], c["mask"]): c for c in results["comparisons"] if c["task"] == OVERALL
    }
    base = results["reference"]
    lines = []
    for row in results["rows"]:
        mask = row["mask"]
        if base is None or mask == CAUSAL or mask not in results["masks"]:
            continue
        wanted = {
            "switched": ("causal-causal", base[0], mask),
            "trained": ("causal-causal", row["name"], mask),
            "training": ("inference-only", row["name"], mask),
            "mismatch": ("diagonal", row["name"], CAUSAL),
        }
        cells = {name: found.get(key) for name, key in wanted.items()}
        lines.append(
            {
                "label": tables.label(row),
                **{name: one and _shown(one) for name, one in cells.items()},
            }
        )
    return lines


def _shown(one: dict) -> dict:
    points = [_points(one[key]) for key in ("difference", "low", "high")]
    return {
        "text": points[0],
        "interval": f"{points[1]} .. {points[2]}",
        "p": tables.p_value(one["p_holm"]),
        "carried": one["carried"],
    }


def bar_chart(results: dict, task: str) -> Markup:
    """Per mask: switched on in the base and after causal training, and trained with it."""
    found = {(cell["row"], cell["mask"]): cell for cell in results["cells"] if cell["task"] == task}
    base = results["reference"]
    groups = []
    for mask in results["masks"]:
        series = {"base": found[("base", mask)]} if ("base", mask) in found else {}
        if base and base[0] != "base" and mask != CAUSAL:
            series["inference-only"] = found[base[0], mask]
        for row in results["rows"]:
            if row["mask"] == mask and row["name"] != "base":
                series["trained"] = found[row["name"], mask]
                break
        if series:
            groups.append((mask, series))
    line = found[tuple(base)]["score"] if base else None
    return Markup(charts.bars(groups, line, f"{task}: share of right answers under each mask"))


def _published(results: dict, files: Mapping[str, str]) -> list[dict]:
    own: dict[str, dict[str, float]] = {}
    for cell in results["cells"]:
        own.setdefault(f"{cell['row']} / {cell['mask']}", {})[cell["task"]] = cell["score"]
    known = published.tables()
    for name in files:
        if name not in {table.name for table in known}:
            raise ValueError(
                f"unknown published table {name!r}; known are {', '.join(table.name for table in known)}"
            )
    return [
        {"table": table, "yours": published.beside(table, own, files.get(table.name))}
        for table in known
    ]


def render(results: dict, files: Mapping[str, str] | None = None) -> str:
    """The page. files: {published table: CSV file of numbers to put beside it}."""
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["wbr"] = lambda name: Markup("<wbr>").join(
        piece for piece in re.split(r"(?<=[_+])", name)
    )
    names = [OVERALL, *results["tasks"]]
    masks = list(dict.fromkeys([*results["masks"], *(row["mask"] for row in results["rows"])]))
    own = {row["name"]: row["mask"] for row in results["rows"]}
    return environment.get_template(TEMPLATE).render(
        results=results,
        overall=OVERALL,
        heat_maps=[heat_map(results, name) for name in names],
        glance=glance(results),
        bars=[(name, bar_chart(results, name)) for name in names],
        series=charts.SERIES,
        policies=[
            (
                mask,
                Markup(charts.policy_picture(mask)),
                in_words(get_policy(mask.partition("+")[0])),
            )
            for mask in masks
        ],
        own=own,
        comparisons=[(name, tables.comparisons_of(results, name)) for name in names],
        compared={
            kind: sum(
                one["kind"] == kind for one in results["comparisons"] if one["task"] == OVERALL
            )
            for kind in NAMES
        },
        carried=sum(one["carried"] for one in results["comparisons"] if one["task"] == OVERALL),
        kinds=NAMES,
        cells=tables.cells(results),
        published=_published(results, files or {}),
        runs=max(len(row["runs"]) for row in results["rows"]),
        questions=sum(results["tasks"].values()),
    )


def write(out: Path, results: dict, files: Mapping[str, str] | None = None) -> None:
    """report.html, the tables and results.json in the folder `out`, each replaced whole."""
    page = render(results, files)
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        "results.json": json.dumps(results, indent=1, ensure_ascii=False),
        **tables.files(results),
        "report.html": page,
    }
    for name, text in contents.items():
        staged = out / f".{name}.tmp"
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, out / name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.matrix.report",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="results.json of a matrix")
    parser.add_argument("--out", type=Path, help="by default the folder of results.json")
    parser.add_argument(
        "--published",
        nargs="+",
        default=[],
        metavar="TABLE=FILE.csv",
        help="your numbers beside a published table",
    )
    options = parser.parse_args(arguments)
    try:
        files = dict(pair.split("=", 1) for pair in options.published if "=" in pair)
        if len(files) < len(options.published):
            raise ValueError("--published: expected TABLE=FILE.csv, each table once")
        results = json.loads(options.results.read_text(encoding="utf-8"))
        write(options.out or options.results.parent, results, files)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {options.out or options.results.parent}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
