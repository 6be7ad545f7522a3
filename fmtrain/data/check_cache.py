"""What the check of a set of rows found, kept on disk, so that neither the next start nor another
process of the same machine checks them again.

A file of the cache is named after all that a check depends on, but for the pictures that rows name:
their stamp is inside. So the first process of a machine looks at every picture's size and time, and
the others take what it left. Only sets without a bad row are kept.
"""

import hashlib
import importlib.metadata
import json
import os
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import datasets
import pyarrow as pa

from fmtrain.command_line import write_whole
from fmtrain.data.files import Rows

FOLDER = "fmtrain_checks"  # in the cache of `datasets`
PACKAGES = ("pillow", "tokenizers", "transformers")  # which read pictures and count tokens


@dataclass(frozen=True)
class Kept:
    """The tokens of every row, and when they were counted."""

    lengths: list[int]
    date: str


def file_of(loaded: Rows, processor, **options) -> Path:
    """The file for these rows, this processor and these options of a check."""
    parts = [
        loaded.rows._fingerprint,  # of files: their paths and times; of rows in memory: all of them
        str(Path(loaded.image_root).resolve()),
        _code(),
        [importlib.metadata.version(package) for package in PACKAGES],
        _hash_of(processor),
        options,
    ]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE, FOLDER, f"{name}.json")


def stamp(loaded: Rows) -> str:
    """A hash of the names, sizes and times of all files of pictures that the rows name."""
    seen = hashlib.sha256()
    for name in sorted(_picture_files(loaded.rows)):
        try:
            status = os.stat(os.path.join(loaded.image_root, name))
        except (OSError, ValueError):  # the check says what is wrong with it
            seen.update(f"{name!r} is not there\n".encode())
        else:
            seen.update(f"{name!r} {status.st_size} {status.st_mtime_ns}\n".encode())
    return seen.hexdigest()


def read(file: Path, rows: int, pictures: str | None) -> Kept | None:
    """What was found, or None; with a stamp only if the pictures still have it."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:  # cut, by a disk that was full or a machine that went down
        return None
    if len(kept["lengths"]) != rows or pictures not in (None, kept["pictures"]):
        return None
    return Kept(kept["lengths"], kept["date"])


def write(file: Path, pictures: str, lengths: list[int]) -> None:
    date = datetime.now().isoformat(" ", "minutes")
    write_whole(file, json.dumps({"date": date, "pictures": pictures, "lengths": lengths}))


def _picture_files(rows: datasets.Dataset) -> set[str]:
    """The names of images that are files; bytes of embedded ones are not read."""
    names = set()
    for chunk in rows.data.column("images").chunks:
        cells = chunk.flatten() if pa.types.is_nested(chunk.type) else chunk
        if pa.types.is_struct(cells.type):
            cells = cells.field("path").filter(cells.field("bytes").is_null())
        names |= {name for name in cells.to_pylist() if isinstance(name, str)}
    return names


def _hash_of(processor) -> str:
    """Of all that a processor saves: its tokenizer, chat templates, sizes and steps of images."""
    seen = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                seen.update(file.name.encode() + file.read_bytes())
    return seen.hexdigest()


def _code() -> str:
    """A hash of the modules that check."""
    seen = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        seen.update(file.read_bytes())
    return seen.hexdigest()
