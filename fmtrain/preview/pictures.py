"""The pictures of a row as the model gets them: names, sizes, what is seen of them, thumbnails."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fmtrain.command_line import printable
from fmtrain.data.aspect import described, seen
from fmtrain.data.encode import Encoded
from fmtrain.data.images import image_size
from fmtrain.data.views import views

EDGE = 32  # of a thumbnail, in pixels: a character is two of them, one above the other
HALVES = "▀"


@dataclass(frozen=True)
class Picture:
    """A picture of a row: its name, its size and that of its tiles (width, height) in pixels, what
    share of it is seen (None: tiled or resized), and the picture itself, RGB, out of what the model
    gets."""

    name: str
    size: tuple[int, int]
    tiles: int
    tile_size: tuple[int, int]
    seen: float | None
    view: Image.Image


def pictures(
    processor, row: dict, encoded: Encoded, image_root: str, max_pixels: int
) -> list[Picture]:
    """The pictures of an encoded row, in the row's order."""
    root, result = row.get("image_root") or image_root, []
    sources = row.get("images") or []
    for source, view in zip(sources, views(processor, encoded, len(sources)), strict=True):
        size, whole = image_size(source, root, max_pixels), view.image
        result.append(
            Picture(_name(source), size, view.tiles, whole.size, seen(processor, size), whole)
        )
    return result


def _name(source: Any) -> str:
    if isinstance(source, dict):
        return source.get("path") or "embedded image"
    return source if isinstance(source, str) else "a PIL image"


def thumbnail(view: Image.Image) -> Text:
    """A picture in characters, each the colours of two pixels."""
    small = view.copy()
    small.thumbnail((EDGE, EDGE))
    values = np.asarray(small)
    text = Text()
    for upper, lower in zip(values[::2], [*values[1::2], None][: len(values[::2])]):
        for at, colour in enumerate(upper):
            style = f"rgb({','.join(map(str, colour))})"
            if lower is not None:
                style += f" on rgb({','.join(map(str, lower[at]))})"
            text.append(HALVES, style)
        text.append("\n")
    text.rstrip()
    return text


def shown(processor, row: Sequence[Picture], colours: bool) -> Group:
    """What the preview prints of a row's pictures; thumbnails where there are colours."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("image", "file", "pixels", "in the model", "seen"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    for number, picture in enumerate(row):
        whole = "" if picture.seen is None else f"{100 * picture.seen:.1f} %"
        tiles = _size(picture.tile_size)
        if picture.tiles > 1:
            tiles = f"{picture.tiles} tiles of {tiles}"
        name = Text(printable(picture.name), overflow="fold")
        table.add_row(str(number), name, _size(picture.size), tiles, whole)
    thumbnails = Columns([thumbnail(picture.view) for picture in row], padding=(0, 2))
    line = Text(described(processor), "dim")
    return Group("", table, line, *(["", thumbnails] if colours else []))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"
