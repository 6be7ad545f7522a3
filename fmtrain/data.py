"""The rows of a recipe: loaded, checked before anything is written, and none of them shortened.

A row is `{"id", "source", "messages", "images"}`: `messages` in TRL's conversational format with typed parts, `images`
file names below the image folder or `datasets.Image` cells. Rows longer than `max_length` are dropped whole and counted.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
from PIL import Image as PILImage

from fmtrain.encode import check, image_count, render
from fmtrain.images import MAX_PIXELS, image_size, open_image

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """A loaded set of rows, where its images are, and how many rows were too long."""

    rows: datasets.Dataset
    image_root: str
    dropped: int = 0


def load(name: str | None, config: str | None = None, count: int | None = None, image_root: str | None = None, seed: int = 0) -> Rows:
    """The rows of a file, of a folder of files, or of the embedded `digits`.

    Raises `ValueError` for a name that is none of them, an unreadable file and a set without the columns of a row.
    """
    if name is None:
        raise ValueError("the recipe names no data; add e.g. `dataset_name: rows.jsonl`")
    if name == "digits":
        from fmtrain import tiny

        return Rows(tiny.training_rows(config, count, seed), ".")
    path = Path(name)
    files = sorted(file for file in path.iterdir() if file.suffix in FORMATS) if path.is_dir() else [path]
    if not files or files[0].suffix not in FORMATS or not files[0].is_file():
        raise ValueError(f"{name}: no such rows; expected `digits`, a {', '.join(FORMATS)} file or a folder of them")
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1:
        raise ValueError(f"{name}: holds {', '.join(sorted(suffixes))} files; keep one kind in a folder")
    try:
        rows = datasets.load_dataset(FORMATS[files[0].suffix], data_files=[str(file) for file in files], split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name}: not readable as rows: {reason[:300]}") from error
    missing = {"messages", "images"} - set(rows.column_names)
    if missing:
        raise ValueError(f"{name}: the rows have no column {', '.join(sorted(missing))}; they have {', '.join(rows.column_names)}")
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{path.name}:{number}" for number in range(len(rows))])
    root = image_root or str(path if path.is_dir() else path.parent)
    return Rows(rows.select(range(min(count or len(rows), len(rows)))), root)


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
        _inspect,
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


def _inspect(row: dict, processor, name: str, root: str, max_pixels: int, decode: bool, count: bool, evaluation: bool) -> dict[str, int]:
    try:
        if str(row.get("source") or "").startswith("evaluation_only/") and not evaluation:
            raise ValueError("is evaluation data; training on it needs `allow_evaluation_data: true`")
        images = row["images"] or []
        sizes = [open_image(i, root, max_pixels).size if decode else image_size(i, root, max_pixels) for i in images]
        messages = check(processor, row["messages"] or [], len(sizes))
        segments = render(processor, messages)
        if not any(segment.prefill < 0 for segment in segments):
            raise ValueError("no assistant's turn, so there is nothing to learn from it")
        if not count:
            return {"length": 0}
        return {"length": token_count(processor, messages, "".join(segment.text for segment in segments), sizes)}
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{name}, row {row.get('id', '?')}: {reason}") from None


def token_count(processor, messages: list[dict], text: str, sizes: list[tuple[int, int]]) -> int:
    """How many tokens `encode` makes of a dialogue, without touching a pixel."""
    tokenizer = processor.tokenizer
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


@lru_cache(maxsize=4096)
def _image_tokens(processor, size: tuple[int, int], alone: bool) -> int:
    """Tokens of an image of this size, alone in its prefill or not, asked of the processor once."""
    count = 1 if alone else 2
    blank = PILImage.new("RGB", size)
    encoded = processor(text=[processor.image_token * count], images=[[blank] * count], add_special_tokens=False)
    return len(encoded["input_ids"][0]) // count
