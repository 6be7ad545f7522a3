"""Rows of Parquet files, one at a time."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def parquet_rows(
    file: Path, columns: Collection[str] = (), batch: int = 1000
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a file, `batch` rows in memory. Raises `ValueError` for one that is
    not readable or lacks one of `columns`."""
    number = 0
    try:
        reader = pq.ParquetFile(file)
        missing = sorted(set(columns) - set(reader.schema_arrow.names))
        if missing:
            raise ValueError(f"{file}: missing columns {missing}")
        for rows in reader.iter_batches(batch_size=batch):
            for row in rows.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not readable as Parquet: {reason}") from error
