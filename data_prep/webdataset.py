"""WebDataset shards (github.com/webdataset/webdataset): tars below --source, compressed or not, all
those that --annotations names, of one split.

A sample is what follows on one another under one name up to the first dot: KEY.json is a row in any
form that training reads (messages, conversations, texts, ..), and its pictures are KEY.jpg, or
KEY.0.png, KEY.1.png, ... A row that names its `images` has them in that order, by the names of
files in the shard; the others have the pictures in the order of the numbers in their names. Other
files of a sample are left out and counted, but for videos and sounds, which are refused. The
pictures go into the rows, so --embed_images is needed.
"""

import re
import tarfile
import zlib
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.converting.command import Converter, Options, SourceRecord, files_of_a_split, run
from data_prep.converting.rows import Row
from fmtrain.data import json_rows
from fmtrain.data.row_format import PROMPT, plain

ENDINGS = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "tif", "tiff", "avif", "jp2")
OTHER_MEDIA = ("mp4", "avi", "mkv", "mov", "webm", "wav", "mp3", "flac", "ogg")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # key and ending, which may have dots


def add_options(parser: ArgumentParser) -> None:
    """`--annotations` and `--name`."""
    add = parser.add_argument
    add("--annotations", default="*.tar", help="shards below --source (%(default)r)")
    add("--name", default="webdataset", help="source of rows that name none (%(default)r)")


def files(source: Path, options: Options) -> list[Path]:
    """The shards, in the order of their names."""
    return files_of_a_split(source, options.annotations, ENDINGS)


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """One a sample: the text of its row, and beside it its files by name."""
    for file in files:
        for key, members in _samples(file):
            row = members.pop("json", None)
            text = None if row is None else row.decode(errors="backslashreplace")
            yield SourceRecord(file, key, text, (row, members))


def _samples(file: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files, by ending, of the samples of a shard, one at a time."""
    current, members = None, {}
    try:
        with tarfile.open(file, "r|*") as shard:
            for member in shard:
                found = _NAME.fullmatch(member.name)
                if member.isdir() or found is None:
                    continue
                key, ending = found.groups()
                if not member.isfile() or (ending in members and key == current):
                    raise ValueError(f"{file}: {member.name} is a link, or comes twice")
                if key != current and current is not None:
                    yield current, members
                    members = {}
                content = shard.extractfile(member)
                current, members[ending.lower()] = key, content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file}: not readable as a tar: {error}") from error
    if current is not None:
        yield current, members


def rows(record: SourceRecord, options: Options) -> Iterator[Row | str]:
    """The row of a sample. Raises `ValueError` for a sample without one, and for names of images
    that are not those of its pictures."""
    key, (text, members) = str(record.number), record.context  # the text as bytes
    if text is None:
        held = ", ".join(members) or "nothing"
        raise ValueError(f"sample {key} has no .json, but {held}")
    value = json_rows.parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"its .json is no object, but {str(value)[:80]}")
    kinds = {ending: ending.rpartition(".")[2] for ending in members}
    media = [ending for ending, kind in kinds.items() if kind in OTHER_MEDIA]
    if media:
        raise ValueError(f"it has .{media[0]}, which would be left out; only images are shown")
    pictures = {ending: members[ending] for ending, kind in kinds.items() if kind in IMAGES}
    cells = [
        {"bytes": pictures[ending], "path": f"{key}.{ending}"}
        for ending in _order(key, value, pictures)
    ]
    own = {name: value[name] for name in value if name not in ("images", "image")}
    row = plain({**own, "images": cells}, key)
    if row.pop(PROMPT, 0):
        raise ValueError("it has a prompt and a completion, or says which messages are a prompt")
    row_id = key if row["id"] == key else f"{row['id']}#{key}"
    yield {**row, "id": row_id, "source": row["source"] or options.name}
    for ending in members.keys() - pictures.keys():
        yield f"files .{ending} beside rows"


def _order(key: str, value: dict[str, Any], pictures: dict[str, bytes]) -> list[str]:
    """The endings of the pictures of a sample, in the order of its row's images."""
    named = value.get("images") or value.get("image") or []
    named = named if isinstance(named, list) else [named]
    if not named:
        return sorted(pictures, key=_numbers)
    places = {f"{key}.{ending}": ending for ending in pictures}
    places |= {Path(place).name: ending for place, ending in places.items()} | {
        ending: ending for ending in pictures
    }
    order = [places.get(name) if isinstance(name, str) else None for name in named]
    known = [ending for ending in order if ending is not None]
    if len(known) < len(named) or set(known) < pictures.keys():
        raise ValueError(f"its images {str(named)[:80]} are not its pictures {', '.join(pictures)}")
    return known


def _numbers(ending: str) -> list[tuple[int, str]]:
    """So that 10.png comes behind 2.png."""
    words = re.findall(r"\d+|\D+", ending)
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


CONVERTER = Converter("webdataset", __doc__, files, records, rows, add_options=add_options)

if __name__ == "__main__":
    run(CONVERTER)
