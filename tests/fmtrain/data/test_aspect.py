"""How a LLaVA-1.5 is shown a picture: padded to a square as LLaVA trains, or cropped; against
pixels that are padded, resized and cut by hand."""

import copy

import families
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaImageProcessorPil

from fmtrain.data.aspect import aspect_of, described, seen, with_aspect
from fmtrain.data.encode import encode

EDGE = 16  # of the tiny CLIP's pictures
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])  # CLIP's, as published
STD = np.array([0.26862954, 0.26130258, 0.27577711])
GRAY = (122, 116, 104)  # the mean in 8 bits, as LLaVA's code has it
SIZES = [(32, 16), (16, 32), (33, 20), (21, 47), (40, 40), (9, 5)]


def llava():
    return families.processor("llava")


def in_model(processor, picture: Image.Image) -> np.ndarray:
    """What the model gets of a picture, floats [height, width, 3]."""
    encoded = encode(processor, [families.user(families.IMAGE, "which?")], [picture], True)
    return encoded.inputs["pixel_values"][0].permute(1, 2, 0).numpy()


def by_hand(picture: Image.Image) -> np.ndarray:
    """The picture in the middle of a gray square (of an odd rest the lesser half goes before it),
    resized, and normalised in double precision."""
    width, height = picture.size
    side = max(width, height)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = GRAY
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(picture)
    small = Image.fromarray(canvas).resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    return (np.asarray(small) / 255 - MEAN) / STD


def bytes_of(pixels: np.ndarray) -> np.ndarray:
    return np.rint((pixels * STD + MEAN) * 255).astype(int)


@pytest.mark.parametrize("size", SIZES)
def test_a_padded_picture_is_the_one_padded_by_hand(size):
    picture = families.photo(1, *size)
    pixels, expected = in_model(with_aspect(llava(), "pad"), picture), by_hand(picture)
    assert (bytes_of(pixels) == bytes_of(expected)).all()
    # float32: a rounding each of the quotient by 255 and of two steps, on values below 4
    assert np.abs(pixels - expected).max() <= 4 * 4 * np.finfo(np.float32).eps


@pytest.mark.parametrize("size", SIZES)
def test_a_cropped_picture_is_the_checkpoints_own(size):
    picture = families.photo(2, *size)
    own = in_model(llava(), picture)
    assert (in_model(with_aspect(llava(), "crop"), picture) == own).all()
    again = with_aspect(with_aspect(llava(), "pad"), "crop")
    assert aspect_of(again) == "crop" and (in_model(again, picture) == own).all()


@pytest.mark.parametrize(("size", "edge"), [((32, 16), (0, 8)), ((16, 32), (8, 0))])
def test_the_border_of_a_picture_is_lost_in_a_crop_alone(size, edge):
    before = families.photo(3, *size)
    after = before.copy()
    after.putpixel(edge, tuple(255 - value for value in before.getpixel(edge)))
    for aspect, moves in (("pad", True), ("crop", False), (None, False)):
        processor = with_aspect(llava(), aspect)
        same = (in_model(processor, before) == in_model(processor, after)).all()
        assert same != moves, aspect


def test_the_checkpoints_processor_is_left_as_it_was():
    own = llava().image_processor
    padded = with_aspect(llava(), "pad")
    assert llava().image_processor is own and aspect_of(llava()) == "crop"
    assert padded is not llava() and aspect_of(padded) == "pad"
    assert with_aspect(llava(), None) is llava() and with_aspect(llava(), "crop") is llava()
    assert with_aspect(padded, None) is padded and with_aspect(padded, "pad") is padded


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_a_saved_processor_gives_the_same_pixels_without_us(aspect, tmp_path):
    processor, picture = with_aspect(llava(), aspect), families.photo(4, 33, 20)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    given = loaded(text=["<image>"], images=[picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(given[0].permute(1, 2, 0), torch.tensor(in_model(processor, picture)))
    assert aspect_of(loaded) == aspect


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name != "llava"])
def test_a_class_that_tiles_is_refused_by_name(family, aspect):
    processor = families.processor(family)
    name = type(processor.image_processor).__name__
    with pytest.raises(ValueError, match=f"image_aspect {aspect} with {name}: .*CLIPImageProc"):
        with_aspect(processor, aspect)
    assert aspect_of(processor) is None and name in described(processor)
    assert with_aspect(processor, None) is processor


def test_do_pad_of_another_class_is_no_padding_to_a_square():
    """CLIP's pads what was cropped, and NeXT's the number of tiles."""
    processor = copy.copy(llava())
    processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}, do_pad=True
    )
    assert aspect_of(processor) == "crop"
    assert aspect_of(with_aspect(processor, "pad")) == "pad"


def test_a_stretched_picture_is_no_cropped_one():
    processor = copy.copy(llava())
    size = {"height": EDGE, "width": EDGE}
    processor.image_processor = LlavaImageProcessorPil(size=size, crop_size=size)
    assert aspect_of(processor) is None and seen(processor, (640, 427)) is None
    with pytest.raises(ValueError, match="image_aspect crop with LlavaImageProcessorPil"):
        with_aspect(processor, "crop")
    larger = {"shortest_edge": 20}
    processor.image_processor = LlavaImageProcessorPil(size=larger, crop_size=size)
    assert seen(processor, (40, 20)) == 0.5 * (16 / 20) ** 2
    with pytest.raises(ValueError, match="image_aspect pad with LlavaImageProcessorPil"):
        with_aspect(processor, "pad")
    processor.image_processor = LlavaImageProcessorPil(size=size, crop_size=size)
    picture = families.photo(5, 33, 20)
    padded = in_model(with_aspect(processor, "pad"), picture)
    assert (bytes_of(padded) == bytes_of(by_hand(picture))).all()


def test_what_is_seen_of_a_picture_is_said():
    assert seen(llava(), (640, 427)) == pytest.approx(427 / 640)
    assert seen(llava(), (300, 400)) == 0.75
    assert seen(llava(), (5, 5)) == 1
    assert seen(with_aspect(llava(), "pad"), (640, 427)) == 1
    assert "of 640 x 427 pixels 66.7 % are seen" in described(llava())
    assert "padded to a square" in described(with_aspect(llava(), "pad"))
