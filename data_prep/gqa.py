"""GQA (Hudson and Manning, CVPR 2019; version 1.2: questions1.2.zip unpacked, images.zip unpacked).

SPLIT_balanced_questions.json, or the SPLIT_all_questions.json /
train_all_questions/train_all_questions_0..9.json, is an object from question id to {"question",
"answer", "fullAnswer", "imageId", ...}. Some imageIds are not numbers ("n161313").
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from data_prep.converting import json_stream
from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.fields import field, text_of
from data_prep.converting.prompts import add_prompt_option, short_answer
from data_prep.converting.rows import Row, assistant, image_part, user


def add_options(parser: ArgumentParser) -> None:
    """`--split`, `--questions`, `--answer` and `--prompt`."""
    parser.add_argument("--split", choices=("train", "val", "testdev"), default="train")
    parser.add_argument(
        "--questions",
        choices=("balanced", "all"),
        default="balanced",
        help="the data set's two samples",
    )
    parser.add_argument(
        "--answer", choices=("short", "full"), default="short", help="a word, or the full sentence"
    )
    add_prompt_option(parser)


def files(source: Path, options: Options) -> list[Path]:
    """The question file, or the ten of the whole training set."""
    if (options.split, options.questions) == ("train", "all"):
        return [
            source_file(source, f"train_all_questions/train_all_questions_{part}.json")
            for part in range(10)
        ]
    return [source_file(source, f"{options.split}_{options.questions}_questions.json")]


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """One a question."""
    for file in files:
        for key, value in json_stream.members(file):
            yield SourceRecord(file, key, value)


def rows(record: SourceRecord, options: Options) -> Iterator[Row]:
    """One row a question."""
    value = record.value
    question = field(value, "question")
    answer = (
        field(value, "fullAnswer")
        if options.answer == "full"
        else text_of(value.get("answer"), "answer")
    )
    prompt = "plain" if options.answer == "full" else options.prompt
    yield {
        "id": str(record.number),
        "source": "gqa",
        "messages": [user(image_part(), short_answer(question, prompt)), assistant(answer)],
        "images": [f"{options.image_folder}/{text_of(value.get('imageId'), 'imageId')}.jpg"],
    }


CONVERTER = Converter(
    "gqa", __doc__, files, records, rows, add_options=add_options, image_folder="images"
)

if __name__ == "__main__":
    run(CONVERTER)
