"""MileBench (FreedomIntelligence/MileBench as of May 2024, arXiv 2404.18532), for evaluation only.

DATASET/DATASET.json is {"meta_data": {"task_instruction": [...], ...}, "data": [{"sample_id",
"task_instruction_id", "task_instance": {"context", "images_path": [...], "choice_list": [...]},
"response"}]}, images in DATASET/images. In the context {image#k} and {table#k} stand for the k-th
image; what the model is shown follows MileBench's own prompt.

The rows' `source` begins with `evaluation_only/`, by which training and `data_prep.check` refuse
them; `--force_training` leaves the mark out.
"""

import re
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.converting import json_stream
from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.fields import field, integer, shown, text_of, texts
from data_prep.converting.prompts import lettered
from data_prep.converting.rows import Part, Row, assistant, image_part, text_part, user

_MARK = re.compile(r"\{(?:image|table)#(\d+)\}")
_UNLETTERED = "GPR1200"  # has more choices than there are letters


def add_options(parser: ArgumentParser) -> None:
    """`--datasets`."""
    parser.add_argument(
        "--datasets", nargs="+", metavar="NAME", help="such as ALFRED; default: all below --source"
    )


def files(source: Path, options: Options) -> list[Path]:
    """The annotation file of every data set."""
    names = options.datasets or sorted(
        f.name for f in source.iterdir() if (f / f"{f.name}.json").is_file()
    )
    if not names:
        raise ValueError(f"{source} has no DATASET/DATASET.json")
    return [source_file(source, f"{name}/{name}.json") for name in names]


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """Samples, with the data set's instructions."""
    for file in files:
        document = dict(json_stream.members(file))
        try:
            instructions = field(
                field(document, "meta_data", dict), "task_instruction", (list, dict)
            )
            samples = field(document, "data", list)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        for number, sample in enumerate(samples, start=1):
            yield SourceRecord(file, number, sample, instructions)


def rows(record: SourceRecord, options: Options) -> Iterator[Row]:
    """One row a sample."""
    sample, instructions = record.value, record.context
    name = record.file.parent.name
    instance = field(sample, "task_instance", dict)
    prompt = f"{_instruction(sample, instructions)}\n{field(instance, 'context')}"
    if "choice_list" in instance:
        choices = texts(instance, "choice_list")
        listed = choices if name == _UNLETTERED or len(choices) > 26 else lettered(choices)
        prompt += "\n".join(["\nChoice list: ", *listed, "Your answer is: "])
    content, images = _with_images(prompt, field(instance, "images_path", list))
    yield {
        "id": f"{name}-{integer(sample, 'sample_id')}",
        "source": f"milebench/{name}",
        "messages": [user(*content), assistant(text_of(sample.get("response"), "response"))],
        "images": [f"{name}/images/{image}" for image in images],
    }


def _instruction(sample: Any, instructions: Any) -> str:
    key = field(sample, "task_instruction_id", (int, str))
    if isinstance(instructions, dict) and str(key) in instructions:
        return field(instructions, str(key))
    if isinstance(instructions, list) and isinstance(key, int) and 0 <= key < len(instructions):
        return text_of(instructions[key], "task_instruction")
    raise ValueError(
        f"task_instruction_id {shown(key)} is not among the {len(instructions)} instructions"
    )


def _with_images(prompt: str, names: list[Any]) -> tuple[list[Part], list[str]]:
    """The prompt in parts, and the image of each image part. An image may be shown more than once.

    Raises `ValueError` for a mark without an image and for an image that is nowhere shown.
    """
    pieces = _MARK.split(prompt)
    parts, shown_numbers = [], []
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append(image_part())
            shown_numbers.append(int(piece))
        elif piece.strip():
            parts.append(text_part(piece))
    wrong = set(range(1, len(names) + 1)).symmetric_difference(shown_numbers)
    if wrong:
        raise ValueError(
            f"{len(names)} images, but the context and images_path disagree on image {min(wrong)}"
        )
    return parts, [
        text_of(names[number - 1], "an entry of 'images_path'") for number in shown_numbers
    ]


CONVERTER = Converter(
    "milebench", __doc__, files, records, rows, add_options=add_options, evaluation_only=True
)

if __name__ == "__main__":
    run(CONVERTER)
