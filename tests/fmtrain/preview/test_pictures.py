"""The pictures that the preview shows are those that the model gets."""

import io
import shutil

import families
import numpy as np
import pytest
import torch
import training
from PIL import Image
from rich.console import Console

from fmtrain.data.encode import encode
from fmtrain.preview import command as preview
from fmtrain.preview.pictures import pictures, thumbnail

EDGE = 16  # of the tiny models' pictures


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right and green downwards, so that a part tells where it is from."""
    values = np.zeros((height, width, 3), np.uint8)
    values[..., 0] = np.linspace(0, 255, width)
    values[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    training.workplace(folder, rows=2)
    ramp(640, 427).save(folder / "data" / "img" / "0_0.png")
    return folder


@pytest.fixture
def place(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    training.write_recipe(tmp_path)
    return tmp_path


def shown(place, *arguments: str, colours: bool = True) -> str:
    system = "truecolor" if colours else None
    console = Console(
        width=120, color_system=system, force_terminal=colours, record=True, file=io.StringIO()
    )
    assert preview.main([str(place / "recipe.yaml"), *arguments], console) == 0
    return console.export_text(styles=colours)


def line_of(text: str, name: str) -> list[str]:
    [line] = [line for line in text.splitlines() if name in line]
    return line.split()


def test_names_sizes_and_what_is_seen(place):
    text = shown(place, colours=False)
    assert line_of(text, "img/0_0.png") == "0 img/0_0.png 640 × 427 16 × 16 66.7 %".split()
    assert "images: cropped to their middle" in text and "▀" not in text
    text = shown(place, "--image_aspect", "pad", "--row", "0", "1", colours=False)
    assert line_of(text, "img/0_0.png") == "0 img/0_0.png 640 × 427 16 × 16 100.0 %".split()
    assert line_of(text, "img/1_1.png") == "2 img/1_1.png 24 × 20 16 × 16 100.0 %".split()
    assert "images: padded to a square" in text


def test_a_file_name_cannot_write_to_the_terminal(place):
    name = "img/\x1b[2J.png"
    ramp(20, 20).save(place / "data" / name)
    row = training.read_rows(place)[0] | {"images": [name]}
    training.write_rows(place, [row])
    assert "\x1b[2J" not in shown(place) and "img/" in shown(place)


def test_the_thumbnail_is_what_the_model_gets(place):
    """Of the ramp a crop shows no red below a sixth; padded, gray stands above and below."""
    for aspect in ("crop", "pad"):
        text = shown(place, "--image_aspect", aspect)
        first = next(line for line in text.splitlines() if "▀" in line)
        red = int(first.split("38;2;")[1].split(";")[0])
        gray = first.split("38;2;")[1].startswith("122;116;104;")
        assert gray == (aspect == "pad") and (aspect == "pad" or 255 / 6 - 8 < red < 255 / 6 + 16)


@pytest.mark.parametrize("size", [(6, 4), (4, 5), (5, 3)])
def test_a_character_shows_two_pixels(size):
    view = families.photo(1, *size)
    text, values = thumbnail(view), np.asarray(view)
    console = Console(color_system="truecolor")
    lines = text.split("\n")
    assert [len(line) for line in lines] == [size[0]] * -(-size[1] // 2)
    for down, line in enumerate(lines):
        for across in range(size[0]):
            style = line.get_style_at_offset(console, across)
            upper, lower = style.color, style.bgcolor
            assert tuple(upper.triplet) == tuple(values[2 * down, across])
            if 2 * down + 1 < size[1]:
                assert tuple(lower.triplet) == tuple(values[2 * down + 1, across])
            else:
                assert lower is None


@pytest.mark.parametrize("sizes", [[(16, 16)], [(32, 16)], [(16, 16), (16, 32), (32, 32)]])
def test_the_whole_of_a_tiled_picture_is_shown(family, sizes):
    """In the row's order, each as a whole: within the resizing's blur of the ramp."""
    processor, images = families.processor(family), [ramp(*size) for size in sizes]
    images[0] = images[0].rotate(180)
    messages = [families.user(*[families.IMAGE] * len(sizes), "which?")]
    encoded = encode(processor, messages, images, add_generation_prompt=True)
    found = pictures(processor, {"images": images}, encoded, ".", 10**6)
    assert [picture.size for picture in found] == sizes
    per_tile = torch.bincount(encoded.layout.image[encoded.layout.visual]).tolist()
    for number, (picture, size) in enumerate(zip(found, sizes, strict=True)):
        values = np.asarray(picture.view).astype(int)
        assert picture.tile_size == (EDGE, EDGE) == picture.view.size
        grows = values[11, 11] - values[4, 4]  # OneVision pads a picture among several
        assert ((grows[:2] > 30) if number else (grows[:2] < -30)).all() and grows[2] == 0
        if family == "llava":
            assert picture.tiles == 1 and per_tile[number] == 4
            assert picture.seen == min(size) / max(size)
        else:
            assert picture.seen is None
            assert picture.tiles >= (1 if family != "llava_next" else 2)
