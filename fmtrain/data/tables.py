"""Files and sets of the hub as tables of `datasets`, with embedded images as they are stored: they
are opened by `fmtrain.data.images`, under its limits."""

import contextlib
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmtrain.command_line import folded
from fmtrain.data import json_rows
from fmtrain.data.dialogue import typed
from fmtrain.data.row_format import PROMPT, features, names_images, plain
from fmtrain.data.sources import FORMATS, Source, row_files


def read(source: Source) -> datasets.Dataset:
    """The rows of a source, in whatever form they are. Raises `ValueError` for what is neither here
    nor on the hub, and for files that cannot be read, with the file and the row."""
    return _of_hub(source) if source.on_hub else _of_files(source)


def _of_hub(source: Source) -> datasets.Dataset:
    try:
        rows = datasets.load_dataset(
            source.path,
            source.name,
            split=source.split,
            data_dir=source.data_dir,
            data_files=source.data_files,
        )
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source.path}: no such file or folder here, and as a set of the hub: "
            f"{folded(error)[:300]}"
        ) from error
    return undecoded(_selected(rows, source.columns))


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with images as they are stored."""
    types = {name: _undecoded(feature) for name, feature in rows.features.items()}
    return rows if types == rows.features else rows.cast(datasets.Features(types))


def _undecoded(feature):
    """The type of a column, with images as they are stored."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(kind) for name, kind in feature.items()}
    return feature


def _selected(rows: datasets.Dataset, columns: list[str] | None) -> datasets.Dataset:
    missing = set(columns or ()) - set(rows.column_names)
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(f"no column {names}; it has {', '.join(rows.column_names)}")
    return rows if columns is None else rows.select_columns(columns)


def _of_files(source: Source) -> datasets.Dataset:
    """Rows of files that `datasets` reads, their texts valid UTF-8."""
    name, files = source.path, row_files(source)
    kind = FORMATS[files[0].suffix]
    try:
        with _silent_reader():
            if kind == "parquet":
                rows = _selected(_parquet(files), source.columns)
            else:
                rows = _json(files, source.columns)
        rows.data.validate(full=True)
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
    return rows


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


def _json(files: list[Path], columns: list[str] | None) -> datasets.Dataset:
    """Types are inferred; `datasets` looks at ten megabytes, and where these show no image, or
    something that the rest does not keep to, the types are those of the row format."""
    known = datasets.Features.from_dict(features())
    try:
        rows = _load("json", files)
        if '"_type": "Json"' in json.dumps(rows.features.to_dict()) or _lists_as_texts(rows):
            return _one_by_one(files, columns)
        rows = _selected(rows, columns)
        types = rows.features.arrow_schema
        if "images" not in types.names or not _without_type(types.field("images").type):
            return rows
        return rows.cast(datasets.Features(rows.features | {"images": known["images"]}))
    except datasets.exceptions.DatasetGenerationError:
        try:
            return _selected(_load("json", files, known), columns)
        except datasets.exceptions.DatasetGenerationError:
            return _one_by_one(files, columns)


def _lists_as_texts(rows: datasets.Dataset) -> bool:
    """Whether there may be contents that are lists among those that are texts: `datasets` writes
    them as JSON, once the first ten megabytes have shown texts alone."""
    for column in {"messages", "prompt", "completion"} & set(rows.column_names):
        for chunk in rows.data.column(column).chunks:
            messages = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
            kind = messages.type
            if not pa.types.is_struct(kind) or kind.get_field_index("content") < 0:
                break
            contents = messages.field("content")
            if not pa.types.is_string(contents.type):
                break
            if pc.any(pc.starts_with(contents, "[{")).as_py():
                return True
    return False


def _one_by_one(files: list[Path], columns: list[str] | None) -> datasets.Dataset:
    """Rows of several forms, or with texts and lists among their contents, in the row format.
    `datasets` takes such a column for JSON, and reads a text like 3 or "quoted" as its value."""
    rows, with_images = [], False
    for place, row in json_rows.rows(files):
        try:
            if columns is not None and isinstance(row, dict):
                row = {key: row[key] for key in row if key in columns}
            found = plain(row, place)
            typed(found["messages"], len(found["images"]))
            with_images = with_images or names_images(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        rows.append(found)
    if not with_images:
        raise ValueError("the rows have no column images")
    context = any(PROMPT in row for row in rows)
    if context:
        rows = [{PROMPT: 0, **row} for row in rows]
    types = datasets.Features.from_dict(features(context=context))
    return datasets.Dataset.from_list(rows, features=types)


def _load(kind: str, files: list[Path], types: datasets.Features | None = None):
    names = [str(file) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", features=types)


def _without_type(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or (pa.types.is_list(kind) and pa.types.is_null(kind.value_type))


def _parquet_features(file: Path) -> datasets.Features:
    """The file's own types, but embedded images as they are stored."""
    schema = pq.read_schema(file)
    types = datasets.Features.from_arrow_schema(schema)
    types = datasets.Features({name: _undecoded(feature) for name, feature in types.items()})
    for column in {"images", "image"} & set(schema.names):
        kind = schema.field(column).type
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        cell = datasets.Image(decode=False)
        if pa.types.is_struct(kind.value_type if listed else kind):
            types[column] = datasets.List(cell) if listed else cell
    return types
