"""The definition: explicit softmax, in float32 (float64 for float64 input), every policy, every merge, with weights."""

import math
from dataclasses import dataclass

import torch

from fmtrain import masks
from fmtrain.layout import Layout
from fmtrain.merge import Merge, last, sink
from fmtrain.merge import weights as merged_weights
from fmtrain.policies import Policy


@dataclass(frozen=True)
class Prepared:
    masks: masks.Masks | None  # None: every key is seen
    merge: Merge | None
    sink_BQK: torch.Tensor | None = None
    last_BQ: torch.Tensor | None = None
    query_Q: torch.Tensor | None = None


STEP = Prepared(None, None)


def prepare(layout: Layout, policy: Policy, merge: Merge | None, start: int) -> Prepared:
    built = masks.build(policy, layout, start)
    if merge is None:
        return Prepared(built, None)
    query = torch.arange(start, layout.shape[1], device=layout.role.device)
    return Prepared(built, merge, sink(merge, layout, start), last(layout, start), query)


def weights(q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, prepared: Prepared, scale: float) -> torch.Tensor:
    """The attention weights [B, H, Q, K]."""
    exact = torch.promote_types(q_BHQD.dtype, torch.float32)
    k_BHKD = k_BGKD.repeat_interleave(q_BHQD.shape[1] // k_BGKD.shape[1], dim=1)
    scores = (q_BHQD.to(exact) @ k_BHKD.to(exact).transpose(-1, -2)) * scale
    if prepared.masks is None:
        return scores.softmax(-1)
    if prepared.merge is None:
        return scores.masked_fill(~prepared.masks.both_B1QK, -math.inf).softmax(-1)
    return merged_weights(
        prepared.merge,
        scores,
        prepared.masks.past_B1QK,
        prepared.masks.revealed_B1QK,
        prepared.sink_BQK,
        prepared.last_BQ,
        prepared.query_Q,
    )


def attend(q_BHQD, k_BGKD, v_BGKD, prepared: Prepared, scale: float) -> torch.Tensor:
    w_BHQK = weights(q_BHQD, k_BGKD, prepared, scale)
    v_BHKD = v_BGKD.repeat_interleave(q_BHQD.shape[1] // v_BGKD.shape[1], dim=1)
    return (w_BHQK @ v_BHKD.to(w_BHQK.dtype)).to(q_BHQD.dtype)
