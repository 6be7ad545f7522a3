"""The definition: explicit softmax, in float32 (float64 for float64 input), every policy, every
merge, with weights."""

import math
from dataclasses import dataclass

import torch

from fmtrain.layout import Layout
from fmtrain.masks import Allowed, Mask
from fmtrain.merge import Merge, last, sink
from fmtrain.merge import weights as merged_weights


@dataclass(frozen=True)
class Prepared:
    allowed: Allowed | None  # None: every key is seen
    merge: Merge | None
    sink_BQK: torch.Tensor | None = None
    last_BQ: torch.Tensor | None = None
    query_Q: torch.Tensor | None = None


STEP = Prepared(None, None)


def prepare(layout: Layout, mask: Mask, start: int) -> Prepared:
    allowed, merge = Allowed.of(mask.policy, layout, start), mask.merge
    if merge is None:
        return Prepared(allowed, None)
    query = torch.arange(start, layout.shape[1], device=layout.role.device)
    return Prepared(allowed, merge, sink(merge, layout, start), last(layout, start), query)


def weights(
    q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, prepared: Prepared, scale: float
) -> torch.Tensor:
    """The attention weights [B, H, Q, K]."""
    exact = torch.promote_types(q_BHQD.dtype, torch.float32)
    k_BHKD = k_BGKD.repeat_interleave(q_BHQD.shape[1] // k_BGKD.shape[1], dim=1)
    scores = (q_BHQD.to(exact) @ k_BHKD.to(exact).transpose(-1, -2)) * scale
    if prepared.allowed is None:
        return scores.softmax(-1)
    if prepared.merge is None:
        return scores.masked_fill(~prepared.allowed.both_B1QK, -math.inf).softmax(-1)
    return merged_weights(
        prepared.merge,
        scores,
        prepared.allowed.past_B1QK,
        prepared.allowed.revealed_B1QK,
        prepared.sink_BQK,
        prepared.last_BQ,
        prepared.query_Q,
    )


def attend(q_BHQD, k_BGKD, v_BGKD, prepared: Prepared, scale: float) -> torch.Tensor:
    w_BHQK = weights(q_BHQD, k_BGKD, prepared, scale)
    v_BHKD = v_BGKD.repeat_interleave(q_BHQD.shape[1] // v_BGKD.shape[1], dim=1)
    return (w_BHQK @ v_BHKD.to(w_BHQK.dtype)).to(q_BHQD.dtype)
