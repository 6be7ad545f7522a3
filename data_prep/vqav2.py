"""VQAv2 (visualqa.org, v2.0 of 2017: v2_OpenEnded_mscoco_SPLIT2014_questions.json,
v2_mscoco_SPLIT2014_annotations.json).

Questions {"image_id", "question", "question_id"} are joined by question_id with annotations
{"question_id", "multiple_choice_answer", "answers": [{"answer", ...} x 10]}. The answer is the data
set's own `multiple_choice_answer`, which is the most common of the ten; where it is absent, the
most common one is taken.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.converting import json_stream
from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.fields import field, integer, text_of
from data_prep.converting.prompts import add_prompt_option, most_common, short_answer
from data_prep.converting.rows import Row, assistant, image_part, user


def add_options(parser: ArgumentParser) -> None:
    """`--split` and `--prompt`."""
    parser.add_argument("--split", choices=("train", "val"), default="train")
    add_prompt_option(parser)


def files(source: Path, options: Options) -> list[Path]:
    """Questions and annotations of the split."""
    questions = f"v2_OpenEnded_mscoco_{options.split}2014_questions.json"
    return [
        source_file(source, questions),
        source_file(source, f"v2_mscoco_{options.split}2014_annotations.json"),
    ]


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """Questions, with the answers by question id. Raises `ValueError` naming the row of an
    annotation that cannot be read."""
    answers = {}
    for _, number, annotation in json_stream.inner_arrays(files[1], "annotations"):
        try:
            answers[integer(annotation, "question_id")] = _answer(annotation)
        except ValueError as error:
            raise ValueError(f"{files[1]}: row {number}: {error}") from error
    for _, number, question in json_stream.inner_arrays(files[0], "questions"):
        yield SourceRecord(files[0], number, question, answers)


def _answer(annotation: Any) -> str:
    if "multiple_choice_answer" in annotation:
        return text_of(annotation["multiple_choice_answer"], "multiple_choice_answer")
    answers = field(annotation, "answers", list)
    return most_common(
        [text_of(field(answer, "answer", (str, int, float)), "answer") for answer in answers]
    )


def rows(record: SourceRecord, options: Options) -> Iterator[Row]:
    """One row a question."""
    question, answers = record.value, record.context
    question_id, image_id = integer(question, "question_id"), integer(question, "image_id")
    if question_id not in answers:
        raise ValueError(f"question {question_id} has no annotation")
    split = f"{options.split}2014"
    folder = options.image_folder or split
    yield {
        "id": str(question_id),
        "source": "vqav2",
        "messages": [
            user(image_part(), short_answer(field(question, "question"), options.prompt)),
            assistant(answers[question_id]),
        ],
        "images": [f"{folder}/COCO_{split}_{image_id:012d}.jpg"],
    }


CONVERTER = Converter(
    "vqav2", __doc__, files, records, rows, add_options=add_options, image_folder=""
)

if __name__ == "__main__":
    run(CONVERTER)
