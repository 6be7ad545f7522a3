"""PyTorch's `scaled_dot_product_attention` with one dense boolean mask per batch, shared by heads
and layers.

Where the mask is plain causal (or one query that sees everything) no mask is passed and `is_causal`
is set instead, exactly as transformers does, so that `causal` gives the very same numbers. The
light form with kernel size 1 is one call over the keys twice (`_closed_form`); with a larger kernel
it goes through chunks of queries that are recomputed in the backward pass, so that no [H, T, T]
tensor is ever kept.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fmtrain.attention import reference
from fmtrain.layout import Layout
from fmtrain.masks import Allowed, Mask
from fmtrain.merge import share

CHUNK = 128  # queries at a time in the light form: [B, H, 128, K] scores in float32


@dataclass(frozen=True)
class Prepared:
    mask_B1QK: torch.Tensor | None  # None: no mask is needed beyond `is_causal`
    is_causal: bool
    light: reference.Prepared | None  # of the light form


STEP = Prepared(None, False, None)


def prepare(layout: Layout, mask: Mask, start: int) -> Prepared:
    length = layout.shape[1]
    queries = length - start
    looks_ahead = mask.looks_ahead and queries > 1
    if looks_ahead and mask.merge is not None:
        return Prepared(None, False, reference.prepare(layout, mask, start))
    if not looks_ahead and (start == 0 or queries == 1) and not layout.padded and not layout.packed:
        return Prepared(None, queries > 1, None)
    return Prepared(Allowed.of(mask.policy, layout, start).both_B1QK, False, None)


def attend(q_BHQD, k_BGKD, v_BGKD, prepared: Prepared, scale: float) -> torch.Tensor:
    if prepared.light is None:
        return F.scaled_dot_product_attention(
            q_BHQD,
            k_BGKD,
            v_BGKD,
            attn_mask=prepared.mask_B1QK,
            is_causal=prepared.is_causal,
            scale=scale,
            enable_gqa=q_BHQD.shape[1] != k_BGKD.shape[1],
        )
    if prepared.light.merge.kernel_size == 1:
        return _closed_form(q_BHQD, k_BGKD, v_BGKD, prepared.light, scale)
    return _chunked(q_BHQD, k_BGKD, v_BGKD, prepared.light, scale)


def _closed_form(q_BHQD, k_BGKD, v_BGKD, light: reference.Prepared, scale: float) -> torch.Tensor:
    """Kernel size 1: each revealed key keeps its score but hands over the sink's value.

    One call over every key twice: as a causal key with value [v, 0], as a revealed key with value
    [0, 1]. The softmax runs over the union, so the output is [sum of B v over the causal keys, C].
    """
    D = v_BGKD.shape[-1]
    keys = torch.cat([k_BGKD, k_BGKD], dim=2)
    values = torch.cat(
        [
            F.pad(v_BGKD, (0, 8)),
            F.pad(torch.ones_like(v_BGKD[..., :1]), (D, 7)).expand(*v_BGKD.shape[:-1], D + 8),
        ],
        2,
    )
    keys, queries = (
        F.pad(keys, (0, 8)),
        F.pad(q_BHQD, (0, 8)),
    )  # the kernels want one head size for q, k and v
    mask = torch.cat([light.allowed.past_B1QK, light.allowed.revealed_B1QK], dim=-1)
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        scale=scale,
        enable_gqa=q_BHQD.shape[1] != k_BGKD.shape[1],
    )
    sink_BGQD = share(light.sink_BQK, v_BGKD.dtype)[:, None] @ v_BGKD
    sink_BHQD = sink_BGQD.repeat_interleave(q_BHQD.shape[1] // v_BGKD.shape[1], dim=1)
    return out[..., :D] + out[..., D : D + 1] * sink_BHQD


def _chunked(q_BHQD, k_BGKD, v_BGKD, light: reference.Prepared, scale: float) -> torch.Tensor:
    if q_BHQD.shape[2] <= CHUNK:
        return reference.attend(q_BHQD, k_BGKD, v_BGKD, light, scale)
    outputs = []
    for begin in range(0, q_BHQD.shape[2], CHUNK):
        rows = slice(begin, begin + CHUNK)
        revealed = light.allowed.revealed_B1QK[:, :, rows]
        part = reference.Prepared(
            Allowed(light.allowed.past_B1QK[:, :, rows], revealed),
            light.merge,
            light.sink_BQK[:, rows],
            light.last_BQ[:, rows],
            light.query_Q[rows],
        )
        outputs.append(
            checkpoint(
                reference.attend,
                q_BHQD[:, :, rows],
                k_BGKD,
                v_BGKD,
                part,
                scale,
                use_reentrant=False,
            )
        )
    return torch.cat(outputs, dim=2)
