"""LLaVA-Instruct-150K (liuhaotian/LLaVA-Instruct-150K: llava_instruct_150k.json, and the 80k,
conversation, detail and complex-reasoning files of the same form; COCO train2017).

One JSON array of {"id", "image": "000000033471.jpg", "conversations": [{"from": "human" | "gpt",
"value"}]}. Ids repeat (one image has up to three dialogues), so a row's id is the record's id and
its row number.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from data_prep.converting import json_stream
from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.conversations import image_names, messages_of, without_opening
from data_prep.converting.fields import field, text_of
from data_prep.converting.rows import Row


def add_options(parser: ArgumentParser) -> None:
    """`--annotations`."""
    parser.add_argument(
        "--annotations",
        default="llava_instruct_150k.json",
        help="file below --source (%(default)r)",
    )


def files(source: Path, options: Options) -> list[Path]:
    """The annotation file."""
    return [source_file(source, options.annotations)]


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """The elements of the array."""
    for number, value in json_stream.array(files[0]):
        yield SourceRecord(files[0], number, value)


def rows(record: SourceRecord, options: Options) -> Iterator[Row | str]:
    """One row a dialogue."""
    value = record.value
    turns = field(value, "conversations", list)
    images = [f"{options.image_folder}/{name}" for name in image_names(value, "image")]
    row_id = f"{text_of(value.get('id', ''), 'id')}#{record.number}"
    messages, left_out = without_opening(messages_of(turns, bool(images)))
    yield {"id": row_id, "source": "llava_instruct", "messages": messages, "images": images}
    yield from left_out


CONVERTER = Converter(
    "llava_instruct",
    __doc__,
    files,
    records,
    rows,
    add_options=add_options,
    image_folder="train2017",
)

if __name__ == "__main__":
    run(CONVERTER)
