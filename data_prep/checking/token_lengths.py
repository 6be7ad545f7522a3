"""How many tokens a row has under a processor."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.converting.rows import Row

_EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def length_counter(processor_dir: Path, root: Path) -> Callable[[Row], int]:
    """A function that counts a row's tokens as training sees them, images expanded; of these only
    the sizes are read. It raises `ValueError` for a row that cannot be encoded.

    Raises `ValueError` if `processor_dir` holds no processor; nothing is downloaded.
    """
    from transformers import AutoProcessor

    from fmtrain.data.images import image_size
    from fmtrain.data.length import token_count

    try:
        processor = AutoProcessor.from_pretrained(str(processor_dir), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{processor_dir} holds no processor: {reason}") from error

    def tokens(row: Row) -> int:
        sizes = [image_size(image, root) for image in row["images"]]
        return token_count(processor, row["messages"], sizes)

    return tokens


def length_summary(lengths: list[int], limit: int | None) -> dict[str, Any]:
    """Histogram and quantiles of lengths in tokens, and how many are over `limit`."""
    counts, _ = np.histogram(lengths, bins=[*_EDGES, np.inf])
    names = [*(f"{low}-{high - 1}" for low, high in pairwise(_EDGES)), f"{_EDGES[-1]}+"]
    quantiles = {}
    if lengths:
        quantiles = {
            "median": float(np.quantile(lengths, 0.5)),
            "p95": float(np.quantile(lengths, 0.95)),
        }
    return {
        "rows": len(lengths),
        "histogram": {name: int(count) for name, count in zip(names, counts, strict=True)},
        **quantiles,
        "max": max(lengths, default=0),
        "limit": limit,
        "over_limit": None if limit is None else sum(length > limit for length in lengths),
    }
