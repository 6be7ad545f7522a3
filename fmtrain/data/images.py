"""Images from disk, opened safely: inside their folder, of sane size, upright, RGB.

A training file is input from elsewhere. It may name any path, so a name is resolved under a root
and must stay there (symbolic links followed first), URLs are never fetched, and a picture that
would unpack to more than `MAX_PIXELS` is refused before it is decoded.
"""

import contextlib
import functools
import io
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # http:, https:, file:, data:, s3: ...
# Pillow knows more, of which EPS starts a program and others are no pictures.
_FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000", "ICO", "PCX", "QOI",
    "SGI", "TGA",
)  # fmt: skip
MAX_PIXELS = 64_000_000  # 8000 x 8000; the largest images of LLaVA's mixes are below 30 million


def no_file_name(name: Any) -> str | None:
    """Why `name` cannot be that of an image file, whatever the folder holds, or None."""
    if not isinstance(name, str) or not name or "\0" in name:
        return f"image name {name!r:.200} is not a path"
    if _URL.match(name):
        return f"image {name!r:.200} is a URL; only files below the image folder are read"
    return None


def resolve(name: str, root: str | os.PathLike) -> Path:
    """The file that `name` (relative to `root`) means.

    Raises `ValueError`, in one line, for a URL, a path or symbolic link that leaves `root`, and a
    file that is not there.
    """
    reason = no_file_name(name)
    if reason is not None:
        raise ValueError(reason)
    base = Path(root).resolve()
    path = (base / name).resolve()
    if not path.is_relative_to(base):
        raise ValueError(f"image {name!r} lies outside the image folder {base}")
    if not path.is_file():
        raise ValueError(f"image {name!r} does not exist in {base}")
    return path


def open_image(
    source: Any, root: str | os.PathLike = ".", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """An upright RGB image from a file name below `root`, from a `datasets.Image` cell (a dict with
    `bytes` or `path`), or from a PIL image.

    Raises `ValueError`, in one line, for what `resolve` refuses, for more than `max_pixels` pixels,
    for data that Pillow cannot read to the end, and for pixels of which nobody knows what is white.
    """
    return _read(source, root, max_pixels, _upright_rgb)


def image_size(
    source: Any, root: str | os.PathLike = ".", max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Width and height in pixels that `open_image` would give, read from the header alone; the same
    errors."""
    return _read(source, root, max_pixels, _upright_size)


def _read(source: Any, root: str | os.PathLike, max_pixels: int, use):
    if isinstance(source, Image.Image):
        shown, opened = "a PIL image", functools.partial(contextlib.nullcontext, source)
    else:
        name = source.get("path") or "embedded image" if isinstance(source, dict) else source
        embedded = isinstance(source, dict) and source.get("bytes") is not None
        file = io.BytesIO(source["bytes"]) if embedded else resolve(name, root)
        shown, opened = repr(name), functools.partial(Image.open, file, formats=_formats())
    try:
        with _WHOLE_FILES_ONLY, opened() as image:
            return use(_limited(image, shown, max_pixels), shown)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image {shown} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"image {shown} cannot be read: not an image in a format of {', '.join(_FORMATS)}"
        ) from error
    except (OSError, SyntaxError, EOFError) as error:  # Pillow's decoders, of broken data
        reason = str(error).split("\n")[0]
        raise ValueError(f"image {shown} cannot be read: {reason}") from error


def _formats() -> list[str]:
    """Those of `_FORMATS` that this Pillow reads; AVIF is new."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


class _WholeFilesOnly:
    """While any thread is inside, Pillow refuses truncated images, which some packages tell it, for
    the whole process, to fill up with grey."""

    def __init__(self):
        self._lock, self._inside, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:  # one thread's restoring must not reach into another's reading
            if ImageFile.LOAD_TRUNCATED_IMAGES or not self._inside:
                self._before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._inside += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_WHOLE_FILES_ONLY = _WholeFilesOnly()
os.register_at_fork(after_in_child=_WHOLE_FILES_ONLY.__init__)  # where those threads are not


def _limited(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        size = f"{width} x {height} = {width * height} pixels"
        raise ValueError(f"image {name} has {size}, over the limit of {max_pixels}")
    return image


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F" or upright.mode.startswith("I"):
        upright = _eight_bits(upright, name)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        canvas = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(canvas, upright.convert("RGBA")).convert("RGB")
    return upright.convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Gray of 16 bits, 32 bits or floating point in 8 bits; Pillow would cut off what is over 255.

    White is 65535 of 16 bits; of 32 bits 65535 or, if no value is higher, 255; of floating point
    255 or, if no value is higher, 1. Raises `ValueError` for values outside of these.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    whites = {"F": (1, 255), "I": (255, 65535)}.get(image.mode, (65535,))
    if not 0 <= low <= high <= whites[-1]:
        raise ValueError(
            f"image {name} cannot be read: its values run from {low:g} to {high:g}, and which of "
            "them is white is not known; store it with 8 or 16 bits"
        )
    white = whites[0] if high <= whites[0] else whites[-1]
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    width, height = image.size
    # Looking for a PNG's EXIF would decode all of it.
    header = image.format != "PNG" or "exif" in image.info
    turned = header and image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the sides
    return (height, width) if turned else (width, height)
