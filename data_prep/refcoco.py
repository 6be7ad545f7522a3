"""RefCOCO, RefCOCO+ and RefCOCOg (lichengunc/refer: NAME/instances.json and NAME/refs(SPLITTER),
COCO train2014 images).

refs(unc).p is a pickle, of which only plain values are read; the same list as JSON, refs(unc).json,
goes before it. A reference is {"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent",
"sent_id", ...}], ...}; its `file_name` carries the annotation's number and is not the image's,
which instances.json has. RefCOCO and RefCOCO+ are split by `unc` (or `google`), RefCOCOg by `umd`
(or `google`, whose images overlap).
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.converting import json_stream, pickled
from data_prep.converting.boxes import add_box_options, normalised, turns
from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.fields import field, integer, number, to_number
from data_prep.converting.rows import Row, image_part

SETS = ("refcoco", "refcoco+", "refcocog")


def add_options(parser: ArgumentParser) -> None:
    """`--dataset`, `--split_by`, `--split`, `--task` and `--box_frame`."""
    parser.add_argument("--dataset", choices=SETS, default="refcoco")
    parser.add_argument(
        "--split_by", choices=("unc", "umd", "google"), help="default: umd for refcocog, else unc"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test", "testA", "testB"), default="train"
    )
    add_box_options(parser)


def files(source: Path, options: Options) -> list[Path]:
    """References and COCO instances."""
    splitter = options.split_by or ("umd" if options.dataset == "refcocog" else "unc")
    name = f"{options.dataset}/refs({splitter})"
    ending = ".json" if (source / f"{name}.json").is_file() else ".p"
    return [
        source_file(source, f"{name}{ending}"),
        source_file(source, f"{options.dataset}/instances.json"),
    ]


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """References, with the boxes by annotation and the images by id."""
    boxes: dict[int, Any] = {}
    images: dict[int, Any] = {}
    for key, row, value in json_stream.inner_arrays(files[1], "images", "annotations"):
        try:
            if key == "images":
                images[integer(value, "id")] = (
                    field(value, "file_name"),
                    (number(value, "width"), number(value, "height")),
                )
            else:
                boxes[integer(value, "id")] = field(value, "bbox", list)
        except ValueError as error:
            raise ValueError(f"{files[1]}: {key} row {row}: {error}") from error
    read = pickled.array if files[0].suffix == ".p" else json_stream.array
    for row, value in read(files[0]):
        yield SourceRecord(files[0], row, value, (boxes, images))


def rows(record: SourceRecord, options: Options) -> Iterator[Row]:
    """One row a sentence and task, for references of the split."""
    reference, (boxes, images) = record.value, record.context
    if field(reference, "split") != options.split:
        return
    annotation, image = integer(reference, "ann_id"), integer(reference, "image_id")
    if annotation not in boxes or image not in images:
        raise ValueError(f"annotation {annotation} or image {image} is not in instances.json")
    name, size = images[image]
    if len(boxes[annotation]) != 4:
        raise ValueError(
            f"annotation {annotation}: bbox has {len(boxes[annotation])} numbers, not 4"
        )
    box = normalised(
        [to_number(edge, "an edge of bbox") for edge in boxes[annotation]], size, options.box_frame
    )
    for sentence in field(reference, "sentences", list):
        for direction, messages in enumerate(turns(field(sentence, "sent"), box, options.task)):
            messages[0]["content"].insert(0, image_part())
            reference_id, sentence_id = integer(reference, "ref_id"), integer(sentence, "sent_id")
            yield {
                "id": f"{options.dataset}-{reference_id}-{sentence_id}-{direction}",
                "source": options.dataset,
                "messages": messages,
                "images": [f"{options.image_folder}/{name}"],
            }


CONVERTER = Converter(
    "refcoco", __doc__, files, records, rows, add_options=add_options, image_folder="train2014"
)

if __name__ == "__main__":
    run(CONVERTER)
