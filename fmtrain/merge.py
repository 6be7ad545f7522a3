"""The light form of a policy: revealed attention is pooled into the first positions instead of
being attended to.

The "+merge" variants of arXiv 2505.18605. For query i with scaled scores s_i, causal keys P_i and
revealed later keys R_i:

    B_i = softmax of s_i over P_i + R_i
    F_i = B_i on R_i, 0 elsewhere, laid out over the positions i+1 .. end of the prefill
    C_i = sum over s of max_{t<k} F_i[s+t]   (max pooling, stride 1, kernel k: C(B, mu)_{i,1})
    w_i = B_i on P_i, with C_i shared equally among the sample's first `prefix` positions <= i

and w_i is divided by its sum if `normalize`. No value of a later key is used, so keys, values and
the cache are those of causal attention and decoding is plain causal. Where the paper leaves
something open it is an option here: the kernel size (none is given; default 3), how several prefix
positions share (equally), and the normalisation (on). Shape names: B rows, H heads, Q queries, K
keys.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F

from fmtrain.layout import Layout


@dataclass(frozen=True)
class Merge:
    """How the light form pools.

    prefix: how many first positions of the sample share the pooled attention; an int counts
    positions, a float is a fraction of the query's prefill (rounded down, at least 1). kernel_size:
    of the max pooling. normalize: make each row of weights add up to 1 (for kernel size 1 it does
    anyway).
    """

    prefix: int | float = 1
    kernel_size: int = 3
    normalize: bool = True

    @classmethod
    def parse(cls, prefix: int | float | str = 1, **options) -> "Merge":
        """The options as a recipe or a command line gives them, where a prefix may be a text: "4"
        or "0.1"."""
        if isinstance(prefix, str):
            try:
                prefix = int(prefix) if prefix.strip("+-").isdigit() else float(prefix)
            except ValueError as error:
                raise ValueError(
                    f"merge_prefix {prefix!r} is neither a count (4) nor a fraction (0.1)"
                ) from error
        return cls(prefix, **options)

    def __post_init__(self):
        if isinstance(self.prefix, bool) or not isinstance(self.prefix, (int, float)):
            raise ValueError(
                f"merge prefix {self.prefix!r} is neither a count (int) nor a fraction (float)"
            )
        if isinstance(self.prefix, int) and self.prefix < 1:
            raise ValueError(f"merge prefix {self.prefix} is not allowed: a count is 1 or more")
        if isinstance(self.prefix, float) and not 0.0 < self.prefix <= 1.0:
            allowed = "a fraction is above 0.0 and at most 1.0"
            raise ValueError(f"merge prefix {self.prefix} is not allowed: {allowed}")
        size = self.kernel_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"merge kernel_size {size!r} is not allowed: it is an int, 1 or more")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"merge normalize {self.normalize!r} is not true or false")

    def counts(self, lengths: list[int]) -> list[int]:
        """How many first positions share, for queries of prefills of so many tokens."""
        if isinstance(self.prefix, int):
            return [self.prefix] * len(lengths)
        part = Fraction(str(self.prefix))  # 0.65 is 13/20: no rounding; in ints of any size
        return [max(1, length * part.numerator // part.denominator) for length in lengths]


def sink(merge: Merge, layout: Layout, start: int = 0) -> torch.Tensor:
    """The keys that share C_i: bool [B, Q, K], none for padding."""
    position = layout.positions()
    index = torch.arange(layout.shape[1], device=position.device)
    sample = layout.sample[:, start:, None]
    same = (sample == layout.sample[:, None]) & (sample >= 0)
    if isinstance(merge.prefix, int):
        count = torch.full_like(position[:, start:], merge.prefix)
    else:
        prefill = layout.prefill[:, start:, None]
        length = (same & (prefill == layout.prefill[:, None]) & (prefill >= 0)).sum(-1)
        lengths, own = length.unique(return_inverse=True)
        count = torch.tensor(merge.counts(lengths.tolist()), device=length.device)[own]
    return same & (position[:, None] < count[..., None]) & (index <= index[start:, None])


def share(sink_BQK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What each of the keys gets of C_i: equal shares that add up to 1."""
    return sink_BQK.to(dtype) / sink_BQK.sum(-1, keepdim=True).clamp(min=1)


def last(layout: Layout, start: int = 0) -> torch.Tensor:
    """Index of the last token of each query's prefill [B, Q]; -1 for answers and padding."""
    index = torch.arange(layout.shape[1], device=layout.role.device)
    prefill, sample = layout.prefill[:, start:, None], layout.sample[:, start:, None]
    same = (prefill == layout.prefill[:, None]) & (sample == layout.sample[:, None])
    return torch.where(same & (prefill >= 0), index, -1).amax(-1)


@dataclass(frozen=True)
class Pooling:
    """What the weights of one forward need beside the scores: see the definition above.

    past, revealed: the causal keys and the revealed ones of each query, bool. sink: the keys that
    share C_i, bool. last: index of the last token of each query's prefill. query: index of each
    query.
    """

    merge: Merge
    past_B1QK: torch.Tensor
    revealed_B1QK: torch.Tensor
    sink_BQK: torch.Tensor
    last_BQ: torch.Tensor
    query_Q: torch.Tensor

    @classmethod
    def of(
        cls,
        merge: Merge,
        layout: Layout,
        past_B1QK: torch.Tensor,
        revealed_B1QK: torch.Tensor,
        start: int = 0,
    ) -> "Pooling":
        """For the queries from `start` on."""
        query = torch.arange(start, layout.shape[1], device=layout.role.device)
        shared, ends = sink(merge, layout, start), last(layout, start)
        return cls(merge, past_B1QK, revealed_B1QK, shared, ends, query)

    def rows(self, chunk: slice | torch.Tensor) -> "Pooling":
        """For some of the queries, also by their indices."""
        return Pooling(
            self.merge,
            self.past_B1QK[:, :, chunk],
            self.revealed_B1QK[:, :, chunk],
            self.sink_BQK[:, chunk],
            self.last_BQ[:, chunk],
            self.query_Q[chunk],
        )

    def pooled(self, future_BHQK: torch.Tensor) -> torch.Tensor:
        """C_i [B, H, Q]: the sum of the stride-1 maxima of F_i over windows inside i+1 .. last."""
        size = self.merge.kernel_size
        if size == 1:
            return future_BHQK.sum(-1)
        length = future_BHQK.shape[-1]
        kernel = min(size, length)
        # Of one dimension less, torch.compile would compile it anew for every length.
        flat = F.max_pool2d(future_BHQK.flatten(0, 1), (1, kernel), stride=1)
        windows_BHQW = flat.unflatten(0, future_BHQK.shape[:2])
        first = torch.arange(length - kernel + 1, device=future_BHQK.device)
        ends_inside_BQW = first + size - 1 <= self.last_BQ[..., None]
        inside_BQW = (first > self.query_Q[:, None]) & ends_inside_BQW
        many = (windows_BHQW * inside_BQW[:, None]).sum(-1)
        short = (self.last_BQ - self.query_Q < size)[:, None]  # the window is the whole of F_i
        return torch.where(short, future_BHQK.amax(-1), many)

    def weights(self, scores_BHQK: torch.Tensor) -> torch.Tensor:
        """The merged attention weights w [B, H, Q, K], by the definition above."""
        keys = self.past_B1QK | self.revealed_B1QK
        B_BHQK = scores_BHQK.masked_fill(~keys, -math.inf).softmax(-1)
        C_BHQ = self.pooled(B_BHQK * self.revealed_B1QK)
        shares_BQK = share(self.sink_BQK, B_BHQK.dtype)
        w_BHQK = B_BHQK * self.past_B1QK + C_BHQ[..., None] * shares_BQK[:, None]
        if not self.merge.normalize:
            return w_BHQK
        # Other rows are causal, to the last bit.
        looks_ahead = self.revealed_B1QK.any(-1, keepdim=True)
        return torch.where(looks_ahead, w_BHQK / w_BHQK.sum(-1, keepdim=True), w_BHQK)
