"""The rows of a recipe: loaded, checked before anything is written, and none of them shortened.

A row is `{"id", "source", "messages", "images"}`: `messages` in TRL's conversational format with
typed parts, `images` file names below the image folder or `datasets.Image` cells. Rows in TRL's
other forms become such rows (`fmtrain.data.row_format.plain`). Rows longer than `max_length` are
dropped whole and counted. In a mix of several sets every row carries its own image folder, as
`image_root`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from fmtrain.command_line import folded
from fmtrain.data import mixing, tables
from fmtrain.data.dialogue import TURNS, split
from fmtrain.data.row_format import (
    COLUMNS,
    DIALOGUES,
    PROMPT,
    READ,
    features,
    names_media,
    plain,
    require_no_other_media,
)
from fmtrain.data.sources import DIGITS, Source, row_files

_TEXTS = {"id", "source", "messages"}  # columns of a row that are no images
_OTHER_FORMS = READ.union(["image"]) - {*COLUMNS, "data_source", "sample_id"}
_IMAGE_CELL = re.compile(r"\bimage: ")  # in the Arrow type of messages whose parts hold images


@dataclass(frozen=True)
class Rows:
    """A loaded set of rows, where its images are, and how many rows were too long.

    opened, passes, files, turns: of a stream, whose rows have neither numbers nor an end: the first
    few, the rows of one pass, what they are read from and what becomes of dialogues. ordered: they
    are at random already and just those of the run, so it takes them in this order; a sampler's
    would depend on how many there are.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    image_root: str
    dropped: int = 0
    opened: tuple[dict, ...] = ()
    passes: int | None = None
    ordered: bool = False
    files: tuple[Path, ...] = ()
    turns: str = TURNS[0]

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
    source: str | Source | None,
    count: int | None = None,
    image_root: str | None = None,
    seed: int = 0,
    first: int | None = None,
    turns: str = TURNS[0],
) -> Rows:
    """The rows of a source; a text is the path of its training split.

    count: use so many, the first ones (`digits` makes as many). first: of these only the first ones
    are needed. seed: of `digits`. turns: what becomes of a dialogue (`dialogue.split`). Raises
    `ValueError` for a source that is neither here nor on the hub, an unreadable file and a set
    without the columns of a row.
    """
    source = Source.of(source)
    if turns != TURNS[0]:
        loaded = load(source, count, image_root, seed, first)
        enough = min((limit for limit in (count, first) if limit), default=None)
        return replace(loaded, rows=split_rows(loaded.rows, turns)).head(enough)
    if source.path == DIGITS:
        return _digits(source, count, seed, first)
    name, rows = str(source.path), tables.read(source)
    root = image_folder(source, image_root)
    if not len(rows):
        raise ValueError(f"{name}: holds no row")
    limits = [limit for limit in (count, first, len(rows)) if limit]
    rows = rows.select(range(min(limits)))
    return Rows(in_row_format(name, rows), root)


def in_row_format(name: str, rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of any form in the columns of the row format, images as they are stored. Raises
    `ValueError` naming the set, and the row, for columns that are none of these forms."""
    _require_columns(name, rows)
    rows = tables.undecoded(rows)
    if not _OTHER_FORMS & set(rows.column_names) and _canonical(rows):
        return _in_columns(name, rows)
    return _rewritten(name, rows)


def split_rows(rows: datasets.Dataset, how: str) -> datasets.Dataset:
    """A row for every answer; embedded images are copied with each."""
    embedded = not isinstance(rows.features["images"].feature, datasets.Value)
    return rows.map(
        _split_batch,
        batched=True,
        batch_size=100,
        fn_kwargs={"how": how},
        remove_columns=rows.column_names,
        features=datasets.Features.from_dict(features(embedded, context=True)),
        load_from_cache_file=False,
        desc="splitting dialogues",
    )


def _split_batch(batch: dict[str, list], how: str) -> dict[str, list]:
    whole = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    rows = [{PROMPT: 0, **row} for row in chain.from_iterable(split(row, how) for row in whole)]
    return {column: [row.get(column) for row in rows] for column in (*COLUMNS, PROMPT)}


def _digits(source: Source, count: int | None, seed: int, first: int | None) -> Rows:
    from fmtrain.tiny import digits

    if source.split == "test":
        return Rows(digits.held_out_rows(source.name, count, seed), ".").head(first)
    if source.split != "train":
        raise ValueError(f"{DIGITS}: has no split {source.split!r}, but train, test")
    return Rows(digits.training_rows(source.name, count, seed, first), ".")


def _require_columns(name: str, rows: datasets.Dataset) -> None:
    columns = set(rows.column_names)
    pairs, single = {"prompt", "completion"} <= columns, set(DIALOGUES) - {"prompt", "completion"}
    missing = [] if single & columns or pairs else ["messages"]
    missing += [] if {"images", "image"} & columns or _in_parts(rows) else ["images"]
    if missing:
        names, others = ", ".join(sorted(missing)), ", ".join(rows.column_names)
        raise ValueError(f"{name}: the rows have no column {names}; they have {others}")


def _in_parts(rows: datasets.Dataset) -> bool:
    """Whether the messages may hold images themselves."""
    types = rows.features.arrow_schema
    kinds = [str(types.field(column).type) for column in set(DIALOGUES) & set(types.names)]
    return any(map(_IMAGE_CELL.search, kinds))


def _canonical(rows: datasets.Dataset) -> bool:
    """Whether the columns are those of the row format, in its types; images may be embedded."""
    known = datasets.Features.from_dict(features()).arrow_schema
    types = rows.features.arrow_schema
    same = [types.field(name).type == known.field(name).type for name in _TEXTS & set(types.names)]
    return all(same) and PROMPT not in types.names


def _in_columns(name: str, rows: datasets.Dataset) -> datasets.Dataset:
    """Without other columns: a file does not say where its images are."""
    _require_no_other_media(name, rows)
    rows = rows.select_columns([column for column in COLUMNS if column in rows.column_names])
    if "id" not in rows.column_names:
        ids = [f"{Path(name).name}:{number}" for number in range(len(rows))]
        rows = rows.add_column("id", ids)
    return rows


def _rewritten(name: str, rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of other forms in the row format. Embedded images of a column `images` stay where they
    are, others are copied."""
    kinds = str(rows.features.arrow_schema)
    embedded = "struct<bytes: " in kinds
    stay = rows.features.get("images") == datasets.List(datasets.Image(decode=False))
    stay = stay and not _in_parts(rows)
    context = not {"prompt", PROMPT}.isdisjoint(rows.column_names)
    types = features(embedded, context)
    if stay:
        del types["images"]
    found = rows.map(
        _plain,
        with_indices=True,
        fn_kwargs={"name": name, "columns": tuple(types)},
        remove_columns=rows.column_names,
        features=datasets.Features.from_dict(types),
        load_from_cache_file=False,  # another version may have written other rows
        desc="reading rows",
    )
    if not stay:
        return found
    return datasets.concatenate_datasets([found, rows.select_columns(["images"])], axis=1)


def _plain(row: dict, number: int, name: str, columns: tuple[str, ...]) -> dict:
    try:
        found = plain(dict(row), f"{Path(name).name}:{number}")
    except ValueError as error:
        raise ValueError(f"{name}, row {number + 1}: {error}") from error
    found = {PROMPT: 0, **found}
    return {column: found[column] for column in columns}


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


def image_folder(source: Source, image_root: str | None) -> str:
    """Where the images of the rows are: `image_root`, or by default the folder that holds the
    rows."""
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"{source.path}: its image folder {image_root} does not exist")
    if image_root is not None or source.on_hub:
        return image_root or "."
    whole = Path(str(source.path))
    return str(whole if whole.is_dir() else row_files(source)[0].parent)


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
        names = ", ".join(str(entry.path) for entry in entries)
        reason = folded(error)[:300]
        raise ValueError(f"{names}: the rows are of different types: {reason}") from error
    dropped = sum(rows.dropped for rows in sets)
    ordered = mixing.only_weights(entries) and not count and run is not None
    return Rows(mixed, ".", dropped, ordered=ordered).head(count or None)
