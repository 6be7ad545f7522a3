"""Whether an image file can be used, and what it looks like.

Two images are taken for the same if their files are equal byte for byte, or if their difference
hashes are close: the image in gray, shrunk to 9 x 8 and to 8 x 9, one bit for each pair of
neighbours that says which is brighter (128 bits). Scaling and JPEG compression leave it nearly
alone; mirroring and cropping do not.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_prep.converting.rows import Problem, unsafe_name
from fmtrain.data.images import open_image, resolve

# Of 128 bits; recompressed and rescaled photographs differ in 0 to 6, unrelated ones in about 64.
SIMILAR = 8
_PLAIN = 3  # with fewer bits set, an image has next to no structure and its hash says nothing


class ImageFacts(NamedTuple):
    """What is known of an image: what is wrong with it, or its two hashes."""

    problem: Problem | None
    content: bytes = b""
    look: tuple[int, int] | None = None  # None also for an image without structure


def examine(source: Any, root: Path) -> ImageFacts:
    """Open an image (a name below `root`, or {"bytes", "path"}) to the end and hash it."""
    embedded = isinstance(source, dict)
    name = source["path"] if embedded else source
    if not embedded:
        reason = unsafe_name(source)
        if reason is not None:
            return ImageFacts(Problem("unsafe path", reason))
        try:
            path = resolve(source, root)
        except ValueError as error:
            kind = "unsafe path" if os.path.lexists(root / source) else "missing image"
            return ImageFacts(Problem(kind, str(error)))
    try:
        data = source["bytes"] if embedded else path.read_bytes()
        image = open_image({"bytes": data, "path": str(name)})
        return ImageFacts(None, content_hash(data), look_hash(image))
    except (ValueError, OSError) as error:
        return ImageFacts(Problem("unreadable image", str(error)))


def examine_all(
    sources: Iterable[Any], root: Path, pool: ThreadPoolExecutor
) -> Iterator[ImageFacts]:
    """`examine` many images in parallel, in their order. Pillow decodes outside of the GIL."""
    return pool.map(lambda source: examine(source, root), sources)


def content_hash(data: bytes) -> bytes:
    """16 bytes that identify the file's content."""
    return hashlib.blake2b(data, digest_size=16).digest()


def look_hash(image: Image.Image) -> tuple[int, int] | None:
    """Difference hash of an image: 64 bits of neighbours in rows and 64 in columns; None for one
    without structure."""
    gray = image.convert("L")
    rows = np.asarray(gray.resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    columns = np.asarray(gray.resize((8, 9), Image.Resampling.LANCZOS), dtype=np.int16)
    bits = np.concatenate([np.diff(rows, axis=1).ravel() > 0, np.diff(columns, axis=0).ravel() > 0])
    if not _PLAIN <= bits.sum() <= 128 - _PLAIN:
        return None
    packed = np.packbits(bits)
    return int.from_bytes(packed[:8].tobytes()), int.from_bytes(packed[8:].tobytes())
