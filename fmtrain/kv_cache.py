"""A cache of keys and values remembers the mask that it was filled under.

What is cached has seen what that mask let it see, so whoever reads it goes on under the same one.
"""

from typing import Any

from transformers import Cache

from fmtrain.masks import Mask

FILLED = "_fmtrain_mask"  # the attribute of a cache that holds its mask
CAUSAL = Mask.of("causal")  # that of a model without one


def cached(cache: Cache | None, mask: Mask) -> int:
    """How many tokens are cached. Raises `ValueError` where that was under another mask."""
    seen = 0 if cache is None else int(cache.get_seq_length())
    filled = getattr(cache, FILLED, None)
    if seen and (filled or CAUSAL) != mask:
        without = "by a model without a mask, or by prefix tuning, whose tokens no layout knows"
        by = f"under '{filled}'" if filled else without
        raise ValueError(
            f"the cache of {seen} tokens was not filled under the mask '{mask}' but {by}: prefill "
            "it under that mask"
        )
    return seen


def remember(output: Any, mask: Mask) -> None:
    """Write on the cache of a forward's output under which mask that ran."""
    for value in output if isinstance(output, tuple) else output.values():
        if isinstance(value, Cache):
            setattr(value, FILLED, mask)
