"""Visual Spatial Reasoning (cambridgeltl/visual-spatial-reasoning, data/splits/random or zeroshot:
SPLIT.jsonl; TACL 2023).

One statement a line: {"image": "000000085637.jpg", "image_link", "caption", "label": 0 | 1,
"relation", ...}. The links are never followed. The question is whether the statement is true; the
answer is True or False.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from data_prep.converting import json_stream
from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.fields import field, integer
from data_prep.converting.prompts import add_prompt_option, short_answer
from data_prep.converting.rows import Row, assistant, image_part, user

QUESTION = "Is this statement about the image true or false? "


def add_options(parser: ArgumentParser) -> None:
    """`--split` and `--prompt`."""
    parser.add_argument("--split", choices=("train", "dev", "test"), default="train")
    add_prompt_option(parser)


def files(source: Path, options: Options) -> list[Path]:
    """The lines of the split."""
    return [source_file(source, f"{options.split}.jsonl")]


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """One a line."""
    for number, value in json_stream.lines(files[0]):
        yield SourceRecord(files[0], number, value)


def rows(record: SourceRecord, options: Options) -> Iterator[Row]:
    """One row a statement."""
    value = record.value
    label = integer(value, "label")
    if label not in (0, 1):
        raise ValueError(f"label {label} is neither 0 nor 1")
    yield {
        "id": f"{options.split}-{record.number}",
        "source": "vsr",
        "messages": [
            user(image_part(), short_answer(QUESTION + field(value, "caption"), options.prompt)),
            assistant(("False", "True")[label]),
        ],
        "images": [f"{options.image_folder}/{field(value, 'image')}"],
    }


CONVERTER = Converter(
    "vsr", __doc__, files, records, rows, add_options=add_options, image_folder="images"
)

if __name__ == "__main__":
    run(CONVERTER)
