"""PyTorch's `scaled_dot_product_attention` with one dense boolean mask per batch, shared by heads
and layers.

Where the mask is plain causal (or one query that sees everything) no mask is passed and `is_causal`
is set instead, exactly as transformers does, so that `causal` gives the very same numbers. A light
form is causal attention, and for the queries that look ahead, in kernel size 1, one call over the
keys twice (`_closed_form`); with a larger kernel it goes through chunks of queries that are
recomputed in the backward pass, so that no [H, T, T] tensor is ever kept.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fmtrain.attention import reference
from fmtrain.layout import Layout
from fmtrain.masks import Allowed, Mask
from fmtrain.merge import Pooling, share

CHUNK = 128  # queries at a time in the light form: [B, H, 128, K] scores in float32


@dataclass(frozen=True)
class Prepared:
    """One call of `scaled_dot_product_attention`; no mask where `is_causal` says enough."""

    mask_B1QK: torch.Tensor | None
    is_causal: bool


STEP = Prepared(None, False)


@dataclass(frozen=True)
class Light:
    """Causal attention, and the pooling of the queries `rows` [n] that look ahead in some row."""

    causal: Prepared
    rows: torch.Tensor
    pooling: Pooling


def prepare(layout: Layout, mask: Mask, start: int) -> Prepared | Light:
    queries = layout.shape[1] - start
    looks_ahead = mask.looks_ahead and queries > 1
    if looks_ahead and mask.merge is not None:
        pooling = reference.prepare(layout, mask, start)
        assert isinstance(pooling, Pooling)
        [rows] = pooling.revealed_B1QK.any(-1).flatten(0, 1).any(0).nonzero(as_tuple=True)
        causal = prepare(layout, Mask.of("causal"), start)
        if not len(rows):
            return causal
        assert isinstance(causal, Prepared)
        return Light(causal, rows, pooling.rows(rows))
    if not looks_ahead and (start == 0 or queries == 1):
        if not layout.padded and not layout.packed:
            return Prepared(None, queries > 1)
    return Prepared(Allowed.of(mask.policy, layout, start).both_B1QK, False)


def attend(
    q_BHQD,
    k_BGKD,
    v_BGKD,
    prepared: Prepared | Light,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if isinstance(prepared, Light):
        _require_none(bias)
        q_BHQD, k_BGKD, v_BGKD = lowered(q_BHQD, k_BGKD, v_BGKD)
        with torch.autocast(q_BHQD.device.type, enabled=False):  # which would round the scores
            return _light(q_BHQD, k_BGKD, v_BGKD, prepared, scale)
    if prepared.mask_B1QK is not None and q_BHQD.shape[2] > 1:  # nothing is ahead of the last token
        _require_none(bias)
    return F.scaled_dot_product_attention(
        q_BHQD,
        k_BGKD,
        v_BGKD,
        attn_mask=prepared.mask_B1QK,
        is_causal=prepared.is_causal,
        scale=scale,
        enable_gqa=q_BHQD.shape[1] != k_BGKD.shape[1],
    )


def lowered(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As autocast, where it is on, hands them to `scaled_dot_product_attention`."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(device)) for each in tensors)


def _light(q_BHQD, k_BGKD, v_BGKD, prepared: Light, scale: float) -> torch.Tensor:
    out_BHQD = attend(q_BHQD, k_BGKD, v_BGKD, prepared.causal, scale)
    pooled = _closed_form if prepared.pooling.merge.kernel_size == 1 else _chunked
    ahead = pooled(q_BHQD[:, :, prepared.rows], k_BGKD, v_BGKD, prepared.pooling, scale)
    return out_BHQD.index_copy(2, prepared.rows, ahead)


def _require_none(bias: torch.Tensor | None) -> None:
    if bias is not None:
        raise ValueError("backend 'sdpa' adds no bias to what is revealed; take flash or reference")


def _closed_form(q_BHQD, k_BGKD, v_BGKD, pooling: Pooling, scale: float) -> torch.Tensor:
    """Kernel size 1: each revealed key keeps its score but hands over the sink's value.

    One call over every key twice: as a causal key with value [v, 0], as a revealed key with value
    [0, 1]. The softmax runs over the union, so the output is [sum of B v over the causal keys, C].
    """
    D, H, G = v_BGKD.shape[-1], q_BHQD.shape[1], k_BGKD.shape[1]
    ones = F.pad(torch.ones_like(v_BGKD[..., :1]), (D, 7))
    values = torch.cat([F.pad(v_BGKD, (0, 8)), ones.expand(*v_BGKD.shape[:-1], D + 8)], dim=2)
    # The kernels want one head size for q, k and v.
    keys = F.pad(torch.cat([k_BGKD, k_BGKD], dim=2), (0, 8))
    queries = F.pad(q_BHQD, (0, 8))
    mask = torch.cat([pooling.past_B1QK, pooling.revealed_B1QK], dim=-1)
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=H != G
    )
    sink_BGQD = share(pooling.sink_BQK, v_BGKD.dtype)[:, None] @ v_BGKD
    return out[..., :D] + out[..., D : D + 1] * sink_BGQD.repeat_interleave(H // G, dim=1)


def _chunked(q_BHQD, k_BGKD, v_BGKD, pooling: Pooling, scale: float) -> torch.Tensor:
    if q_BHQD.shape[2] <= CHUNK:
        return reference.attend(q_BHQD, k_BGKD, v_BGKD, pooling, scale)
    return _in_chunks(q_BHQD, k_BGKD, v_BGKD, pooling, scale)


@torch.compiler.disable()  # which would unroll the loop, for every length anew
def _in_chunks(q_BHQD, k_BGKD, v_BGKD, pooling: Pooling, scale: float) -> torch.Tensor:
    outputs = []
    for begin in range(0, q_BHQD.shape[2], CHUNK):
        chunk = slice(begin, begin + CHUNK)
        inputs = q_BHQD[:, :, chunk], k_BGKD, v_BGKD, pooling.rows(chunk), scale
        outputs.append(checkpoint(reference.attend, *inputs, use_reentrant=False))
    return torch.cat(outputs, dim=2)
