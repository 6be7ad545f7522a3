"""How a LLaVA-1.5 is shown a picture that is no square: padded, as LLaVA trains it, or cropped, as
the processors of llava-hf do.

Other families resize or tile pictures in ways of their own, of which there is nothing to choose.
The choice is a setting of the image processor, so it is saved with it.
"""

import copy

import transformers

ASPECTS = ("pad", "crop")
# The class of transformers that does both, by the class that a checkpoint has. `do_pad` is of use
# in these alone: CLIP's own pads what it has cropped, that of the others the number of tiles.
_SQUARING = {
    "CLIPImageProcessor": "LlavaImageProcessor",
    "CLIPImageProcessorPil": "LlavaImageProcessorPil",
    "LlavaImageProcessor": "LlavaImageProcessor",
    "LlavaImageProcessorPil": "LlavaImageProcessorPil",
}
_PHOTO = (640, 427)  # pixels, a common size in COCO


def aspect_of(processor) -> str | None:
    """`pad` or `crop`, as the processor of a checkpoint does; None for one that does neither."""
    images = processor.image_processor
    name = type(images).__name__
    if name not in _SQUARING or not images.do_resize:
        return None
    shortest, crop = images.size.get("shortest_edge"), images.crop_size
    if name == _SQUARING[name] and images.do_pad:
        edge = shortest or images.size.get("height")
        whole = not images.do_center_crop or (crop["height"], crop["width"]) == (edge, edge)
        return "pad" if whole else None
    return "crop" if images.do_center_crop and shortest else None


def with_aspect(processor, aspect: str | None):
    """The processor, or a copy that shows pictures as `aspect` says; None: as it does already.

    Raises `ValueError` for an image processor that can do neither.
    """
    if aspect is None or aspect_of(processor) == aspect:
        return processor
    images, changed = processor.image_processor, copy.copy(processor)
    name = type(images).__name__
    if name in _SQUARING:
        squaring = getattr(transformers, _SQUARING[name])
        settings = {**images.to_dict(), "do_pad": aspect == "pad"}
        changed.image_processor = squaring.from_dict(settings)
    if aspect_of(changed) != aspect:
        raise ValueError(
            f"image_aspect {aspect} with {name}: it resizes, cuts or tiles pictures in a way of "
            "its own; LLaVA-1.5's CLIPImageProcessor and LlavaImageProcessor pad or crop them"
        )
    return changed


def seen(processor, size: tuple[int, int]) -> float | None:
    """The share of a picture of this size (width, height) that reaches the model, of a processor
    that pads or crops; None of another."""
    images, aspect = processor.image_processor, aspect_of(processor)
    if aspect is None:
        return None
    if aspect == "pad":
        return 1.0
    shortest, crop = images.size["shortest_edge"], images.crop_size
    across, down = (min(size) * crop[side] / shortest for side in ("width", "height"))
    return min(1.0, across / size[0]) * min(1.0, down / size[1])


def described(processor) -> str:
    """What becomes of a picture that is no square, in a line."""
    aspect, name = aspect_of(processor), type(processor.image_processor).__name__
    if aspect is None:
        return f"images: resized or tiled as {name} does"
    if aspect == "pad":
        return f"images: padded to a square, nothing is cut off (image_aspect: pad; {name})"
    width, height = _PHOTO
    share = f"of {width} x {height} pixels {100 * seen(processor, _PHOTO):.1f} % are seen"
    return f"images: cropped to their middle, {share} (image_aspect: crop; {name})"
