"""Exact attention under a mask at the speed of flash kernels, with no [T, T] tensor.

What is allowed is cut into calls of variable-length attention (`fmtrain.attention.calls`): one for
the past and, mostly, one for what the policy reveals. Their softmaxes are made one
(`fmtrain.attention.union`). Padding is left out; samples of a packed row are sequences of their
own. The light form is in `fmtrain.attention.light`.

Shape names: B rows, Q queries, K keys of a row; N query tokens, M key tokens, both without padding;
H query heads, G key heads, D head size.
"""

from dataclasses import dataclass
from itertools import chain

import torch

from fmtrain.attention import calls, kernels, sdpa
from fmtrain.attention.light import Light, LightUnion
from fmtrain.attention.union import Call, Gradients, chosen, combine, dots
from fmtrain.layout import Layout
from fmtrain.masks import Mask

STEP = sdpa.STEP
CALL = 8192  # queries and keys of a call on a CPU, which gains nothing by more; a GPU takes all


@dataclass(frozen=True)
class Prepared:
    """The calls of one forward.

    queries, keys: the places of the real tokens in the flattened rows, None for all. light: of
    a light form that pools something here.
    """

    queries: torch.Tensor | None
    keys: torch.Tensor | None
    past: Call
    ahead: list[Call]
    light: Light | None


def prepare(layout: Layout, mask: Mask, start: int) -> Prepared | sdpa.Prepared | sdpa.Light:
    if layout.shape[1] - start == 1:  # a decoded token looks at everything, in one short row
        return sdpa.prepare(layout, mask, start)
    device = layout.role.device
    tokens = calls.RealTokens.of(layout, start)
    if not len(tokens.new):  # padding alone: kernels take no call without a sequence
        return sdpa.prepare(layout, mask, start)
    parts = calls.revealed(mask.policy, tokens)
    light = None
    if mask.merge is not None and parts:
        light = Light.of(mask.policy, mask.merge, tokens, parts, device)
    budget = CALL if device.type == "cpu" else len(tokens.place) * 2
    pieces = chain.from_iterable(part.pieces(budget) for part in parts)
    whole = len(tokens.new) == layout.role.numel()
    return Prepared(
        None if whole else calls.on(device, tokens.place_new),
        None if whole else calls.on(device, tokens.place),
        calls.past(tokens, device),
        [piece.call(device, tokens.new) for piece in pieces],
        light,
    )


def attend(
    q_BHQD,
    k_BGKD,
    v_BGKD,
    prepared: Prepared | sdpa.Prepared | sdpa.Light,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if not isinstance(prepared, Prepared):
        return sdpa.attend(q_BHQD, k_BGKD, v_BGKD, prepared, scale, bias)
    q_BHQD, k_BGKD, v_BGKD = sdpa.lowered(q_BHQD, k_BGKD, v_BGKD)
    with torch.autocast(q_BHQD.device.type, enabled=False):  # which would round the scores
        return _attend(q_BHQD, k_BGKD, v_BGKD, prepared, scale, bias)


def _attend(q_BHQD, k_BGKD, v_BGKD, prepared: Prepared, scale: float, bias) -> torch.Tensor:
    kernels.check(q_BHQD)
    rows, heads, queries, size = q_BHQD.shape
    q_NHD = _tokens(q_BHQD, prepared.queries)
    k_MGD, v_MGD = _tokens(k_BGKD, prepared.keys), _tokens(v_BGKD, prepared.keys)
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    bias = q_NHD.new_zeros(()) if bias is None else bias
    bias_H1 = bias.to(wide).expand(heads)[:, None]
    if prepared.light is None:
        out_NHD = _Union.apply(q_NHD, k_MGD, v_MGD, bias_H1, prepared, scale)
    else:
        sink_nGD = prepared.light.sink(v_MGD, wide)
        out_NHD = LightUnion.apply(q_NHD, k_MGD, v_MGD, sink_nGD, bias_H1, prepared, scale)
    if prepared.queries is not None:  # a padded query gives its own value
        own_BQGD = v_BGKD[:, :, -queries:].transpose(1, 2)
        own_BQHD = own_BQGD.repeat_interleave(heads // own_BQGD.shape[2], dim=2)
        out_NHD = own_BQHD.flatten(0, 1).index_copy(0, prepared.queries, out_NHD)
    return out_NHD.view(rows, queries, heads, size).transpose(1, 2)


def _tokens(x_BHTD: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """The real tokens of all rows behind one another [N, H, D]."""
    return chosen(x_BHTD.transpose(1, 2).flatten(0, 1), index).contiguous()


class _Union(torch.autograd.Function):
    """The softmax over the past and what is revealed, whose scores have `bias` [H, 1] added."""

    @staticmethod
    def forward(ctx, q, k, v, bias, prepared: Prepared, scale: float):
        out, lse = prepared.past.forward(q, k, v, scale)
        own = []  # log-sum-exps, and outputs where the bias learns
        for call in prepared.ahead:
            out2, lse2 = call.forward(q, k, v, scale)
            own += [lse2, out2] if ctx.needs_input_grad[3] else [lse2]
            kept = chosen(lse2, call.kept, 1) + bias
            total = torch.logaddexp(lse[:, call.rows], kept)
            combine(out, lse, call.rows, chosen(out2, call.kept), kept, total)
        ctx.prepared, ctx.scale = prepared, scale
        ctx.save_for_backward(q, k, v, bias, out, lse, *own)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias, out, lse, *own = ctx.saved_tensors
        grad, scale = grad.contiguous(), ctx.scale
        gradients = Gradients(ctx.prepared.past.backward(grad, q, k, v, out, lse, lse, scale))
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        for call in ctx.prepared.ahead:
            lse2 = own.pop(0)
            parts = call.backward(grad, q, k, v, out, lse - bias, lse2, scale)
            gradients.add(call.queries, call.keys, *parts)
            if grad_bias is not None:
                rows, out2 = call.rows, chosen(own.pop(0), call.kept)
                share = (chosen(lse2, call.kept, 1) + bias - lse[:, rows]).exp()
                moved = dots(grad[rows], out2, lse.dtype) - dots(grad[rows], out[rows], lse.dtype)
                grad_bias += (share * moved).sum(1, keepdim=True)
        return *gradients.tensors(), grad_bias, None, None
