"""Rows read from their files as training goes, for sets that are too large to copy into an Arrow
cache and check ahead.

The order is that of one endless sequence, cut into batches; a worker of a rank reads the files like
every other and parses only the rows of its own batches. So the order depends on the seed alone, not
on workers, and a resumed run passes over the batches that it has had without parsing, checking or
decoding them.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import get_worker_info

from fmtrain.data import json_rows, mixing
from fmtrain.data.checks import examine
from fmtrain.data.dialogue import TURNS, split
from fmtrain.data.files import Rows, image_folder
from fmtrain.data.row_format import COLUMNS, PROMPT, READ, names_images, names_media, plain
from fmtrain.data.sources import row_files

Place = str  # of a row: its file and number
Unparsed = bytes | dict  # a line of JSON as it stands, or a row of Parquet
# What stands for a row that a resumed run has had already.
SKIPPED = dict.fromkeys((*COLUMNS, PROMPT, "image_root"))
HEAD = 4  # rows that are read before training starts, for the audit of the first batch


@dataclass(frozen=True)
class StreamedSet:
    """One set: its files, how many rows they hold, how many of these make up its part of a pass,
    its image folder, the columns to keep, None for all, and what becomes of dialogues
    (`dialogue.split`). weight: in a mix of weights alone, which
    has no passes but those of its sets."""

    path: str
    files: tuple[Path, ...]
    size: int
    share: int
    image_root: str
    weight: float | None = None
    columns: tuple[str, ...] | None = None
    turns: str = TURNS[0]

    def records(self) -> Iterator[tuple[Place, Unparsed]]:
        """Every row and its place: as it stands, or, of dialogues that are split, in the row
        format."""
        if self.turns == TURNS[0]:
            yield from _records(self.files)
            return
        for place, unparsed in _records(self.files):
            for row in split(self.parsed(place, unparsed), self.turns):
                yield place, row

    def parsed(self, place: Place, unparsed: Unparsed) -> dict:
        """A row of a file in the row format. Raises `ValueError` naming its place."""
        try:
            row = json_rows.parse(unparsed) if isinstance(unparsed, bytes) else unparsed
            return plain(_selected(row, self.columns), place)
        except ValueError as error:
            raise ValueError(f"{self.path}, {place}: {error}") from error


@dataclass(frozen=True)
class Stream:
    """The endless sequence of rows, and the part of it that one rank sees.

    buffer: of so many rows of a set the next one is drawn; 1 keeps the order of the files.
    batch_size: rows that a rank takes at a time. skip: batches of a rank that come as `SKIPPED`.
    check: `(row, path of its set)`, raises `ValueError`.
    """

    sources: tuple[StreamedSet, ...]
    seed: int
    buffer: int
    batch_size: int
    check: Callable[[dict, str], None]
    rank: int = 0
    world_size: int = 1
    skip: int = 0

    def rows(self, parts: list[int] = ()) -> Iterator[dict]:
        """Rows for one worker of one rank: batch k is rank k % world_size's, whose workers take its
        batches in turn.

        parts: not looked at; `datasets` hands each worker one, and stops those that get none.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for number, (source, (place, row)) in enumerate(self._sequence()):
            own, rank = divmod(number // self.batch_size, self.world_size)
            if rank == self.rank and own % workers == worker:
                yield self._row(source, place, row) if own >= self.skip else SKIPPED

    def _row(self, source: StreamedSet, place: Place, row: Unparsed) -> dict:
        if source.turns == TURNS[0]:
            row = source.parsed(place, row)
        row = {PROMPT: 0, **row, "image_root": source.image_root}
        self.check(row, source.path)
        return row

    def _sequence(self) -> Iterator[tuple[StreamedSet, tuple[Place, Unparsed]]]:
        """Pass after pass; in each, every set gives exactly its share, spread evenly at random. Of
        weights alone: the sets in their turns, each pass after pass for itself."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        if weights:
            streams = [self._passes(k) for k in range(len(weights))]
            for k in mixing.turns(weights, self.seed):
                yield self.sources[k], next(streams[k])
        for number in count():
            chance = Random(f"{self.seed} {number}")
            left = [source.share for source in self.sources]
            streams = []
            for k, source in enumerate(self.sources):
                own_chance = Random(f"{self.seed} {number} {k}")
                streams.append(_picked(source, self.buffer, own_chance))
            while any(left):
                [k] = chance.choices(range(len(left)), left)
                left[k] -= 1
                yield self.sources[k], next(streams[k])

    def _passes(self, k: int) -> Iterator[tuple[Place, Unparsed]]:
        for number in count():
            chance = Random(f"{self.seed} {number} {k}")
            yield from _picked(self.sources[k], self.buffer, chance)


def _picked(source: StreamedSet, buffer: int, chance: Random) -> Iterator[tuple[Place, Unparsed]]:
    """`source.share` rows: whole rounds, then a part of one, each through a shuffle buffer."""
    left = source.share
    while left:
        wanted = min(left, source.size)
        left -= wanted
        yield from _shuffled(_sample(source, wanted, chance), buffer, chance)


def _sample(source: StreamedSet, wanted: int, chance: Random) -> Iterator[tuple[Place, Unparsed]]:
    """Exactly `wanted` of the rows, in their order, every subset alike (selection sampling, Knuth's
    algorithm S)."""
    rest = source.size
    for row in source.records():
        if chance.random() * rest < wanted:
            yield row
            wanted -= 1
        rest -= 1
        if not wanted:
            return
    now = source.size - rest
    raise ValueError(f"{source.path}: held {source.size} rows when the run started and {now} now")


def _shuffled(rows: Iterator, size: int, chance: Random) -> Iterator:
    buffer = list(islice(rows, size - 1)) if size > 1 else []
    for row in rows:
        if buffer:
            k = chance.randrange(len(buffer) + 1)
            if k < len(buffer):
                buffer[k], row = row, buffer[k]
        yield row
    chance.shuffle(buffer)
    yield from buffer


def _records(files: tuple[Path, ...]) -> Iterator[tuple[Place, Unparsed]]:
    """Every row and its place; a line of JSON as it stands."""
    for file in files:
        if file.suffix == ".parquet":
            reader = pq.ParquetFile(file)
            names = reader.schema_arrow.names
            columns = [name for name in names if name in READ or names_media(name)]
            batches = reader.iter_batches(batch_size=64, columns=columns)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{file.name} row {number}", row
        else:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.isspace():
                        yield f"{file.name} row {number}", line


def _size(name: str, files: tuple[Path, ...]) -> int:
    if files[0].suffix == ".json":
        raise ValueError(f"{name}: streaming reads .jsonl and .parquet files, not .json")
    try:
        if files[0].suffix == ".parquet":
            return sum(pq.read_metadata(file).num_rows for file in files)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: not readable as Parquet: {reason}") from error
    return sum(1 for _ in _records(files))


def _require_images(name: str, files: tuple[Path, ...], columns: list[str] | None) -> None:
    """Raises `ValueError` for a set of which no early row names images: they would stand elsewhere,
    and its rows become texts. One that is too broken to tell is left to its own check."""
    for _, row in islice(_records(files), 1000):
        try:
            row = _selected(json_rows.parse(row) if isinstance(row, bytes) else row, columns)
        except ValueError:
            return
        if not isinstance(row, dict) or names_images(row):
            return
    raise ValueError(f"{name}: the rows have no column images")


def _selected(row: Any, columns: Collection[str] | None) -> Any:
    if columns is None or not isinstance(row, dict):
        return row
    return {key: row[key] for key in row if key in columns}


def load(
    entries: list[mixing.Entry],
    stream: Stream,
    workers: int,
    head: int = HEAD,
    turns: str = TURNS[0],
) -> Rows:
    """The rows of the entries through `stream` (without its sources), for a loader with so many
    workers.

    The rows are counted here, the first `head` of them are read. turns: what becomes of a dialogue
    (`dialogue.split`); to count the rows of split ones, the files are read once. Raises
    `ValueError` as `files.load` and for a bad one of these few.
    """
    if any(entry.fraction is not None for entry in entries):
        raise ValueError("datasets: fraction does not go with dataset_streaming; there is weight")
    endless = mixing.only_weights(entries)
    sources = [_set(entry, endless, turns) for entry in entries]
    if not endless:
        shares = mixing.shares(entries, [source.size for source in sources])
        sources = [replace(source, share=k) for source, k in zip(sources, shares, strict=True)]
    stream = replace(stream, sources=tuple(sources))
    first = tuple(islice(replace(stream, rank=0, world_size=1, skip=0).rows(), head))
    parts = list(range(stream.world_size * max(1, workers)))
    rows = datasets.IterableDataset.from_generator(stream.rows, gen_kwargs={"parts": parts})
    passes = sum(source.share for source in sources)
    files = tuple(chain.from_iterable(source.files for source in sources))
    return Rows(rows, ".", opened=first, passes=passes, files=files, turns=turns)


def _set(entry: mixing.Entry, endless: bool, turns: str) -> StreamedSet:
    """The set of an entry; its share is all of its rows."""
    name, paths = str(entry.path), tuple(row_files(entry))
    size = _size(name, paths)
    if not size:
        raise ValueError(f"{name}: holds no row")
    _require_images(name, paths, entry.columns)
    root, weight = image_folder(entry, entry.image_root), entry.weight if endless else None
    columns = None if entry.columns is None else tuple(entry.columns)
    source = StreamedSet(name, paths, size, size, root, weight, columns, turns)
    if turns != TURNS[0]:
        size = sum(1 for _ in source.records())
    return replace(source, size=size, share=size)


def of_iterable(
    rows: datasets.IterableDataset,
    name: str,
    image_root: str,
    check: Callable[[dict, str], None],
    head: int = HEAD,
) -> Rows:
    """The rows of a set that a script streams itself, each checked when it is read; how many there
    are is not known. Raises `ValueError` for a bad one of the first `head`."""

    def read(row: dict, number: int) -> dict:
        try:
            row = {PROMPT: 0, **plain(row, f"{name}:{number}"), "image_root": image_root}
        except ValueError as error:
            raise ValueError(f"{name}, row {number + 1}: {error}") from error
        check(row, name)
        return row

    columns = rows.column_names or list(next(iter(rows.take(1)), {}))
    stored = rows if rows.features is None else rows.decode(False)
    checked = stored.map(read, with_indices=True, remove_columns=columns)
    opened = tuple(checked.take(head))
    if not opened:
        raise ValueError(f"{name}: holds no row")
    return Rows(checked, image_root, opened=opened, passes=0)


def unchecked(row: dict, path: str) -> None:
    """For looking at rows as they are."""


def checker(
    processor,
    longest: int | None,
    max_pixels: int,
    allow_evaluation_data: bool,
    limit: str = "the limit",
) -> Callable[[dict, str], None]:
    """What a stream does with every row: the checks of `checks.prepare`, but images are opened
    later, when they are needed.

    A row over `longest` tokens, which errors call `limit`, is refused: dropping it would shift the
    batches of one worker against those of the others.
    """
    return partial(_check, processor, longest, max_pixels, allow_evaluation_data, limit)


def _check(
    processor,
    longest: int | None,
    max_pixels: int,
    evaluation: bool,
    limit: str,
    row: dict,
    path: str,
) -> None:
    length = examine(
        row,
        processor,
        path,
        root=row["image_root"],
        max_pixels=max_pixels,
        decode=False,
        evaluation=evaluation,
    )
    if longest is not None and length > longest:
        raise ValueError(
            f"{path}, row {row['id']}: {length} tokens, longer than {limit}; a stream drops no "
            "row, so take long ones out first "
            "(python -m data_prep.check ROWS --processor DIR --max_length N --reject FILE)"
        )
