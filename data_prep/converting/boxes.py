"""Boxes as text, the way LLaVA-1.5's files write them: [x1, y1, x2, y2] in [0, 1] rounded to two
decimals.

LLaVA's own code pads an image to a square before it is resized, and the boxes of its mix are
relative to that square (LLaVA issue 606): `square` is for a LLaVA-1.5 trained with `image_aspect:
pad`. Processors that resize an image whole, whatever its shape, want `image`; where an image is
cropped, neither is what the model sees.
"""

from argparse import ArgumentParser
from collections.abc import Sequence

from data_prep.converting.prompts import DESCRIBE, LOCATE
from data_prep.converting.rows import Message, assistant, user
from fmtrain.data.row_format import BOX_FRAMES

TASKS = ("locate", "describe", "both")


def add_box_options(parser: ArgumentParser) -> None:
    """`--task` and `--box_frame`, for data sets of regions and phrases."""
    parser.add_argument(
        "--task", choices=TASKS, default="locate", help="phrase to box, box to phrase, or both"
    )
    parser.add_argument(
        "--box_frame", choices=BOX_FRAMES, default="square", help="what boxes are relative to"
    )


def normalised(box: Sequence[float], size: tuple[float, float], frame: str) -> str:
    """`box` = (x, y, width, height) in pixels of an image of `size` = (width, height), as text.

    What juts out of the image is cut off. Raises `ValueError` for a box or an image without area.
    """
    x, y, box_width, box_height = box
    width, height = size
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + box_width, width), min(y + box_height, height)
    if right <= left or bottom <= top:
        raise ValueError(
            f"box {list(box)} has no area inside the image of {width:g} x {height:g} pixels"
        )
    if frame == "square":
        side = max(width, height)
        dx, dy = (side - width) // 2, (side - height) // 2  # of an odd rest, as it is padded
        left, right, top, bottom = left + dx, right + dx, top + dy, bottom + dy
        width = height = side
    edges = (left / width, top / height, right / width, bottom / height)
    return str([round(edge, 2) for edge in edges])


def turns(phrase: str, box: str, task: str) -> list[list[Message]]:
    """Question and answer for each direction that `task` names."""
    locate = [user(LOCATE.format(phrase.rstrip(". "))), assistant(box)]
    describe = [user(DESCRIBE.format(box)), assistant(phrase)]
    return {"locate": [locate], "describe": [describe], "both": [locate, describe]}[task]
