"""Published results that a matrix stands beside: `eval/published/*.csv`, with their sources."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "published"


@dataclass(frozen=True)
class Published:
    """A published table.

    Its first `keys` columns say what a row is, the others are numbers as printed.
    """

    name: str
    title: str
    source: str
    note: str
    keys: int
    header: list[str]
    rows: list[list[str]]


ABOUT = {
    "futuremask_table4": (
        "Future-aware masks, Table 4: accuracy on MileBench",
        "arXiv 2505.18605 (ICLR 2026), Table 4",
        "Masks switched on at inference only. CLEVR-Change and Spot-the-Diff are Rouge-L; "
        "+merge rows have prefix size 1. 200 samples a task: one sample is 0.005.",
        2,
    ),
    "futuremask_table6_latency": (
        "Future-aware masks, Table 6: decoding latency",
        "arXiv 2505.18605 (ICLR 2026), Table 6",
        "Milliseconds per token.",
        1,
    ),
    "mma_table1": (
        "Modality-mutual attention, Table 1: benchmarks of one backbone",
        "arXiv 2503.02597 (ICML 2026), Table 1, and the AKI-4B row of Table 2",
        "I&T: image then text; T&I: text then image; DOT: dual-order training. "
        "AKI-4B was trained on more data.",
        1,
    ),
}


def tables() -> list[Published]:
    """All published tables."""
    tables = []
    for name, (title, source, note, keys) in ABOUT.items():
        header, *rows = _read(FOLDER / f"{name}.csv")
        tables.append(Published(name, title, source, note, keys, header, rows))
    return tables


def beside(
    table: Published, own: Mapping[str, Mapping[str, float]], file: str | None = None
) -> list[list[str]]:
    """Rows of a user's numbers in the columns of a published table, "" where there is none.

    own: {row's name: {column: number}}, of which rows without any column of the table are left out.
    file: a CSV with (some of) the table's columns, taken as it is. Raises `ValueError` for a file
    without one of them.
    """
    columns, beside = table.header[table.keys :], []
    for name, values in own.items():
        if any(column in values for column in columns):
            label = ["yours", name] if table.keys == 2 else [f"yours: {name}"]
            texts = [f"{values[column]:.3f}" if column in values else "" for column in columns]
            beside.append([*label, *texts])
    if file is None:
        return beside
    header, *rows = _read(Path(file))
    if not set(header) & set(columns):
        raise ValueError(f"{file}: has none of the columns {', '.join(columns)} of {table.name}")
    for row in rows:
        values = dict(zip(header, row))
        label, *texts = [values.get(column, "") for column in table.header]
        beside.append([f"yours: {label}" if label else "yours", *texts])
    return beside


def _read(path: Path) -> Sequence[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{path}: is empty")
    return rows
