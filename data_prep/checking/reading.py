"""Prepared rows as they stand in their files, good or bad."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow.parquet as pq

from data_prep.converting.parquet import parquet_rows
from data_prep.converting.rows import Problem, Row, format_problems
from fmtrain.data.row_format import COLUMNS, row_files


class StoredRow(NamedTuple):
    """One row as it stands in a file; `number` counts from 1. `problem` says why `row` could not be
    read, else it is None."""

    file: Path
    number: int
    row: Any
    raw: bytes | None = None
    problem: Problem | None = None


def _files_of(path: Path) -> list[Path]:
    """The .jsonl or .parquet files that `path` means. Raises `ValueError` if there are none."""
    files = row_files(path)
    if files[0].suffix == ".json":
        raise ValueError(f"{files[0]}: arrays are not checked; write one row a line, as .jsonl")
    return files


def scan(path: Path) -> Iterator[StoredRow]:
    """Every row of `path` (a file or a prepared folder), readable or not, one at a time."""
    for file in _files_of(path):
        if file.suffix == ".jsonl":
            yield from _scan_jsonl(file)
        else:
            for number, row in parquet_rows(file, COLUMNS, batch=256):
                yield StoredRow(file, number, row)


def _scan_jsonl(file: Path) -> Iterator[StoredRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                yield StoredRow(file, number, orjson.loads(line), line)
            except orjson.JSONDecodeError as error:
                yield StoredRow(file, number, None, line, Problem("format", f"not JSON: {error}"))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file or a prepared folder, in order. Raises `ValueError` naming file, row and
    reason at the first that is not well-formed."""
    for record in scan(path):
        problems = [record.problem] if record.problem else format_problems(record.row)
        if problems:
            raise ValueError(f"{record.file}: row {record.number}: {problems[0]}")
        yield record.row


def count_rows(path: Path) -> int:
    """Number of rows without parsing them: lines of JSONL that are not blank, the footer of
    Parquet. Raises `ValueError` as `row_files`."""
    total = 0
    for file in _files_of(path):
        if file.suffix == ".parquet":
            total += pq.read_metadata(file).num_rows
        else:
            with file.open("rb") as lines:
                total += sum(not line.isspace() for line in lines)
    return total
