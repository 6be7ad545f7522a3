"""The definition: explicit softmax, in float32 (float64 for float64 input), for every mask, with
weights."""

import math

import torch

from fmtrain.layout import Layout
from fmtrain.masks import Allowed, Mask
from fmtrain.merge import Pooling

Prepared = Allowed | Pooling | None  # of a light form a `Pooling`; None: every key is seen
STEP = None


def prepare(layout: Layout, mask: Mask, start: int) -> Allowed | Pooling:
    allowed = Allowed.of(mask.policy, layout, start)
    if mask.merge is None or allowed.revealed_B1QK is None:
        return allowed
    return Pooling.of(mask.merge, layout, allowed.past_B1QK, allowed.revealed_B1QK, start)


def weights(
    q_BHQD, k_BGKD, prepared: Prepared, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The attention weights [B, H, Q, K]; `bias` [H] or [] is added to the scores of what is
    revealed."""
    exact = torch.promote_types(q_BHQD.dtype, torch.float32)
    k_BHKD = k_BGKD.repeat_interleave(q_BHQD.shape[1] // k_BGKD.shape[1], dim=1)
    scores = (q_BHQD.to(exact) @ k_BHKD.to(exact).transpose(-1, -2)) * scale
    if prepared is None:
        return scores.softmax(-1)
    if bias is not None and prepared.revealed_B1QK is not None:
        moved = scores + bias.to(exact).reshape(-1, 1, 1)  # which may be -inf
        scores = torch.where(prepared.revealed_B1QK, moved, scores)
    if isinstance(prepared, Pooling):
        return prepared.weights(scores)
    return scores.masked_fill(~prepared.both_B1QK, -math.inf).softmax(-1)


def attend(
    q_BHQD, k_BGKD, v_BGKD, prepared: Prepared, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    with torch.autocast(q_BHQD.device.type, enabled=False):  # which would round the scores
        w_BHQK = weights(q_BHQD, k_BGKD, prepared, scale, bias)
        v_BHKD = v_BGKD.repeat_interleave(q_BHQD.shape[1] // v_BGKD.shape[1], dim=1)
        return (w_BHQK @ v_BHKD.to(w_BHQK.dtype)).to(q_BHQD.dtype)
