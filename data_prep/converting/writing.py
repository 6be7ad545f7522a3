"""Writing prepared rows: whole or not at all.

A prepared folder is built beside its final name and renamed into place as the last step, so a
conversion that is killed leaves at most a hidden `.NAME.partial`, which the next run clears. The
staging folder is locked, so two conversions into the same folder do not mix; the lock vanishes with
the process.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.converting.rows import Problem, Row
from fmtrain.command_line import write_whole
from fmtrain.data.row_format import MANIFEST, arrow_schema

SHARD_ROWS = 100_000  # rows a Parquet shard
SHARD_BYTES = 500_000_000  # bytes of embedded images a Parquet shard
_GROUP_ROWS, _GROUP_BYTES = 2_000, 64_000_000  # what is buffered before it is written


def sync(path: Path) -> None:
    """Have the operating system put a file or folder on disk, so that a later rename cannot
    overtake its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def prepared_folder(out: Path) -> Iterator[Path]:
    """An empty staging folder that becomes `out` when the block ends, replacing an earlier prepared
    folder.

    Raises `ValueError` if `out` is anything but a prepared folder, or while another process builds
    it.
    """
    _require_replaceable(out)
    staging = out.with_name(f".{out.name}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    lock = os.open(staging, os.O_RDONLY)
    try:
        _claim(lock, out)
        try:
            _clear(staging)
            yield staging
            for file in staging.iterdir():
                sync(file)
            sync(staging)
            _swap(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _require_replaceable(out: Path) -> None:
    if out.is_file():
        raise ValueError(f"{out} is a file; choose a folder of its own")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    strangers = [name for name in names if name != MANIFEST and not name.startswith("rows")]
    if names and (strangers or MANIFEST not in names):
        raise ValueError(
            f"{out} holds {(strangers or names)[0]!r} and is no prepared folder; "
            "choose a folder of its own"
        )


def _claim(lock: int, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out} is being written by another process") from error


def _clear(folder: Path) -> None:
    for leftover in folder.iterdir():
        leftover.unlink()


def _swap(staging: Path, out: Path) -> None:
    """Move `staging` to `out`; an earlier `out` goes aside first, because a folder cannot be
    renamed over a full one."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.is_dir():
        out.rename(old)
    staging.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


class JsonlWriter:
    """Rows into `rows.jsonl` of `folder`, one a line."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "rows.jsonl").open("wb", buffering=1 << 20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, rows: list[Row]) -> None:
        """Write all of `rows`. Raises `ValueError`, and writes none, if one has text that is not
        Unicode (a lone surrogate, which JSON can spell but UTF-8 cannot)."""
        self.file.writelines([encoded(row) + b"\n" for row in rows])


class ParquetWriter:
    """Rows into shards `rows-00000.parquet`, ... of `folder`; images are paths, or bytes with
    `embed_images`."""

    def __init__(self, folder: Path, embed_images: bool) -> None:
        self.folder, self.schema = folder, arrow_schema(embed_images)
        self.shard: pq.ParquetWriter | None = None
        self.shards = self.shard_rows = self.shard_bytes = self.group_bytes = 0
        self.group: list[Row] = []

    def __enter__(self) -> Self:
        self._open_shard()  # a set without rows still has a file with the schema
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._flush()
        if self.shard is not None:
            self.shard.close()

    def write(self, rows: list[Row]) -> None:
        """Write all of `rows` or none, as `JsonlWriter.write`."""
        for row in rows:
            encoded({**row, "images": []})
        self.group += rows
        for row in rows:
            embedded = [image for image in row["images"] if isinstance(image, dict)]
            self.group_bytes += sum(len(image["bytes"]) for image in embedded)
        if len(self.group) >= _GROUP_ROWS or self.group_bytes >= _GROUP_BYTES:
            self._flush()

    def _open_shard(self) -> None:
        self.shard = pq.ParquetWriter(self.folder / f"rows-{self.shards:05d}.parquet", self.schema)
        self.shards, self.shard_rows, self.shard_bytes = self.shards + 1, 0, 0

    def _flush(self) -> None:
        if not self.group:
            return
        if self.shard is None or self.shard_rows >= SHARD_ROWS or self.shard_bytes >= SHARD_BYTES:
            if self.shard is not None:
                self.shard.close()
            self._open_shard()
        self.shard.write_table(pa.Table.from_pylist(self.group, schema=self.schema))
        self.shard_rows += len(self.group)
        self.shard_bytes += self.group_bytes
        self.group, self.group_bytes = [], 0


def row_writer(folder: Path, layout: str, embed_images: bool) -> JsonlWriter | ParquetWriter:
    """The writer for `layout` (`jsonl` or `parquet`)."""
    return JsonlWriter(folder) if layout == "jsonl" else ParquetWriter(folder, embed_images)


def encoded(value: Any) -> bytes:
    """JSON of `value` (UTF-8, no line breaks). Raises `ValueError` for text that is not Unicode."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise ValueError(f"cannot be written: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, all or nothing."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def rejected(
    file: Path, number: int, problems: list[Problem], row: Any, raw: bytes | None = None
) -> dict[str, Any]:
    """An entry of a reject file: where the row was, every reason, and the row (or its text, if it
    is not JSON)."""
    entry: dict[str, Any] = {
        "file": str(file),
        "row": number,
        "reasons": [str(problem) for problem in problems],
        "record": row,
    }
    if row is None and raw is not None:
        entry["text"] = raw.decode(errors="backslashreplace").rstrip("\n")
    return entry
