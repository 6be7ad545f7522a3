"""A mask as calls of variable-length attention, without a list of pairs.

What is allowed falls into parts that do not overlap, each of which is a batch of short sequences:

- the past: each sample, causal;
- *squares*: tokens whose roles see each other ahead, in reversed order `r`: the queries r[1:] over
  the keys r[:-1], causal, for in reversed order "earlier" means later in the row. A query among
  them whose role sees nothing ahead is computed and dropped;
- *rectangles*: roles that see others but not themselves: each run of such tokens over the later
  tokens of the roles that it sees, all of them.

So a policy is one call for the past and one for what it reveals; two, if it has both squares and
rectangles. All is planned with NumPy, once a forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fmtrain.attention.union import Call
from fmtrain.layout import Layout, Role
from fmtrain.policies import Policy, sight


@dataclass(frozen=True)
class RealTokens:
    """The real tokens of some rows behind one another, as arrays [M]: the keys.

    place: in the flattened rows. sample, prefill: numbered over all rows, prefill -1 for none; a
    sample stands in one piece, a prefill need not. new: which of them are queries. place_new:
    these, in the flattened rows of queries.
    """

    place: np.ndarray
    role: np.ndarray
    image: np.ndarray
    sample: np.ndarray
    prefill: np.ndarray
    new: np.ndarray
    place_new: np.ndarray

    @classmethod
    def of(cls, layout: Layout, start: int) -> "RealTokens":
        """Of a layout whose queries are the tokens from `start` on. Samples without a query are
        left out. Raises `ValueError` for a sample in several pieces."""
        role, image, prefill, sample = torch.stack(layout.tensors()).cpu().numpy()
        rows, columns = np.nonzero(role != int(Role.PAD))
        number = _numbered(rows, sample[rows, columns])
        if len(_different(rows, sample[rows, columns])[0]) != len(np.unique(number)):
            raise ValueError("backend 'flash': a sample of a packed row stands in several pieces")
        queried = np.isin(number, number[columns >= start])
        rows, columns = rows[queried], columns[queried]
        number = _numbered(rows, sample[rows, columns])
        own = prefill[rows, columns]
        length = role.shape[1]
        new = np.flatnonzero(columns >= start)
        return cls(
            rows * length + columns,
            role[rows, columns],
            image[rows, columns],
            number,
            np.where(own >= 0, _different(number, own)[1], -1),
            new,
            (rows * (length - start) + columns - start)[new],
        )


@dataclass(frozen=True)
class Part:
    """Sequences of queries and keys, by their numbers among the queries; lengths of each, and which
    queries count."""

    queries: np.ndarray
    keys: np.ndarray
    lengths_q: np.ndarray
    lengths_k: np.ndarray
    kept: np.ndarray
    causal: bool

    @property
    def rows(self) -> np.ndarray:
        return self.queries[self.kept]

    def pieces(self, budget: int) -> "Iterator[Part]":
        """The same sequences in parts of at most `budget` queries and keys each, or of one: what a
        call copies of its tokens is as large as it."""
        sizes, first, begin_q, begin_k = self.lengths_q + self.lengths_k, 0, 0, 0
        while first < len(sizes):
            last = first + max(1, np.searchsorted(np.cumsum(sizes[first:]), budget, side="right"))
            lengths_q, lengths_k = self.lengths_q[first:last], self.lengths_k[first:last]
            of_queries = slice(begin_q, begin_q := begin_q + lengths_q.sum())
            of_keys = slice(begin_k, begin_k := begin_k + lengths_k.sum())
            tokens = self.queries[of_queries], self.keys[of_keys]
            yield Part(*tokens, lengths_q, lengths_k, self.kept[of_queries], self.causal)
            first = last

    def call(self, device: torch.device, offsets: np.ndarray) -> Call:
        """offsets: the number of each query among the keys."""
        kept = None if self.kept.all() else on(device, np.flatnonzero(self.kept))
        tokens = on(device, self.queries), on(device, offsets[self.keys])
        sequences = _sequences(device, self.lengths_q, self.lengths_k)
        return Call(*tokens, *sequences, self.causal, kept)


def past(tokens: RealTokens, device: torch.device) -> Call:
    """Causal attention inside each sample."""
    queries, keys = np.bincount(tokens.sample[tokens.new]), np.bincount(tokens.sample)
    return Call(None, None, *_sequences(device, queries, keys), True, None)


def revealed(policy: Policy, tokens: RealTokens) -> list[Part]:
    """What the policy reveals, in at most two parts."""
    # A query sees nothing ahead that is not a query too.
    role, prefill = tokens.role[tokens.new], tokens.prefill[tokens.new]
    image = _different(prefill, tokens.image[tokens.new])[1]
    squares, rectangles = [], []
    for sees, group in zip(map(np.array, sight(policy)), (prefill, image), strict=True):
        for seen in np.unique(sees[sees > 0]):
            alike = np.flatnonzero(sees == seen)  # the roles that see just these
            mutual = (seen >> alike & 1) == 1
            keys = (prefill >= 0) & ((seen >> role & 1) == 1)
            if mutual.any():
                squares.append(_square(group, keys, keys & np.isin(role, alike[mutual])))
            for alone in alike[~mutual]:
                rectangles.append(_rectangles(prefill, role == alone, keys))
    joined = [_joined(squares, causal=True), _joined(rectangles, causal=False)]
    return [part for part in joined if len(part.queries)]


Sequences = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # as in `Part`


def _square(group: np.ndarray, inside: np.ndarray, kept: np.ndarray) -> Sequences:
    """The tokens `inside`, of which the kept ones see all later ones of their group."""
    tokens = np.flatnonzero(inside)[::-1]
    tokens = tokens[np.argsort(group[tokens], kind="stable")]
    starts = np.flatnonzero(np.diff(group[tokens], prepend=-1))
    numbers = np.where(kept[tokens], np.arange(len(tokens)), -1)
    last = np.maximum.reduceat(numbers, starts) if len(starts) else starts
    lengths = np.maximum(last - starts, 0)  # what is behind the last kept one is not asked for
    keys = _ranges(starts, lengths)
    lengths = lengths[lengths > 0]
    return tokens[keys + 1], tokens[keys], lengths, lengths, kept[tokens[keys + 1]]


def _rectangles(group: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> Sequences:
    """Each run of queries with the later keys of its group."""
    order = np.argsort(group, kind="stable")
    group, queries, keys = group[order], queries[order], keys[order]
    columns, before = np.flatnonzero(keys), np.cumsum(keys)
    ends = before[np.searchsorted(group, group, side="right") - 1]  # of the keys of each group
    asking = np.flatnonzero(queries & (ends > before))
    following = before[asking]  # the number of the next key
    runs = np.flatnonzero(np.diff(following, prepend=-1))
    lengths_q = np.diff(np.append(runs, len(asking)))
    lengths_k = ends[asking[runs]] - following[runs]
    chosen = columns[_ranges(following[runs], lengths_k)]
    return order[asking], order[chosen], lengths_q, lengths_k, np.ones(len(asking), bool)


def _joined(parts: list[Sequences], causal: bool) -> Part:
    nothing = (np.zeros(0, int),) * 4 + (np.zeros(0, bool),)
    joined = (np.concatenate(each) for each in zip(nothing, *parts))
    queries, keys, lengths_q, lengths_k, kept = joined
    return Part(queries, keys, lengths_q, lengths_k, kept, causal)


def on(device: torch.device, indices: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(indices)).to(device, torch.int64)


def _sequences(
    device: torch.device, queries: np.ndarray, keys: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Where sequences of these lengths end, and the longest of each, as a call takes them."""
    ends = []
    for lengths in (queries, keys):
        assert (lengths > 0).all(), "a sequence without tokens"
        total = [0, *np.cumsum(lengths).tolist()]
        ends.append(torch.tensor(total, dtype=torch.int32, device=device))
    return ends[0], ends[1], int(queries.max()), int(keys.max())


def _numbered(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The number of the run of equal (outer, inner) that each token stands in."""
    changes = (np.diff(outer, prepend=-2) != 0) | (np.diff(inner, prepend=-2) != 0)
    return np.cumsum(changes) - 1


def _different(outer: np.ndarray, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different pairs (outer, inner), and the number of the pair of each token."""
    pairs = outer * (inner.max(initial=0) + 2) + inner + 1
    different, numbers = np.unique(pairs, return_inverse=True)
    return different, numbers


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, .., so many as each length says, behind one another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
