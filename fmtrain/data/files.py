"""The rows of a recipe: loaded, checked before anything is written, and none of them shortened.

A row is `{"id", "source", "messages", "images"}`: `messages` in TRL's conversational format with
typed parts, `images` file names below the image folder or `datasets.Image` cells. Rows longer than
`max_length` are dropped whole and counted. In a mix of several sets every row carries its own image
folder, as `image_root`.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmtrain.command_line import folded
from fmtrain.data import json_rows, mixing
from fmtrain.data.dialogue import typed
from fmtrain.data.row_format import (
    COLUMNS,
    FORMATS,
    features,
    names_media,
    require_no_other_media,
    row_files,
)


@dataclass(frozen=True)
class Rows:
    """A loaded set of rows, where its images are, and how many rows were too long.

    opened, passes, files: of a stream, whose rows have neither numbers nor an end: the first few,
    the rows of one pass, and what they are read from. ordered: they are at random already and just
    those of the run, so it takes them in this order; a sampler's would depend on how many there
    are.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    image_root: str
    dropped: int = 0
    opened: tuple[dict, ...] = ()
    passes: int | None = None
    ordered: bool = False
    files: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """How many rows there are, of a stream in one pass."""
        return len(self.rows) if self.passes is None else self.passes

    def rooted(self) -> "Rows":
        """The same rows, each with its image folder in the column `image_root`, as those of a mix
        have it: a collator knows one folder, and rows of two sets may meet in it."""
        column = [self.image_root] * len(self.rows)
        return replace(self, rows=self.rows.add_column("image_root", column))

    def first(self, count: int) -> list[dict]:
        if self.opened:
            return list(self.opened[:count])
        return [self.rows[index] for index in range(min(count, len(self.rows)))]

    def head(self, count: int | None) -> "Rows":
        """The first `count` of them, None: all."""
        if count is None:
            return self
        return replace(self, rows=self.rows.select(range(min(count, len(self.rows)))))


def load(
    name: str | None,
    config: str | None = None,
    count: int | None = None,
    image_root: str | None = None,
    seed: int = 0,
    first: int | None = None,
    held_out: bool = False,
) -> Rows:
    """The rows of a file, of a folder of files, or of the embedded `digits`.

    count: use so many, the first ones (`digits` makes as many). first: of these only the first ones
    are needed. held_out: rows to evaluate on, of `digits` those of its test split. Raises
    `ValueError` for a name that is none of them, an unreadable file and a set without the columns
    of a row.
    """
    if name == "digits":
        from fmtrain.tiny import digits

        if held_out:
            return Rows(digits.held_out_rows(config, count, seed), ".").head(first)
        return Rows(digits.training_rows(config, count, seed, first), ".")
    files = row_files(name)
    path = Path(name)
    rows = _read(name, FORMATS[files[0].suffix], files)
    missing = ", ".join(sorted({"messages", "images"} - set(rows.column_names)))
    if missing:
        columns = ", ".join(rows.column_names)
        raise ValueError(f"{name}: the rows have no column {missing}; they have {columns}")
    if not len(rows):
        raise ValueError(f"{name}: holds no row")
    _require_no_other_media(name, rows)
    # Other columns go: a file does not say where its images are.
    rows = rows.select_columns([column for column in COLUMNS if column in rows.column_names])
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{path.name}:{number}" for number in range(len(rows))])
    return Rows(rows, image_folder(name, image_root)).head(count or None).head(first)


def _require_no_other_media(name: str, rows: datasets.Dataset) -> None:
    columns = [column for column in rows.column_names if names_media(column)]
    if columns == ["images"]:
        return
    others = rows.select_columns([column for column in columns if column != "images"])
    for number, row in enumerate(others.with_format("arrow").iter(1), start=1):
        try:
            require_no_other_media(
                {key: row[key][0].as_py() for key in others.column_names}, "images"
            )
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: {error}") from error


def image_folder(name: str, image_root: str | None) -> str:
    """Where the images of the rows `name` are: `image_root`, or by default the folder that holds
    the rows."""
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"{name}: its image folder {image_root} does not exist")
    return image_root or str(name if Path(name).is_dir() else Path(name).parent)


def _read(name: str, kind: str, files: list[Path]) -> datasets.Dataset:
    """Rows of a kind that `datasets` reads, their texts valid UTF-8."""
    try:
        with _silent_reader():
            rows = _parquet(files) if kind == "parquet" else _json(files)
        rows.data.validate(full=True)
        return rows
    except StopIteration as error:  # what `datasets` makes of empty files
        raise ValueError(f"{name}: holds no row") from error
    except (
        datasets.exceptions.DatasetGenerationError,
        OSError,
        ValueError,
        pa.ArrowException,
    ) as error:
        # Arrow counts rows from the start of a block, and names no file.
        reason = json_rows.first_broken(files) if kind == "json" else None
        reason = reason or folded(error.__cause__ or error)
        raise ValueError(f"{name}: not readable as rows: {reason[:300]}") from error


@contextlib.contextmanager
def _silent_reader():
    """Without what `datasets` logs of a file that it cannot read: it names a wrong row."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _parquet(files: list[Path]) -> datasets.Dataset:
    types = _parquet_features(files[0])
    return _load("parquet", files, types)


def _json(files: list[Path]) -> datasets.Dataset:
    """Types are inferred; `datasets` looks at ten megabytes, and where these show no image, or
    something that the rest does not keep to, the types are those of the row format."""
    known = datasets.Features.from_dict(features())
    try:
        rows = _load("json", files)
        if '"_type": "Json"' in json.dumps(rows.features.to_dict()) or _lists_as_texts(rows):
            return _mixed(files)
        types = rows.features.arrow_schema
        if "images" not in types.names or not _without_type(types.field("images").type):
            return rows
        return rows.cast(datasets.Features(rows.features | {"images": known["images"]}))
    except datasets.exceptions.DatasetGenerationError:
        try:
            return _load("json", files, known)
        except datasets.exceptions.DatasetGenerationError:
            return _mixed(files)


def _lists_as_texts(rows: datasets.Dataset) -> bool:
    """Whether there may be contents that are lists among those that are texts: `datasets` writes
    them as JSON, once the first ten megabytes have shown texts alone."""
    if "messages" not in rows.column_names:
        return False
    for chunk in rows.data.column("messages").chunks:
        messages = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
        if not pa.types.is_struct(messages.type) or messages.type.get_field_index("content") < 0:
            return False
        contents = messages.field("content")
        if not pa.types.is_string(contents.type):
            return False
        if pc.any(pc.starts_with(contents, "[{")).as_py():
            return True
    return False


def _mixed(files: list[Path]) -> datasets.Dataset:
    """Rows with texts and lists among their contents, all as lists of parts. `datasets` takes such
    a column for JSON, and reads a text like 3 or "quoted" as its value."""
    rows = []
    for place, row in json_rows.rows(files):
        try:
            require_no_other_media(row, "images")
            images = row["images"] or []
            row_id = place if row.get("id") is None else str(row["id"])
            messages = typed(row["messages"], len(images))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{place}: {reason}") from None
        source = row.get("source")
        rows.append({"id": row_id, "source": source, "messages": messages, "images": images})
    return datasets.Dataset.from_list(rows, features=datasets.Features.from_dict(features()))


def _load(kind: str, files: list[Path], types: datasets.Features | None = None):
    names = [str(file) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", features=types)


def _without_type(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or (pa.types.is_list(kind) and pa.types.is_null(kind.value_type))


def _parquet_features(file: Path) -> datasets.Features:
    """The file's own types, but embedded images as they are stored: they are opened by
    `fmtrain.data.images`, under its limits."""
    schema = pq.read_schema(file)
    types = datasets.Features.from_arrow_schema(schema)
    if "images" in schema.names:
        images = schema.field("images").type
        listed = pa.types.is_list(images) or pa.types.is_large_list(images)
        if listed and pa.types.is_struct(images.value_type):
            types["images"] = datasets.List(datasets.Image(decode=False))
    return types


def mix(
    sets: list[Rows],
    entries: list[mixing.Entry],
    seed: int,
    count: int | None = None,
    run: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Rows:
    """One set of rows from several, as the entries say; the first `count` of it.

    run: rows that the run takes, if it has a number of steps; those of weights alone are then just
    these, in their order. say: is told of sets that give none. Errors: see `mixing.shares`.
    """
    sizes = [rows.size for rows in sets]
    order = mixing.order(entries, sizes, seed, count or run)
    given = np.histogram(order, np.cumsum([0, *sizes]))[0]
    for entry, taken in zip(entries, given, strict=True):
        if not taken:
            say(f"{entry.path}: none of its rows is among the {len(order)} of the mix")
    roots = [rows.image_root for rows in sets]
    try:
        mixed = mixing.mix([rows.rows for rows in sets], roots, order)
    except (ValueError, TypeError, pa.ArrowException) as error:
        names = ", ".join(entry.path for entry in entries)
        reason = folded(error)[:300]
        raise ValueError(f"{names}: the rows are of different types: {reason}") from error
    dropped = sum(rows.dropped for rows in sets)
    ordered = mixing.only_weights(entries) and not count and run is not None
    return Rows(mixed, ".", dropped, ordered=ordered).head(count or None)
