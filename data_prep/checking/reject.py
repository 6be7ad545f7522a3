"""Moving bad rows out of prepared rows into a file of their own, with the reasons. No row is ever
in neither place."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.checking.reading import scan
from data_prep.converting.manifest import refresh_manifest
from data_prep.converting.rows import Problem
from data_prep.converting.writing import encoded, rejected
from fmtrain.command_line import replacing
from fmtrain.data.sources import Source, row_files

Bad = dict[Path, dict[int, list[Problem]]]  # problems by file and row number

_BATCH = 1000  # rows of Parquet in memory


def move_rows(rows: Source, reject: Path, bad: Bad, total: int) -> None:
    """Add the `bad` rows of `rows` (of `total` in all) to `reject`, then take them out of their
    files.

    JSONL keeps every good line as it was, byte for byte, and Parquet every good row. `reject` is
    written first and keeps what it held. Raises `ValueError` if it is not of the rows' format, or
    lies among the rows.
    """
    ending, folder = row_files(rows)[0].suffix, Path(str(rows.path))
    if ending == ".json":
        raise ValueError(f"{folder}: rows are moved out of .jsonl and .parquet files, not of .json")
    if reject.suffix != ending:
        raise ValueError(f"--reject {reject} must end in {ending}, as the rows do")
    if reject.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--reject {reject} lies among the rows themselves; choose another place")
    if reject.suffix == ".jsonl":
        _add_jsonl(rows, reject, bad)
    else:
        _add_parquet(reject, bad)
    for file, problems in bad.items():
        if file.suffix == ".jsonl":
            _keep_lines(file, problems)
        else:
            _keep_rows(file, problems)
    if folder.is_dir():
        refresh_manifest(folder, total - sum(map(len, bad.values())))


def _add_jsonl(rows: Source, reject: Path, bad: Bad) -> None:
    with replacing(reject) as staged, staged.open("wb") as out:
        if reject.is_file():
            out.write(reject.read_bytes())
        for stored in scan(rows):
            problems = bad.get(stored.file, {}).get(stored.number)
            if problems is not None:
                entry = rejected(stored.file, stored.number, problems, stored.row, stored.raw)
                out.write(encoded(entry) + b"\n")


def _keep_lines(file: Path, problems: dict[int, list[Problem]]) -> None:
    with file.open("rb") as lines, replacing(file) as staged, staged.open("wb") as out:
        out.writelines(line for number, line in enumerate(lines, start=1) if number not in problems)


def _add_parquet(reject: Path, bad: Bad) -> None:
    tables = [_with_reasons(file, problems) for file, problems in bad.items()]
    with replacing(reject) as staged, pq.ParquetWriter(staged, tables[0].schema) as writer:
        if reject.is_file():
            for batch in pq.ParquetFile(reject).iter_batches(batch_size=_BATCH):
                writer.write_batch(batch)
        for table in tables:
            writer.write_table(table)


def _with_reasons(file: Path, problems: dict[int, list[Problem]]) -> pa.Table:
    """The bad rows of a shard with the columns file, row and reasons added."""
    numbers = sorted(problems)
    table = pa.concat_tables(
        [pa.Table.from_batches([batch]) for batch in _selected(file, set(numbers), bad=True)]
    )
    table = table.append_column("file", pa.array([str(file)] * len(numbers)))
    table = table.append_column("row", pa.array(numbers))
    reasons = [list(map(str, problems[number])) for number in numbers]
    return table.append_column("reasons", pa.array(reasons))


def _keep_rows(file: Path, problems: dict[int, list[Problem]]) -> None:
    with replacing(file) as staged, pq.ParquetWriter(staged, pq.read_schema(file)) as writer:
        for batch in _selected(file, problems.keys(), bad=False):
            writer.write_batch(batch)


def _selected(file: Path, numbers: set[int], bad: bool) -> Iterator[pa.RecordBatch]:
    """The rows of a shard that are (`bad`), or are not, among `numbers`."""
    start = 1
    for batch in pq.ParquetFile(file).iter_batches(batch_size=_BATCH):
        mask = [(number in numbers) == bad for number in range(start, start + len(batch))]
        start += len(batch)
        yield batch.filter(pa.array(mask))
