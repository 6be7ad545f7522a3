"""`sdpa` or `flash`, whichever was measured to be faster for rows like these.

On a CPU (`eval/results/attention_cpu.md`): `flash` for packed rows, for rows of 2,048 tokens and
more, and of light forms of 128 and more; a dense mask is faster for shorter ones. On other devices
nothing has been measured yet, so `sdpa` serves there unless a recipe says `attention_backend:
flash`.
"""

import torch

from fmtrain.attention import flash, sdpa
from fmtrain.layout import Layout
from fmtrain.masks import Mask

LENGTH, LIGHT_LENGTH = 2048, 128  # tokens of a row
STEP = sdpa.STEP
attend = flash.attend  # which hands on what sdpa has prepared


def prepare(layout: Layout, mask: Mask, start: int):
    chosen = flash if _flash_is_faster(layout, mask) else sdpa
    return chosen.prepare(layout, mask, start)


def _flash_is_faster(layout: Layout, mask: Mask) -> bool:
    long = layout.shape[1] >= (LIGHT_LENGTH if mask.merge else LENGTH)
    return layout.role.device.type == "cpu" and (layout.packed or (mask.looks_ahead and long))


def described(device: torch.device) -> str:
    """What is taken on this device, and why, in a line."""
    if device.type == "cpu":
        return (
            f"flash for packed rows and rows of {LENGTH} tokens or more ({LIGHT_LENGTH} of a light "
            "form), sdpa for others: the faster one on a CPU"
        )
    return f"sdpa; `attention_backend: flash` is exact too, but has not been timed on {device.type}"
