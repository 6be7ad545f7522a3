"""The pooled scores of a light form with a kernel larger than 1: for each query that looks ahead
the log-sum-exp over windows of the largest revealed score in each, and over all revealed scores.

Scores are made for a block of queries of one prefill at a time, so that memory is linear in the
length of a row. Both passes are operators of their own, which torch.compile does not look into.

Shape names: n queries that look ahead, M key tokens, H query heads, G key heads, D head size; of a
block g key heads, r queries for each of them, K keys, as many windows (one from each key on).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fmtrain import policies
from fmtrain.attention.calls import RealTokens, on
from fmtrain.merge import Merge
from fmtrain.policies import Policy, sight_on

# Queries and scores of a block: the cache of a core, and what keeps a GPU busy
QUERIES = {"cpu": 64, "cuda": 512}
SCORES = {"cpu": 1 << 19, "cuda": 1 << 26}
PAIRS = 1 << 21  # that a plan keeps for its layers, a byte each


@dataclass(frozen=True)
class Windows:
    """What the windows of the queries that look ahead depend on.

    size: of a window, in keys. anywhere, within_image: the policy's sight. own: the number of each
    query among the keys [n]; places: the same on the CPU, so that no layer waits for a GPU. blocks:
    of each prefill where its queries begin and end and where its keys end, on the CPU [P, 3].
    fields: role, image and prefill of each key [3, M]. hidden: of every block which pairs are not
    revealed, one after the other; empty where they are too many to be kept. normalizer: whether
    the sum over all revealed scores is wanted. In the order of the operators' arguments.
    """

    size: int
    anywhere: torch.Tensor
    within_image: torch.Tensor | None
    own: torch.Tensor
    places: torch.Tensor
    blocks: torch.Tensor
    fields: torch.Tensor
    hidden: torch.Tensor
    normalizer: bool

    @classmethod
    def of(
        cls,
        policy: Policy,
        merge: Merge,
        tokens: RealTokens,
        keys: np.ndarray,
        device: torch.device,
    ) -> "Windows":
        """keys: the numbers of the queries that look ahead among the keys, ascending."""
        prefill = tokens.prefill[keys]
        starts = np.flatnonzero(np.diff(prefill, prepend=-1))
        stops = np.append(starts, len(keys))[1:]
        ends = np.zeros(tokens.prefill.max() + 1, int)
        inside = np.flatnonzero(tokens.prefill >= 0)
        ends[tokens.prefill[inside]] = inside + 1  # the last one of each stays
        cpu = torch.device("cpu")
        blocks = on(cpu, np.stack([starts, stops, ends[prefill[starts]]], axis=1))
        fields = on(device, np.stack([tokens.role, tokens.image, tokens.prefill]))
        what = (*sight_on(device, policy), on(device, keys), on(cpu, keys), blocks, fields)
        hidden = _all_hidden(*what)
        return cls(merge.kernel_size, *what, hidden, not merge.normalize)

    def forward(self, q_nHD, k_MGD, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exp over the windows [H, n], and over the revealed keys [H, n] or [0]."""
        return forward(q_nHD, k_MGD, *self._fields, scale)

    def backward(self, q_nHD, k_MGD, scale: float, *grads) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of q and k from those of what `forward` gives."""
        return backward(q_nHD, k_MGD, *self._fields, scale, *grads)

    @property
    def _fields(self) -> tuple:
        return tuple(vars(self).values())


@torch.library.custom_op("fmtrain::windows_forward", mutates_args=())
def forward(
    q_nHD: torch.Tensor,
    k_MGD: torch.Tensor,
    size: int,
    anywhere: torch.Tensor,
    within_image: torch.Tensor | None,
    own: torch.Tensor,
    places: torch.Tensor,
    blocks: torch.Tensor,
    fields: torch.Tensor,
    hidden: torch.Tensor,
    normalizer: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(q_nHD.dtype, torch.float32)
    pooled_Hn = q_nHD.new_empty(q_nHD.shape[1], q_nHD.shape[0], dtype=wide)
    revealed_Hn = torch.empty_like(pooled_Hn) if normalizer else pooled_Hn.new_empty(0)
    what = anywhere, within_image, own, places, blocks, fields
    for block in _blocks(q_nHD, k_MGD, size, what, hidden):
        scores = block.scores(q_nHD, k_MGD, scale, wide)
        pooled_Hn[block.heads, block.rows] = block.of_heads(_sums(block.largest(scores)))
        if normalizer:
            revealed_Hn[block.heads, block.rows] = block.of_heads(_sums(scores))
    return pooled_Hn, revealed_Hn


@forward.register_fake
def _(q_nHD, k_MGD, *rest):
    normalizer = rest[-2]
    wide = torch.promote_types(q_nHD.dtype, torch.float32)
    sums = q_nHD.new_empty(q_nHD.shape[1], q_nHD.shape[0], dtype=wide)
    return sums, torch.empty_like(sums) if normalizer else sums.new_empty(0)


@torch.library.custom_op("fmtrain::windows_backward", mutates_args=())
def backward(
    q_nHD: torch.Tensor,
    k_MGD: torch.Tensor,
    size: int,
    anywhere: torch.Tensor,
    within_image: torch.Tensor | None,
    own: torch.Tensor,
    places: torch.Tensor,
    blocks: torch.Tensor,
    fields: torch.Tensor,
    hidden: torch.Tensor,
    normalizer: bool,
    scale: float,
    grad_pooled_Hn: torch.Tensor,
    grad_revealed_Hn: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = grad_pooled_Hn.dtype
    grad_q = torch.empty_like(q_nHD, dtype=wide)
    grad_k = torch.zeros_like(
        k_MGD.transpose(0, 1), dtype=wide, memory_format=torch.contiguous_format
    )
    what = anywhere, within_image, own, places, blocks, fields
    for block in _blocks(q_nHD, k_MGD, size, what, hidden):
        scores = block.scores(q_nHD, k_MGD, scale, wide)
        largest = block.largest(scores)
        grad = _spread(largest, scores, block.of_queries(grad_pooled_Hn), size)
        if normalizer:
            grad += scores.softmax(-1) * block.of_queries(grad_revealed_Hn)
        of_q = grad @ block.keys_of(k_MGD, wide)
        grad_q[block.rows, block.heads] = block.of_heads(of_q).transpose(0, 1)
        of_k = grad_k[block.groups, block.keys]
        of_k.baddbmm_(grad.transpose(1, 2), block.queries_of(q_nHD, wide))
    return grad_q.mul_(scale), grad_k.mul_(scale).transpose(0, 1).contiguous()


def _sums(exponents: torch.Tensor) -> torch.Tensor:
    """`logsumexp` over the last dimension; on a CPU log_softmax is faster than that."""
    return exponents.amax(-1) - exponents.log_softmax(-1).amax(-1)


def _spread(largest, scores, grad, size: int) -> torch.Tensor:
    """The gradient of each score: of the log-sum-exp over windows, each of which hands its part to
    the first of its keys with the largest score."""
    left = largest.softmax(-1).mul_(grad)
    # Comparisons to bool are many times dearer than arithmetic on a CPU.
    total = (scores - largest).ge_(0).mul_(left)
    left -= total
    last = min(size, scores.shape[-1]) - 1
    for shift in range(1, last):
        windows = slice(0, scores.shape[-1] - shift)
        here = (scores[..., shift:] - largest[..., windows]).ge_(0).mul_(left[..., windows])
        left[..., windows] -= here
        total[..., shift:] += here
    if last:  # what no other key of a window took
        total[..., last:] += left[..., :-last]
    return total


@backward.register_fake
def _(q_nHD, k_MGD, *rest):
    wide = torch.promote_types(q_nHD.dtype, torch.float32)
    return torch.empty_like(q_nHD, dtype=wide), torch.empty_like(k_MGD, dtype=wide)


@dataclass(frozen=True)
class _Block:
    """Some queries of one prefill, some heads, and the keys behind the first of these queries."""

    rows: slice
    keys: slice
    groups: slice
    heads: slice
    size: int
    closed_nK: torch.Tensor  # 0, or -inf for a key that is not revealed
    before_nK: torch.Tensor  # windows that begin at the query or before; only the first K
    beyond_nK: torch.Tensor  # windows that end behind the prefill; only the last K

    def queries_of(self, q_nHD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[g, r, D]: the query heads of a key head behind one another."""
        q_HnD = q_nHD[self.rows, self.heads].to(dtype).transpose(0, 1)
        return q_HnD.reshape(self.groups.stop - self.groups.start, -1, q_HnD.shape[-1])

    def keys_of(self, k_MGD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return k_MGD[self.keys, self.groups].to(dtype).transpose(0, 1)

    def of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[g, r, ..] as [heads, queries, ..]."""
        return x.reshape(self.heads.stop - self.heads.start, -1, *x.shape[2:])

    def of_queries(self, x_Hn: torch.Tensor) -> torch.Tensor:
        """A number a query and head as [g, r, 1]."""
        groups = self.groups.stop - self.groups.start
        return x_Hn[self.heads, self.rows].reshape(groups, -1, 1)

    def scores(self, q_nHD, k_MGD, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """[g, r, K], -inf where nothing is revealed."""
        q, k = self.queries_of(q_nHD, dtype), self.keys_of(k_MGD, dtype)
        closed = self.closed_nK.repeat(q.shape[1] // len(self.closed_nK), 1)
        return torch.baddbmm(closed.expand(len(q), -1, -1), q * scale, k.transpose(1, 2))

    def largest(self, scores: torch.Tensor) -> torch.Tensor:
        """The largest score of the window that begins at each key [g, r, K], -inf for a window that
        does not count."""
        largest, so_far = torch.empty_like(scores), scores
        for shift in range(1, self.size):
            torch.maximum(so_far[..., :-shift], scores[..., shift:], out=largest[..., :-shift])
            if shift == 1:
                largest[..., -1:] = scores[..., -1:]
            so_far = largest
        by_query = largest.unflatten(1, (-1, len(self.closed_nK)))
        for windows, mask in (
            (by_query[..., : self.before_nK.shape[1]], self.before_nK),
            (by_query[..., by_query.shape[-1] - self.beyond_nK.shape[1] :], self.beyond_nK),
        ):
            windows.masked_fill_(mask, -torch.inf)
        return largest


def _spans(places: torch.Tensor, blocks: torch.Tensor, step: int) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each block."""
    for first, stop, end in blocks.tolist():
        for begin in range(first, stop, step):
            yield slice(begin, min(begin + step, stop)), slice(int(places[begin]) + 1, end)


def _hidden(rows: slice, keys: slice, anywhere, within_image, own, fields) -> torch.Tensor:
    """Which pairs of a block are not revealed [queries, K]."""
    query, index = own[rows, None], torch.arange(keys.start, keys.stop, device=own.device)
    one_sample = torch.zeros((), dtype=torch.int64, device=own.device)
    role, image, prefill = fields
    q = policies.Tokens(role[query], image[query], prefill[query], one_sample, query)
    k = policies.Tokens(role[keys], image[keys], prefill[keys], one_sample, index)
    return ~policies.ahead(anywhere, within_image, q, k)


def _all_hidden(anywhere, within_image, own, places, blocks, fields) -> torch.Tensor:
    """`Windows.hidden`."""
    spans = list(_spans(places, blocks, QUERIES[own.device.type]))
    pairs = sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in spans)
    if pairs > PAIRS:
        return torch.empty(0, dtype=torch.bool, device=own.device)
    each = [_hidden(*span, anywhere, within_image, own, fields).flatten() for span in spans]
    return torch.cat(each)


def _blocks(q_nHD, k_MGD, size: int, scope, hidden: torch.Tensor) -> Iterator[_Block]:
    anywhere, within_image, own, places, blocks, fields = scope
    device, groups, at = q_nHD.device, k_MGD.shape[1], 0
    wide = torch.promote_types(q_nHD.dtype, torch.float32)
    per_group, budget = q_nHD.shape[1] // groups, SCORES[device.type]
    for rows, keys in _spans(places, blocks, QUERIES[device.type]):
        query, index = own[rows, None], torch.arange(keys.start, keys.stop, device=device)
        shape = len(query), len(index)
        if len(hidden):
            here = hidden[at : at + shape[0] * shape[1]].view(shape)
            at += here.numel()
        else:
            here = _hidden(rows, keys, anywhere, within_image, own, fields)
        closed = torch.zeros(shape, dtype=wide, device=device).masked_fill_(here, -torch.inf)
        first_ones = index[: int(places[rows][-1] - places[rows][0])]
        last_ones = index[-(size - 1) :]  # windows that end behind the prefill
        before = first_ones <= query
        beyond = last_ones != query + 1  # but a window that is all that is ahead counts
        together = max(1, budget // (len(query) * per_group * len(index)))
        for group in range(0, groups, together):
            span = slice(group, min(group + together, groups))
            heads = slice(span.start * per_group, span.stop * per_group)
            yield _Block(rows, keys, span, heads, size, closed, before, beyond)
