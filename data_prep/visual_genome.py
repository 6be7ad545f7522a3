"""Visual Genome regions (Krishna et al., IJCV 2017; version 1.2 or 1.4: region_descriptions.json
and image_data.json).

region_descriptions.json is an array of images {"id", "regions": [{"region_id", "x", "y", "width",
"height", "phrase"}]}; image_data.json gives size and URL of an image. The URL is never followed,
but its last folder (VG_100K or VG_100K_2) is the folder of the file. An image is one dialogue or
several, of at most `--turns` regions. Regions that repeat a phrase and box of the same image are
left out and counted, as are regions without area inside the image.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.converting import json_stream
from data_prep.converting.boxes import add_box_options, normalised, turns
from data_prep.converting.command import Converter, Options, SourceRecord, run, source_file
from data_prep.converting.fields import field, integer, number
from data_prep.converting.rows import Message, Row, image_part


def add_options(parser: ArgumentParser) -> None:
    """`--turns`, `--task` and `--box_frame`."""
    parser.add_argument(
        "--turns",
        type=int,
        default=10,
        help="regions a row at the most (%(default)s, as in LLaVA-1.5)",
    )
    add_box_options(parser)


def files(source: Path, options: Options) -> list[Path]:
    """Regions and image sizes."""
    if options.turns < 1:
        raise ValueError(f"--turns must be at least 1, not {options.turns}")
    return [source_file(source, "region_descriptions.json"), source_file(source, "image_data.json")]


def records(files: list[Path], options: Options) -> Iterator[SourceRecord]:
    """Regions of an image, with all images by id."""
    images: dict[int, tuple[str, tuple[float, float]]] = {}
    for row, value in json_stream.array(files[1]):
        try:
            path = "/".join(field(value, "url").split("/")[-2:])
            image_id = integer(value, "image_id" if "image_id" in value else "id")
            images[image_id] = path, (number(value, "width"), number(value, "height"))
        except ValueError as error:
            raise ValueError(f"{files[1]}: row {row}: {error}") from error
    for row, value in json_stream.array(files[0]):
        yield SourceRecord(files[0], row, value, images)


def rows(record: SourceRecord, options: Options) -> Iterator[Row | str]:
    """Dialogues about one image."""
    value, images = record.value, record.context
    image = integer(value, "id")
    if image not in images:
        raise ValueError(f"image {image} is not in image_data.json")
    path, size = images[image]
    exchanges: list[list[Message]] = []
    for exchange in _exchanges(field(value, "regions", list), size, options):
        if isinstance(exchange, str):
            yield exchange
        else:
            exchanges.append(exchange)
    for start in range(0, len(exchanges), options.turns):
        messages = list(chain.from_iterable(exchanges[start : start + options.turns]))
        messages[0]["content"].insert(0, image_part())
        yield {
            "id": f"{image}-{start // options.turns}",
            "source": "visual_genome",
            "messages": messages,
            "images": [f"{options.image_folder}/{path}" if options.image_folder else path],
        }


def _exchanges(
    regions: list[Any], size: tuple[float, float], options: Options
) -> Iterator[list[Message] | str]:
    """Question and answer of every region, or why a region is left out."""
    seen = set()
    for region in regions:
        phrase = field(region, "phrase").strip()
        x, y, width, height = (number(region, key) for key in ("x", "y", "width", "height"))
        if x >= size[0] or y >= size[1] or min(width, height, x + width, y + height) <= 0:
            yield "region without area inside its image"
            continue
        box = normalised((x, y, width, height), size, options.box_frame)
        if (phrase, box) in seen:
            yield "region that repeats a phrase and box of its image"
            continue
        seen.add((phrase, box))
        yield from turns(phrase, box, options.task)


CONVERTER = Converter(
    "visual_genome", __doc__, files, records, rows, add_options=add_options, image_folder=""
)

if __name__ == "__main__":
    run(CONVERTER)
