"""The rows of a recipe: loaded, checked before anything is written, and none of them shortened.

A row is `{"id", "source", "messages", "images"}`: `messages` in TRL's conversational format with typed parts, `images`
file names below the image folder or `datasets.Image` cells. Rows longer than `max_length` are dropped whole and counted.
In a mix of several sets every row carries its own image folder, as `image_root`.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage

from fmtrain.data import mixing
from fmtrain.data.encode import Segment, check, image_count, render
from fmtrain.data.images import MAX_PIXELS, image_size, open_image
from fmtrain.data.row_format import COLUMNS, EVALUATION_ONLY, features

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """A loaded set of rows, where its images are, and how many rows were too long.

    head, passes: of a stream, whose rows have neither numbers nor an end: the first few, and the rows of one pass.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    image_root: str
    dropped: int = 0
    head: tuple[dict, ...] = ()
    passes: int | None = None

    @property
    def size(self) -> int:
        """How many rows there are, of a stream in one pass."""
        return len(self.rows) if self.passes is None else self.passes

    def first(self, count: int) -> list[dict]:
        return list(self.head[:count]) if self.head else [self.rows[index] for index in range(min(count, len(self.rows)))]


def load(
    name: str | None,
    config: str | None = None,
    count: int | None = None,
    image_root: str | None = None,
    seed: int = 0,
    mixture: list[dict] | None = None,
) -> Rows:
    """The rows of a file, of a folder of files, of the embedded `digits`, or of a mix of several (`datasets:` of a recipe).

    Raises `ValueError` for a name that is none of them, an unreadable file and a set without the columns of a row.
    """
    if mixture:
        entries = mixing.entries(mixture)
        return mix([load(entry.path, image_root=entry.image_root) for entry in entries], entries, seed, count)
    if name == "digits":
        from fmtrain.tiny import digits

        return Rows(digits.training_rows(config, count, seed), ".")
    files = row_files(name)
    path = Path(name)
    rows = _read(name, FORMATS[files[0].suffix], [str(file) for file in files])
    missing = {"messages", "images"} - set(rows.column_names)
    if missing:
        raise ValueError(f"{name}: the rows have no column {', '.join(sorted(missing))}; they have {', '.join(rows.column_names)}")
    if not len(rows):
        raise ValueError(f"{name}: holds no row")
    rows = rows.select_columns([column for column in COLUMNS if column in rows.column_names])  # a file says no image_root
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{path.name}:{number}" for number in range(len(rows))])
    return Rows(rows.select(range(min(count or len(rows), len(rows)))), image_folder(name, image_root))


def row_files(name: str | None) -> list[Path]:
    """The files that hold the rows of `name`, a file or a folder. Raises `ValueError` if there are none, or of two kinds."""
    if name is None:
        raise ValueError("the recipe names no data; add e.g. `dataset_name: rows.jsonl`")
    path = Path(name)
    files = sorted(file for file in path.iterdir() if file.suffix in FORMATS) if path.is_dir() else [path]
    if not files or files[0].suffix not in FORMATS or not files[0].is_file():
        raise ValueError(f"{name}: no such rows; expected `digits`, a {', '.join(FORMATS)} file or a folder of them")
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1:
        raise ValueError(f"{name}: holds {', '.join(sorted(suffixes))} files; keep one kind in a folder")
    return files


def image_folder(name: str, image_root: str | None) -> str:
    """Where the images of the rows `name` are: `image_root`, or by default the folder that holds the rows."""
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"{name}: its image folder {image_root} does not exist")
    return image_root or str(name if Path(name).is_dir() else Path(name).parent)


def _read(name: str, kind: str, files: list[str]) -> datasets.Dataset:
    """Rows of a kind that `datasets` reads. Types are inferred; of JSON, `datasets` looks at ten megabytes, and where these
    show no image, or something that the rest does not keep to, the types are those of the row format."""
    try:
        if kind == "parquet":
            return datasets.load_dataset(kind, data_files=files, split="train", features=_parquet_features(files[0]))
        try:
            rows = datasets.load_dataset(kind, data_files=files, split="train")
            if "images" not in rows.column_names or not _without_type(rows.features.arrow_schema.field("images").type):
                return rows
        except datasets.exceptions.DatasetGenerationError:
            pass
        return datasets.load_dataset(kind, data_files=files, split="train", features=datasets.Features.from_dict(features()))
    except StopIteration as error:  # what `datasets` makes of empty files
        raise ValueError(f"{name}: holds no row") from error
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name}: not readable as rows: {reason[:300]}") from error


def _without_type(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or (pa.types.is_list(kind) and pa.types.is_null(kind.value_type))


def _parquet_features(file: str) -> datasets.Features:
    """The file's own types, but embedded images as they are stored: they are opened by `fmtrain.data.images`, under its limits."""
    schema = pq.read_schema(file)
    found = datasets.Features.from_arrow_schema(schema)
    if "images" in schema.names:
        images = schema.field("images").type
        if (pa.types.is_list(images) or pa.types.is_large_list(images)) and pa.types.is_struct(images.value_type):
            found["images"] = datasets.List(datasets.Image(decode=False))
    return found


def mix(sets: list[Rows], entries: list[mixing.Entry], seed: int, count: int | None = None, run: int | None = None) -> Rows:
    """One set of rows from several, as the entries say; the first `count` of it. `run` and errors: see `mixing.shares`."""
    shares = mixing.shares(entries, [rows.size for rows in sets], run)
    try:
        mixed = mixing.mix([rows.rows for rows in sets], [rows.image_root for rows in sets], shares, seed)
    except (ValueError, TypeError, pa.ArrowException) as error:
        names = ", ".join(entry.path for entry in entries)
        raise ValueError(f"{names}: the rows are of different types: {' '.join(str(error).split())[:300]}") from error
    return Rows(mixed.select(range(min(count or len(mixed), len(mixed)))), ".", sum(rows.dropped for rows in sets))


def prepare(
    loaded: Rows,
    processor,
    name: str,
    max_length: int | None = None,
    max_pixels: int = MAX_PIXELS,
    check_images: bool = True,
    allow_evaluation_data: bool = False,
    workers: int | None = None,
) -> Rows:
    """Every row checked as training will read it; those over `max_length` tokens dropped.

    Raises `ValueError` naming the set, the row and the reason for the first bad row, and if no row is left.
    """
    lengths = loaded.rows.map(
        _length,
        fn_kwargs=dict(
            processor=processor,
            name=name,
            root=loaded.image_root,
            max_pixels=max_pixels,
            decode=check_images,
            count=max_length is not None,
            evaluation=allow_evaluation_data,
        ),
        remove_columns=loaded.rows.column_names,
        num_proc=workers,
        desc="checking rows",
        load_from_cache_file=False,
    )["length"]
    if max_length is None:
        return loaded
    keep = [index for index, length in enumerate(lengths) if length <= max_length]
    if not keep:
        raise ValueError(f"{name}: none of {len(lengths)} rows fits max_length {max_length}; the shortest has {min(lengths)} tokens")
    return Rows(loaded.rows.select(keep), loaded.image_root, len(lengths) - len(keep))


def _length(row: dict, **how) -> dict[str, int]:
    return {"length": inspect(row, **how)}


def inspect(row: dict, processor, name: str, root: str, max_pixels: int, decode: bool, count: bool, evaluation: bool) -> int:
    """The tokens of a row if `count`, else 0. Raises `ValueError`, in one line with the row, for one that cannot be trained on."""
    try:
        if str(row.get("source") or "").startswith(EVALUATION_ONLY) and not evaluation:
            raise ValueError("is evaluation data; training on it needs `allow_evaluation_data: true`")
        images, root = row["images"] or [], row.get("image_root") or root
        sizes = [open_image(i, root, max_pixels).size if decode else image_size(i, root, max_pixels) for i in images]
        messages = check(processor, row["messages"] or [], len(sizes))
        segments = render(processor, messages)
        if not any(segment.prefill < 0 for segment in segments):
            raise ValueError("no assistant's turn, so there is nothing to learn from it")
        return _tokens(processor, messages, segments, sizes) if count else 0
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{name}, row {row.get('id', '?')}: {reason}") from None


def token_count(processor, messages: list[dict], sizes: list[tuple[int, int]]) -> int:
    """How many tokens `encode` makes of a dialogue whose images have these sizes (width, height), without touching a pixel.

    Raises `ValueError` as `encode` does.
    """
    messages = check(processor, messages, len(sizes))
    return _tokens(processor, messages, render(processor, messages), sizes)


def _tokens(processor, messages: list[dict], segments: list[Segment], sizes: list[tuple[int, int]]) -> int:
    tokenizer = processor.tokenizer
    text = "".join(segment.text for segment in segments)
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    total, remaining = len(tokenizer(text, add_special_tokens=special).input_ids), list(sizes)
    group = 0
    for message in [*messages, {"role": "assistant", "content": []}]:
        if message["role"] != "assistant":
            group += image_count(processor, message)
            continue
        for size in remaining[:group]:
            total += _image_tokens(processor, size, group == 1) - 1
        remaining, group = remaining[group:], 0
    return total


@lru_cache(maxsize=1 << 16)
def _image_tokens(processor, size: tuple[int, int], alone: bool) -> int:
    """Tokens of an image of this size, alone in its prefill or not, asked of the processor once."""
    count = 1 if alone else 2
    blank = PILImage.new("RGB", size)
    encoded = processor(text=[processor.image_token * count], images=[[blank] * count], add_special_tokens=False)
    return len(encoded["input_ids"][0]) // count
