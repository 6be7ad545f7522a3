"""Interleaved multi-image dialogues: M4-Instruct (lmms-lab/M4-Instruct-Data:
m4_instruct_annotations.json, the training set of LLaVA-NeXT-Interleave) and Mantis-Instruct
(TIGER-Lab/Mantis-Instruct: SUBSET/train-*.parquet, one subset at a time, with --image_folder for
the folder below the root in which its images were unpacked).

M4: an array of {"sample_id" or "id", "image": [names] or a name, "conversations": [{"from",
"value"}]}. Mantis: rows of {"id", "images": [{"bytes": null, "path"}], "conversation": [{"role",
"content"}]}. `<image>` in a user's turn stands for the next image. `--annotations` is a .json,
.jsonl or .parquet file, or a pattern of several, of one split. A cell with the bytes of its image
needs --embed_images, and its file is not looked for.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from data_prep.converting import json_stream
from data_prep.converting.command import (
    Converter,
    Options,
    SourceRecord,
    files_of_a_split,
    run,
)
from data_prep.converting.conversations import image_names, messages_of, without_opening
from data_prep.converting.fields import field, text_of
from data_prep.converting.parquet import parquet_rows
from data_prep.converting.rows import Row

READERS = {".json": json_stream.array, ".jsonl": json_stream.lines, ".parquet": parquet_rows}


def add_options(parser: ArgumentParser) -> None:
    """`--annotations` and `--name`."""
    parser.add_argument(
        "--annotations",
        default="m4_instruct_annotations.json",
        help="file or pattern below --source",
    )
    parser.add_argument(
        "--name", default="interleave", help="source that the rows name (%(default)r)"
    )


def files(source: Path, options: Options) -> list[Path]:
    """The annotation files, in the order of their names."""
    return files_of_a_split(source, options.annotations, READERS)


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """One a dialogue."""
    dialogues = 0
    for file in files:
        for number, value in READERS[file.suffix](file):
            dialogues += 1
            yield SourceRecord(file, number, value, dialogues)


def rows(record: SourceRecord, options: Options) -> Iterator[Row | str]:
    """One row a dialogue."""
    value = record.value
    mantis = isinstance(value, dict) and "conversation" in value
    turns = field(value, "conversation" if mantis else "conversations", list)
    names = image_names(value, "image" if "image" in value else "images")
    images = [_below(options.image_folder, name) for name in names]
    own_id = text_of(value.get("sample_id", value.get("id", "")), "id")
    row_id = f"{own_id}#{record.context}"
    messages, left_out = without_opening(messages_of(turns, bool(images)))
    yield {"id": row_id, "source": options.name, "messages": messages, "images": images}
    yield from left_out


def _below(folder: str, image: str | dict) -> str | dict:
    return f"{folder}/{image}" if folder and isinstance(image, str) else image


CONVERTER = Converter(
    "interleave", __doc__, files, records, rows, add_options=add_options, image_folder=""
)

if __name__ == "__main__":
    run(CONVERTER)
