"""The light form of a mask (`fmtrain.merge`) at the speed of flash kernels.

In closed form: of query i, with (o, l) its causal attention and log-sum-exp, r the log-sum-exp over
its revealed keys and c = log sum over windows of exp(the largest revealed score in the window),

    normalised      O = (exp(l) o + exp(c) s) / (exp(l) + exp(c))
    not normalised  O = (exp(l) o + exp(c) s) / (exp(l) + exp(r))

where s is the mean value of its sink. With kernel size 1, c = r, which the calls over the revealed
pairs give. With a larger one the scores of the queries that look ahead are made block by block, in
the forward and again in the backward pass, and no value of a later key is touched.

Shape names: N query tokens, M key tokens, n queries that look ahead, H query heads, G key heads, D
head size, K keys of a block.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fmtrain.attention.calls import Part, RealTokens, on
from fmtrain.attention.union import Gradients, chosen, combine, dots
from fmtrain.attention.windows import Windows
from fmtrain.merge import Merge
from fmtrain.policies import Policy


@dataclass(frozen=True)
class Light:
    """What a light form needs beside the calls.

    rows: the queries that look ahead. first: the first tokens of the samples that have such, as
    keys [samples, positions], samples with sinks of like sizes together. last: where the sink of
    each query ends in these, laid behind one another. windows: None for kernel size 1.
    """

    merge: Merge
    rows: torch.Tensor
    first: list[torch.Tensor]
    last: torch.Tensor
    windows: Windows | None

    @classmethod
    def of(
        cls,
        policy: Policy,
        merge: Merge,
        tokens: RealTokens,
        parts: list[Part],
        device: torch.device,
    ) -> "Light":
        rows = np.unique(np.concatenate([part.rows for part in parts]))
        keys = tokens.new[rows]
        samples, own = np.unique(tokens.sample[keys], return_inverse=True)
        starts = np.searchsorted(tokens.sample, samples)
        lengths, of_query = np.unique(_lengths(tokens, keys), return_inverse=True)
        shared = np.array(merge.counts(lengths.tolist()))[of_query]
        count = np.minimum(shared, keys - starts[own] + 1)
        first, begins = _first(starts, own, count)
        last = begins[own] + count - 1
        first = [on(device, np.minimum(each, len(tokens.place) - 1)) for each in first]
        windows = None
        if merge.kernel_size > 1:
            windows = Windows.of(policy, merge, tokens, keys, device)
        return cls(merge, on(device, rows), first, on(device, last), windows)

    def sink(self, v_MGD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The mean value of each query's sink [n, G, D]."""
        means = []
        for first in self.first:
            sizes = torch.arange(1, first.shape[1] + 1, device=v_MGD.device)[:, None, None]
            means.append((v_MGD[first].to(dtype).cumsum(1) / sizes).flatten(0, 1))
        return torch.cat(means).index_select(0, self.last)


def _first(
    starts: np.ndarray, own: np.ndarray, count: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """`Light.first`, and where each sample begins in it. Sizes of sinks in one table differ by less
    than a factor of two, so that it holds at most twice the tokens that count."""
    longest = np.zeros(len(starts), int)
    np.maximum.at(longest, own, count)
    likeness = np.frexp(longest)[1]
    first, begins, end = [], np.zeros_like(starts), 0
    for like in np.unique(likeness):
        samples = np.flatnonzero(likeness == like)
        positions = longest[samples].max()
        first.append(starts[samples, None] + np.arange(positions))
        begins[samples] = end + np.arange(len(samples)) * positions
        end += first[-1].size
    return first, begins


def _lengths(tokens: RealTokens, keys: np.ndarray) -> np.ndarray:
    """Of the prefills of these tokens."""
    return np.bincount(tokens.prefill[tokens.prefill >= 0])[tokens.prefill[keys]]


class LightUnion(torch.autograd.Function):
    """The formulas above; `bias` [H, 1] is added to the scores of what is revealed."""

    @staticmethod
    def forward(ctx, q, k, v, sink, bias, prepared, scale: float):
        light = prepared.light
        rows = light.rows
        out, lse = prepared.past.forward(q, k, v, scale)
        causal, own = lse[:, rows], []
        if light.windows is None:
            revealed = torch.full_like(lse, -torch.inf)
            for call in prepared.ahead:
                lse2 = call.forward(q, k, _unit(k), scale)[1]
                own.append(lse2)
                kept = chosen(lse2, call.kept, 1)
                revealed[:, call.rows] = torch.logaddexp(revealed[:, call.rows], kept)
            pooled = revealed = revealed[:, rows] + bias
        else:
            pooled, revealed = light.windows.forward(q[rows], k, scale)
            pooled = pooled + bias
            revealed = revealed + bias if len(revealed) else pooled  # which nobody asks for
        total = torch.logaddexp(causal, pooled if light.merge.normalize else revealed)
        combine(out, lse, rows, _per_head(sink, q.shape[1]), pooled, total)
        ctx.prepared, ctx.scale = prepared, scale
        ctx.save_for_backward(q, k, v, sink, bias, out, lse, pooled, revealed, *own)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sink, bias, out, lse, pooled, revealed, *own = ctx.saved_tensors
        grad, scale, light = grad.contiguous(), ctx.scale, ctx.prepared.light
        rows, heads, wide = light.rows, q.shape[1], lse.dtype
        gradients = Gradients(ctx.prepared.past.backward(grad, q, k, v, out, lse, lse, scale))
        share = (pooled - lse[:, rows]).exp()
        to_sink = dots(grad[rows], _per_head(sink, heads), wide)
        to_all = dots(grad[rows], out[rows], wide)
        if light.merge.normalize:
            grad_pooled = share * (to_sink - to_all)
            grad_revealed = torch.zeros_like(grad_pooled)
        else:
            grad_pooled = share * to_sink
            grad_revealed = -(revealed - lse[:, rows]).exp() * to_all
        if light.windows is None:
            # The weight of a key is what the kernel makes again; the rest of its gradient is one
            # number a query, here the only component of a gradient of the output.
            along = torch.zeros_like(grad)
            along[rows, :, 0] = (to_sink - to_all).T.to(grad.dtype)
            nothing = torch.zeros_like(out)
            for call, lse2 in zip(ctx.prepared.ahead, own, strict=True):
                inputs = along, q, k, _unit(k), nothing, lse - bias, lse2, scale
                gradients.add(call.queries, call.keys, *call.backward(*inputs)[:2])
        else:
            parts = light.windows.backward(q[rows], k, scale, grad_pooled, grad_revealed)
            gradients.add(rows, None, *parts)
        grad_sink = grad[rows].to(wide) * share.T[..., None]
        grad_sink = grad_sink.unflatten(1, (sink.shape[1], -1)).sum(2)
        grad_bias = None
        if ctx.needs_input_grad[4]:
            grad_bias = (grad_pooled + grad_revealed).sum(1, keepdim=True)
        return *gradients.tensors(), grad_sink, grad_bias, None, None


def _unit(k_MGD: torch.Tensor) -> torch.Tensor:
    """Values of which only the first component is 1."""
    unit = torch.zeros_like(k_MGD)
    unit[..., 0] = 1
    return unit


def _per_head(x_nGD: torch.Tensor, heads: int) -> torch.Tensor:
    copies = heads // x_nGD.shape[1]
    return x_nGD if copies == 1 else x_nGD.repeat_interleave(copies, dim=1)
