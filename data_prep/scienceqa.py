"""ScienceQA (Lu et al., NeurIPS 2022: problems.json and pid_splits.json of lupantech/ScienceQA,
images/SPLIT/PID/image.png).

problems.json is an object from problem id to {"question", "choices", "answer": index, "hint",
"image": "image.png" or null, "lecture", "solution", "split", ...}; about half of the problems have
no image. The hint stands before the question.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from data_prep.converting import json_stream
from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.fields import field, integer, texts
from data_prep.converting.prompts import add_prompt_option, letter, multiple_choice
from data_prep.converting.rows import Row, assistant, image_part, user

SPLITS = ("train", "val", "test", "minitrain", "minival", "minitest")


def add_options(parser: ArgumentParser) -> None:
    """`--split`, `--only_images` and `--prompt`."""
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument(
        "--only_images", action="store_true", help="leave out the problems without an image"
    )
    add_prompt_option(parser)


def files(source: Path, options: Options) -> list[Path]:
    """Problems and splits."""
    return [source_file(source, "problems.json"), source_file(source, "pid_splits.json")]


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """One a problem of the split."""
    splits = dict(json_stream.members(files[1]))
    wanted = set(map(str, field(splits, options.split, list)))
    for key, value in json_stream.members(files[0]):
        if key in wanted:
            wanted.discard(key)
            yield SourceRecord(files[0], key, value)
    if wanted:
        missing = f"{len(wanted)} problems of {options.split}"
        raise ValueError(f"{files[0]}: {missing} are missing, such as {min(wanted)}")


def rows(record: SourceRecord, options: Options) -> Iterator[Row]:
    """One row a problem."""
    value, pid = record.value, record.number
    choices = texts(value, "choices")
    image = value.get("image")
    if options.only_images and not image:
        return
    hint = value.get("hint") or ""
    question = f"{hint}\n{field(value, 'question')}".strip()
    prompt = multiple_choice(question, choices, options.prompt)
    folder = options.split.removeprefix("mini")
    yield {
        "id": str(pid),
        "source": "scienceqa",
        "messages": [
            user(image_part(), prompt) if image else user(prompt),
            assistant(letter(integer(value, "answer"), len(choices))),
        ],
        "images": [f"{options.image_folder}/{folder}/{pid}/{field(value, 'image')}"]
        if image
        else [],
    }


CONVERTER = Converter(
    "scienceqa", __doc__, files, records, rows, add_options=add_options, image_folder="images"
)

if __name__ == "__main__":
    run(CONVERTER)
