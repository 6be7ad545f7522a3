"""OCR-VQA (Mishra et al., ICDAR 2019: dataset.json, book covers from Amazon).

An object from book id to {"imageURL", "questions": [...], "answers": [...], "split": 1 | 2 | 3
(train, val, test), ...}. The URL is never followed; its ending is the ending of the image file,
unless `--extension` says that all were saved alike (LLaVA's copy has .jpg only). A book is one
dialogue; as in LLaVA-1.5 the answer prompt stands in its first turn.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_prep.converting import json_stream
from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.fields import field, integer, texts
from data_prep.converting.prompts import add_prompt_option, short_answer
from data_prep.converting.rows import Row, assistant, image_part, user

SPLITS = {"train": 1, "val": 2, "test": 3}


def add_options(parser: ArgumentParser) -> None:
    """`--split`, `--extension` and `--prompt`."""
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument(
        "--extension", help="ending of all image files, such as .jpg; default: as in the URL"
    )
    add_prompt_option(parser)


def files(source: Path, options: Options) -> list[Path]:
    """The one file with all splits."""
    return [source_file(source, "dataset.json")]


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """One a book."""
    for key, value in json_stream.members(files[0]):
        yield SourceRecord(files[0], key, value)


def rows(record: SourceRecord, options: Options) -> Iterator[Row]:
    """One dialogue a book of the split. Raises `ValueError` if questions and answers do not pair
    up."""
    value = record.value
    if integer(value, "split") != SPLITS[options.split]:
        return
    questions, answers = texts(value, "questions"), texts(value, "answers")
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions and {len(answers)} answers")
    messages = []
    for question, answer in zip(questions, answers, strict=True):
        turn = [question] if messages else [image_part(), short_answer(question, options.prompt)]
        messages += [user(*turn), assistant(answer)]
    extension = options.extension or PurePosixPath(field(value, "imageURL")).suffix
    image = f"{options.image_folder}/{record.number}{extension}"
    yield {"id": str(record.number), "source": "ocr_vqa", "messages": messages, "images": [image]}


CONVERTER = Converter(
    "ocr_vqa", __doc__, files, records, rows, add_options=add_options, image_folder="images"
)

if __name__ == "__main__":
    run(CONVERTER)
