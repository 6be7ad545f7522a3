"""The pictures of a row as the model gets them, made of the processor's pixels again."""

from typing import NamedTuple

import torch
from PIL import Image

from fmtrain.data.encode import Encoded


class View(NamedTuple):
    """What the model gets of a picture: how many tiles, and the picture as a whole, RGB."""

    tiles: int
    image: Image.Image


def views(processor, encoded: Encoded, count: int) -> list[View]:
    """The views of an encoded row's `count` pictures, in the row's order."""
    shown = []
    for tiles in _tiles(encoded, count):
        # A tiled picture also comes as a whole: first, but behind its tiles in InternVL.
        whole = tiles[0] if encoded.inputs["pixel_values"].ndim == 5 else tiles[-1]
        shown.append(View(len(tiles), _image(processor, whole)))
    return shown


def _tiles(encoded: Encoded, count: int) -> list[torch.Tensor]:
    """What the model gets of each picture: tiles [N, 3, height, width]."""
    if not count:
        return []
    pixels = encoded.inputs["pixel_values"]
    if pixels.ndim == 5:  # padded with black to the most tiles
        return [tiles[tiles.flatten(1).any(1)] for tiles in pixels]
    tokens = torch.bincount(encoded.layout.image[encoded.layout.visual], minlength=count)
    return list(pixels.split((tokens * len(pixels) // tokens.sum()).tolist()))


def _image(processor, pixels: torch.Tensor) -> Image.Image:
    """Normalised pixels [3, height, width] as a picture again."""
    images = processor.image_processor
    mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
    values = (pixels.permute(1, 2, 0) * std + mean).mul(255).round().clamp(0, 255)
    return Image.fromarray(values.byte().numpy())
