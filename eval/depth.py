"""How the gain of a mask depends on the layers of a model: a line through several bases.

    python -m eval.depth DIR [--without l2-s2]

DIR holds the results of one matrix for each base, in folders called l<layers>-s<seed>
(recipes/matrices/learning_depth.yaml). The gain of a base is the area under the curve of exact
answers of training with the mask, less that of causal training; the slope is that of least squares,
with Student's interval and p of zero over bases. Written there: depth.json and depth.md.
"""

import json
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from eval.intervals import CONFIDENCE
from eval.matrix import numbers
from eval.matrix.analysis import CAUSAL
from eval.provenance import made_with
from eval.tables import Table
from fmtrain.command_line import Parser, guarded, write_whole

FOLDER = re.compile(r"l(\d+)-s(\d+)")


@dataclass(frozen=True)
class Base:
    """One base: areas and ends of the curves of its runs, shares of exact answers."""

    layers: int
    seed: int
    causal: float
    trained: float
    causal_end: float
    trained_end: float

    @property
    def name(self) -> str:
        return f"l{self.layers}-s{self.seed}"

    @property
    def gain(self) -> float:
        return self.trained - self.causal


def bases(folder: Path, mask: str) -> list[Base]:
    """Those of a folder, by layers and seed. Raises `ValueError` where there are none, or one has
    no curve of this mask or of causal training."""
    found = []
    for path in sorted(folder.glob("l*-s*/results.json")):
        named = FOLDER.fullmatch(path.parent.name)
        if not named:
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        lines = {line["row"]: line for line in results.get("curves", {}).get("exact", [])}
        for row in (CAUSAL, mask):
            if row not in lines:
                raise ValueError(f"{path}: no curve of exact answers of {row!r}")
        runs = [lines[CAUSAL], lines[mask]]
        areas, ends = [line["area"]["value"] for line in runs], [line["mean"][-1] for line in runs]
        found.append(Base(int(named[1]), int(named[2]), *areas, *ends))
    if not found:
        raise ValueError(f"{folder}: no folder l<layers>-s<seed> with a results.json")
    return sorted(found, key=lambda base: (base.layers, base.seed))


def slope(found: Sequence[Base]) -> dict:
    """Points of area a layer, with interval and p of zero.

    Raises `ValueError` for fewer than three bases or one depth.
    """
    layers = np.array([base.layers for base in found], np.float64)
    if len(found) < 3 or np.ptp(layers) == 0:
        raise ValueError(f"{len(found)} bases of {len(set(layers))} depths make no line")
    line = stats.linregress(layers, [base.gain for base in found])
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 2) * line.stderr
    low, high = float(line.slope - half), float(line.slope + half)
    return {"value": float(line.slope), "low": low, "high": high, "p": float(line.pvalue)}


def table(found: Sequence[Base], line: dict, mask: str, without: Sequence[str]) -> Table:
    """A line for each base, in percent; the slope is in the title, and a base that is left out of
    it has its seed in brackets."""
    value, low, high = (f"{100 * line[key]:+.1f}" for key in ("value", "low", "high"))
    title = f"Gain of area, points a layer: {value} [{low}, {high}], p {numbers.p_value(line['p'])}"
    rows = []
    header = ["layers", "seed", "area, causal", f"area, {mask}", "gain", "end, causal", "end"]
    for base in found:
        areas, ends = (base.causal, base.trained), (base.causal_end, base.trained_end)
        shares = [f"{100 * share:.1f}" for share in (*areas, base.gain, *ends)]
        seed = f"({base.seed})" if base.name in without else str(base.seed)
        rows.append([str(base.layers), seed, *shares])
    return Table(title, header, rows, labels=2)


def write(options: Namespace) -> None:
    found, without = bases(options.folder, options.mask), options.without
    unknown = sorted({*without} - {base.name for base in found})
    if unknown:
        raise ValueError(f"--without {unknown[0]}: {options.folder} has no such base")
    line = slope([base for base in found if base.name not in without])
    words = ["python", "-m", "eval.depth", str(options.folder), "--mask", options.mask]
    command = shlex.join(words + (["--without", *without] if without else []))
    result = {"mask": options.mask, "slope": line, "without": without}
    result["bases"] = [asdict(base) for base in found]
    result["made"] = made_with(command, {})
    text = table(found, line, options.mask, without).as_markdown()
    write_whole(options.folder / "depth.json", json.dumps(result, indent=1))
    write_whole(options.folder / "depth.md", f"`{command}`\n\n{text}")
    print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.depth", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="of the results of the matrices")
    parser.add_argument("--mask", default="v2v", help="in training, against causal")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="BASE", help="left out of the slope"
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: write(options))


if __name__ == "__main__":
    sys.exit(main())
