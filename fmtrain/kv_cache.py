"""A cache of keys and values remembers the mask that it was filled under.

What is cached has seen what that mask let it see, so whoever reads it goes on under the same one.
"""

from typing import Any

from transformers import Cache

from fmtrain.masks import Mask

FILLED = "_fmtrain_filled"  # the attribute of a cache: its mask, and its tokens at that time


def cached(cache: Cache | None, mask: Mask) -> int:
    """How many tokens are cached. Raises `ValueError` where that was not under the mask. (A cache
    that was emptied and filled anew by a model without one is not told from what it was.)"""
    seen = 0 if cache is None else int(cache.get_seq_length())
    filled, length = getattr(cache, FILLED, (mask, 0))
    if seen > length and mask.looks_ahead:
        where = "by a model without a mask, by prefix tuning, or made of tensors"
    elif seen and _look(filled) != _look(mask):
        where = f"under '{filled}'"
    else:
        return seen
    raise ValueError(
        f"the cache of {seen} tokens was not filled under the mask '{mask}' but {where}: prefill "
        "it under that mask"
    )


def remember(handed: Cache | None, output: Any, mask: Mask) -> None:
    """Write on the cache that a forward was handed, and on that of its output, under which mask it
    was filled."""
    given = output if isinstance(output, tuple) else output.values()
    for cache in (handed, *given):
        if isinstance(cache, Cache):
            setattr(cache, FILLED, (mask, int(cache.get_seq_length())))


def _look(mask: Mask):
    """What decides which tokens are seen, whatever the mask is called."""
    return mask.policy.reveals, mask.policy.within_image, mask.merge
