"""Combined images: several images of a sample in one file, as MileBench's `--combine_image N`.

    python -m eval.milebench.combine --data DIR --tasks TQA .. --images N

writes, for every task, `combined_<N>_images/<sample_id>-<i>.jpg` and `<task>_combined_<N>.json`.
The layout is MileBench's; the font of the captions is Pillow's own, as MileBench's (Arial Unicode)
cannot be shipped.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from eval.milebench.prompt import image_paths, require_inputs
from eval.milebench.tasks import read_json, read_task
from fmtrain.command_line import Parser, guarded, write_whole

SIDE = 800  # pixels; every image is resized to a square of this side
FONT_SIZE = 32  # pixels


@dataclass(frozen=True)
class Grid:
    """One combined file: images first .. first + count - 1 (from 0), row by row in a grid."""

    first: int
    count: int
    columns: int
    rows: int

    @property
    def captions(self) -> list[str]:
        """Captions of the cells, numbered over the whole sample from 1."""
        return [f"Image {self.first + i + 1}" for i in range(self.count)]


def grids(n_images: int, limit: int) -> list[Grid]:
    """How n images go into at most `limit` files.

    Equally many in each but the last, in grids as square as can be.
    """
    each, grids = max((n_images - 1) // limit + 1, 1), []
    for first in range(0, n_images, each):
        count = min(each, n_images - first)
        columns = math.ceil(math.sqrt(count))
        grids.append(Grid(first, count, columns, math.ceil(count / columns)))
    return grids


def paste(grid: Grid, paths: Sequence[str]) -> Image.Image:
    """The combined image of `grid`; paths: those of all images of the sample.

    Raises ValueError for a broken file.
    """
    combined = Image.new("RGB", (grid.columns * SIDE, grid.rows * SIDE))
    draw, font = ImageDraw.Draw(combined), ImageFont.load_default(FONT_SIZE)
    for i, caption in enumerate(grid.captions):
        try:
            with Image.open(paths[grid.first + i]) as image:
                cell = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        except OSError as error:
            raise ValueError(f"{paths[grid.first + i]}: not an image that can be read") from error
        x, y = i % grid.columns * SIDE, i // grid.columns * SIDE
        combined.paste(cell, (x, y))
        place = (x + SIDE // 2, y + SIDE - FONT_SIZE // 2)
        draw.text(place, caption, fill="white", font=font, anchor="ms")
    return combined


def combine_task(data_dir: Path, name: str, limit: int) -> Path:
    """Write the combined images and the annotation of one task; returns the annotation's path.

    Raises ValueError.
    """
    task = read_task(data_dir, name)
    require_inputs(task)
    folder, document = task.path.parent / f"combined_{limit}_images", read_json(task.path)
    folder.mkdir(exist_ok=True)
    for sample, entry in zip(task.samples, document["data"]):
        names = []
        for i, grid in enumerate(grids(len(sample.images), limit)):
            names.append(f"{sample.sample_id}-{i}.jpg")
            paste(grid, image_paths(task, sample)).save(folder / names[-1])
        entry["task_instance"][f"combined_{limit}_images"] = names
    path = task.path.with_name(f"{name}_combined_{limit}.json")
    write_whole(path, json.dumps(document, ensure_ascii=False, indent=1))
    return path


def combine(data: Path, tasks: Sequence[str], images: int) -> None:
    """Combine the images of several tasks."""
    if images < 1:
        raise ValueError(f"--images {images}: at least 1 combined image a sample")
    for name in tasks:
        print(combine_task(data, name, images))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("python -m eval.milebench.combine", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of <task>/<task>.json")
    add("--tasks", nargs="+", required=True, metavar="TASK")
    add("--images", type=int, required=True, metavar="N", help="combined images, at most")
    options = parser.parse_args(arguments)
    return guarded(lambda: combine(options.data, options.tasks, options.images))


if __name__ == "__main__":
    sys.exit(main())
