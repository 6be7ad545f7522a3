"""A-OKVQA (Schwenk et al., ECCV 2022; version 1.0: aokvqa_v1p0_SPLIT.json, COCO 2017 images).

One JSON array of {"image_id", "question_id", "question", "choices": [4], "correct_choice_idx",
"direct_answers": [10], "difficult_direct_answer", "rationales"}. A direct answer is the most common
of the ten. The test split has no answers.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.fields import field, integer, texts
from data_prep.converting.prompts import (
    add_prompt_option,
    letter,
    most_common,
    multiple_choice,
    short_answer,
)
from data_prep.converting.rows import Row, assistant, image_part, user
from data_prep.llava_instruct import records

TASKS = {
    "multiple_choice": ("multiple_choice",),
    "direct": ("direct",),
    "both": ("multiple_choice", "direct"),
}


def add_options(parser: ArgumentParser) -> None:
    """`--split`, `--task` and `--prompt`."""
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument(
        "--task", choices=TASKS, default="multiple_choice", help="letters, words, or a row for each"
    )
    add_prompt_option(parser)


def files(source: Path, options: Options) -> list[Path]:
    """The annotation file of the split."""
    return [source_file(source, f"aokvqa_v1p0_{options.split}.json")]


def rows(record: SourceRecord, options: Options) -> Iterator[Row]:
    """One row a question and task."""
    value = record.value
    question, question_id = field(value, "question"), field(value, "question_id")
    folder = options.image_folder or f"{options.split}2017"
    for task in TASKS[options.task]:
        if task == "direct":
            prompt = short_answer(question, options.prompt)
            answer = most_common(texts(value, "direct_answers"))
        else:
            choices = texts(value, "choices")
            prompt = multiple_choice(question, choices, options.prompt)
            answer = letter(integer(value, "correct_choice_idx"), len(choices))
        yield {
            "id": f"{question_id}-{task}",
            "source": f"aokvqa/{task}",
            "messages": [user(image_part(), prompt), assistant(answer)],
            "images": [f"{folder}/{integer(value, 'image_id'):012d}.jpg"],
        }


CONVERTER = Converter(
    "aokvqa", __doc__, files, records, rows, add_options=add_options, image_folder=""
)

if __name__ == "__main__":
    run(CONVERTER)
