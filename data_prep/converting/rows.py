"""The one row format: how a row is built, what makes it well-formed, how prepared rows are read.

    {"id": str, "source": str,
     "messages": [{"role": "system" | "user" | "assistant",
                   "content": [{"type": "image", "text": None} | {"type": "text", "text": str}, ...]}, ...],
     "images": [str, ...]}

The k-th image part, counted over all messages, is `images[k]`: a path relative to an image root, or, in Parquet with
embedded images, a struct {"bytes": bytes, "path": str} as `datasets.Image` stores it. This is TRL's conversational
vision format. Both keys of a part are always written, so that Arrow infers one schema whatever the rows are.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from fmtrain.data.row_format import COLUMNS as KEYS
from fmtrain.data.row_format import features

Row = dict[str, Any]
Part = dict[str, str | None]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant")
PLACEHOLDER = "<image>"  # what LLaVA's own files write where an image goes; never text of a row
_KEYS, _MESSAGE_KEYS, _PART_KEYS = (
    frozenset(KEYS),
    frozenset(("role", "content")),
    frozenset(("type", "text")),
)

_NOT_IMAGES = (
    ".zip",
    ".tar",
    ".gz",
    ".tgz",
    ".bz2",
    ".xz",
    ".7z",
    ".rar",
    ".zst",
    ".p",
    ".pkl",
    ".pickle",
    ".pt",
    ".npy",
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Problem(NamedTuple):
    """What is wrong with a row: a kind that is counted, and the detail for this row."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


class Record(NamedTuple):
    """One row as found in a file; `number` counts from 1. `problem` says why `row` could not be read, else it is
    None."""

    file: Path
    number: int
    row: Any
    raw: bytes | None = None
    problem: Problem | None = None


def image_part() -> Part:
    """The place of an image in a message."""
    return {"type": "image", "text": None}


def text_part(text: str) -> Part:
    """A piece of text in a message."""
    return {"type": "text", "text": text}


def user(*parts: str | Part) -> Message:
    """A user's turn from parts; a plain string is a text part."""
    return {
        "role": "user",
        "content": [text_part(part) if isinstance(part, str) else part for part in parts],
    }


def assistant(answer: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": [text_part(answer)]}


def unsafe_name(name: Any) -> str | None:
    """Why an image name is refused whatever the folder holds, or None. What the file system says is left to
    `fmtrain.data.images.resolve`."""
    if not isinstance(name, str) or not name or "\0" in name:
        return f"image name {name!r:.200} is not a path"
    if _URL.match(name):
        return f"image {name!r:.200} is a URL, and only files are read"
    if name[0] in "/\\" or ".." in name.replace("\\", "/").split("/"):
        return f"image {name!r:.200} leaves the image root"
    if name.lower().endswith(_NOT_IMAGES):
        return f"image {name!r:.200} is an archive or a pickle"
    return None


def format_problems(row: Any) -> list[Problem]:
    """What keeps `row` from being a row at all. An empty list: keys, types, roles, parts and image names are
    well-formed and there are as many images as image parts. Every converter's output passes this before it is
    written."""
    if not isinstance(row, dict):
        return [Problem("format", f"a row is an object, not {type(row).__name__}")]
    if row.keys() != _KEYS:
        missing, extra = sorted(set(KEYS) - row.keys()), sorted(map(str, row.keys() - set(KEYS)))
        return [Problem("format", f"missing keys {missing}, unknown keys {extra}")]
    for key in ("id", "source"):
        if not isinstance(row[key], str) or not row[key]:
            return [
                Problem(
                    "format", f"{key} must be a string that is not empty, not {row[key]!r:.100}"
                )
            ]
    if (
        not isinstance(row["messages"], list)
        or not row["messages"]
        or not isinstance(row["images"], list)
    ):
        return [Problem("format", "messages must be a list that is not empty, and images a list")]
    image_parts = 0
    for number, message in enumerate(row["messages"]):
        if _is_plain(message):
            continue
        reason = _message_problem(message)
        if reason is not None:
            return [Problem("format", f"message {number}: {reason}")]
        if message["role"] == "user":
            image_parts += [part["type"] for part in message["content"]].count("image")
    return _image_problems(row["images"], image_parts)


def _is_plain(message: Any) -> bool:
    """Whether a message is well-formed and just one piece of text, as most are: a short cut past `_message_problem`."""
    if not isinstance(message, dict) or len(message) != 2 or message.get("role") not in ROLES:
        return False
    content = message.get("content")
    if not isinstance(content, list) or len(content) != 1:
        return False
    part = content[0]
    return (
        isinstance(part, dict)
        and len(part) == 2
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, dict) or message.keys() != _MESSAGE_KEYS:
        return "must have exactly the keys role and content"
    if message["role"] not in ROLES:
        return f"role {message['role']!r:.50} is not one of {', '.join(ROLES)}"
    if not isinstance(message["content"], list) or not message["content"]:
        return "content must be a list of parts that is not empty"
    for part in message["content"]:
        if not isinstance(part, dict) or not part.keys() <= _PART_KEYS:
            return "a part must have the keys type and text"
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and isinstance(text, str):
            continue
        if kind != "image" or text is not None:
            return f"a part has type {kind!r:.50} and text {text!r:.50}"
        if message["role"] != "user":
            return f"an image in the {message['role']}'s turn"
    return None


def _image_problems(images: list[Any], image_parts: int) -> list[Problem]:
    if len(images) != image_parts:
        return [Problem("image count", f"{image_parts} image parts and {len(images)} images")]
    for image in images:
        embedded = (
            isinstance(image, dict)
            and image.keys() == {"bytes", "path"}
            and isinstance(image["bytes"], bytes)
        )
        reason = None if embedded else unsafe_name(image)
        if reason is not None:
            return [Problem("unsafe path", reason)]
    return []


def schema(embed_images: bool = False) -> pa.Schema:
    """Arrow schema of the row format, with `features` in the metadata key that `datasets` reads."""
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    image = (
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if embed_images else pa.string()
    )
    fields = [
        ("id", pa.string()),
        ("source", pa.string()),
        ("messages", pa.list_(message)),
        ("images", pa.list_(image)),
    ]
    metadata = {"huggingface": orjson.dumps({"info": {"features": features(embed_images)}})}
    return pa.schema(fields, metadata=metadata)


def row_files(path: Path) -> list[Path]:
    """The row files that `path` means: itself, or the `rows*.jsonl` and `rows*.parquet` of a prepared folder, in order.
    Raises `ValueError` if there are none."""
    if path.is_dir():
        files = sorted(file for file in path.glob("rows*") if file.suffix in (".jsonl", ".parquet"))
    else:
        files = [path] if path.is_file() and path.suffix in (".jsonl", ".parquet") else []
    if not files:
        raise ValueError(
            f"{path}: no rows here; expected a .jsonl or .parquet file, or a folder with rows*.jsonl"
        )
    return files


def scan(path: Path) -> Iterator[Record]:
    """Every row of `path` (a file or a prepared folder), readable or not, one at a time."""
    for file in row_files(path):
        yield from _scan_jsonl(file) if file.suffix == ".jsonl" else _scan_parquet(file)


def _scan_jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield Record(file, number, orjson.loads(line), line)
            except orjson.JSONDecodeError as error:
                yield Record(file, number, None, line, Problem("format", f"not JSON: {error}"))


def _scan_parquet(file: Path) -> Iterator[Record]:
    try:
        reader = pq.ParquetFile(file)
        missing = sorted(set(KEYS) - set(reader.schema_arrow.names))
        if missing:
            raise ValueError(f"{file}: missing columns {missing}")
        number = 0
        for batch in reader.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Record(file, number, row)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file}: not readable as Parquet: {str(error).splitlines()[0]}"
        ) from error


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file or a prepared folder, in order. Raises `ValueError` naming file, row and reason at the first
    that is not well-formed."""
    for record in scan(path):
        problems = [record.problem] if record.problem else format_problems(record.row)
        if problems:
            raise ValueError(f"{record.file}: row {record.number}: {problems[0]}")
        yield record.row


def count_rows(path: Path) -> int:
    """Number of rows without parsing them: lines of JSONL, the footer of Parquet. Raises `ValueError` as
    `row_files`."""
    total = 0
    for file in row_files(path):
        if file.suffix == ".parquet":
            total += pq.read_metadata(file).num_rows
        else:
            with file.open("rb") as lines:
                total += sum(1 for _ in lines)
    return total
