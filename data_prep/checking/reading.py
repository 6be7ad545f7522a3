"""Rows as they stand in their files, good or bad."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from data_prep.converting.parquet import parquet_rows
from data_prep.converting.rows import Problem, Row, format_problems
from fmtrain.data import json_rows
from fmtrain.data.sources import Source, row_files


class StoredRow(NamedTuple):
    """One row as it stands in a file; `number` counts from 1. `problem` says why `row` could not be
    read, else it is None."""

    file: Path
    number: int
    row: Any
    raw: bytes | None = None
    problem: Problem | None = None


def scan(source: Path | Source) -> Iterator[StoredRow]:
    """Every row of a source, readable or not, one at a time, in whatever form it stands."""
    for file in row_files(source):
        if file.suffix == ".jsonl":
            yield from _scan_jsonl(file)
        elif file.suffix == ".json":
            for number, (_, row) in enumerate(json_rows.rows([file]), start=1):
                yield StoredRow(file, number, row)
        else:
            for number, row in parquet_rows(file, batch=256):
                yield StoredRow(file, number, row)


def _scan_jsonl(file: Path) -> Iterator[StoredRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                yield StoredRow(file, number, json_rows.parse(line), line)
            except ValueError as error:
                yield StoredRow(file, number, None, line, Problem("format", str(error)))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file or a prepared folder, in order. Raises `ValueError` naming file, row and
    reason at the first that is not well-formed."""
    for record in scan(path):
        problems = [record.problem] if record.problem else format_problems(record.row)
        if problems:
            raise ValueError(f"{record.file}: row {record.number}: {problems[0]}")
        yield record.row


def count_rows(source: Path | Source) -> int:
    """Number of rows without parsing them: lines of JSONL that are not blank, the footer of
    Parquet. Raises `ValueError` as `row_files`."""
    total = 0
    for file in row_files(source):
        if file.suffix == ".parquet":
            total += pq.read_metadata(file).num_rows
        elif file.suffix == ".json":
            total += sum(1 for _ in json_rows.rows([file]))
        else:
            with file.open("rb") as lines:
                total += sum(not line.isspace() for line in lines)
    return total
