"""One softmax from several calls over disjoint keys.

With each part's output o and log-sum-exp l,

    L = log(exp(l1) + exp(l2)),    O = exp(l1 - L) o1 + exp(l2 - L) o2

and each part's own backward gives its part of the gradients if it is handed O and L in place of o
and l (as in ring attention, arXiv 2310.01889). Shape names: N query tokens, M key tokens, H query
heads, G key heads, D head size.
"""

from dataclasses import dataclass

import torch

from fmtrain.attention import kernels


@dataclass(frozen=True)
class Call:
    """One call of variable-length attention over some of the tokens of a batch.

    queries, keys: which tokens, int64, None for all in their order. ends_q, ends_k: int32, 0 and
    where each sequence ends among them. kept: which of the queries count, None for all; the others
    are computed and dropped.
    """

    queries: torch.Tensor | None
    keys: torch.Tensor | None
    ends_q: torch.Tensor
    ends_k: torch.Tensor
    longest_q: int
    longest_k: int
    causal: bool
    kept: torch.Tensor | None

    @property
    def rows(self) -> torch.Tensor:
        """The tokens whose queries count, of a call over some."""
        assert self.queries is not None
        return chosen(self.queries, self.kept)

    def forward(self, q_NHD, k_MGD, v_MGD, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp [H, N] of its queries."""
        tensors = chosen(q_NHD, self.queries), chosen(k_MGD, self.keys), chosen(v_MGD, self.keys)
        return kernels.forward(*tensors, *self._sequences, scale)

    def backward(
        self, grad_NHD, q_NHD, k_MGD, v_MGD, out_NHD, lse_HN, own_HN, scale: float
    ) -> list[torch.Tensor]:
        """Its part of the gradients, of its own queries and keys. grad, out and lse are those of
        all tokens, less what was added to the scores; own: the log-sum-exp of `forward`."""
        grad, lse = chosen(grad_NHD, self.queries), chosen(lse_HN, self.queries, 1)
        if self.kept is not None:  # a dropped query has no gradient, and its own sum
            grad = torch.zeros_like(grad).index_copy(0, self.kept, grad[self.kept])
            lse = own_HN.index_copy(1, self.kept, lse[:, self.kept])
        tensors = chosen(q_NHD, self.queries), chosen(k_MGD, self.keys), chosen(v_MGD, self.keys)
        inputs = grad, *tensors, chosen(out_NHD, self.queries), lse
        return list(kernels.backward(*inputs, *self._sequences, scale))

    @property
    def _sequences(self) -> tuple[torch.Tensor, torch.Tensor, int, int, bool]:
        return self.ends_q, self.ends_k, self.longest_q, self.longest_k, self.causal


def chosen(x: torch.Tensor, index: torch.Tensor | None, dim: int = 0) -> torch.Tensor:
    """Those at `index`, None for all."""
    return x if index is None else x.index_select(dim, index)


def combine(out_NHD, lse_HN, rows, other_nHD, other_Hn, total_Hn) -> None:
    """Add another output at `rows`, in place. other_Hn: its log-sum-exp; total: that of the whole,
    which is the new one."""
    before = lse_HN[:, rows]
    whole = out_NHD[rows].to(lse_HN.dtype).mul_(_of_heads((before - total_Hn).exp()))
    whole.addcmul_(other_nHD.to(whole.dtype), _of_heads((other_Hn - total_Hn).exp()))
    out_NHD[rows] = whole.to(out_NHD.dtype)
    lse_HN[:, rows] = total_Hn


def dots(x_NHD: torch.Tensor, y_NHD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x . y of each token and head [H, N]."""
    return (x_NHD.to(dtype) * y_NHD.to(dtype)).sum(-1).T


def _of_heads(x_HN: torch.Tensor) -> torch.Tensor:
    return x_HN.T[..., None]


class Gradients:
    """Sums of the parts' gradients of q, k and v: in float32 at least, as keys may come in several
    sequences."""

    def __init__(self, past: list[torch.Tensor]):
        self._types = [grad.dtype for grad in past]
        self._sums = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in past]

    def add(self, queries, keys, *parts: torch.Tensor) -> None:
        """Of some queries and keys, None for all; v may have none."""
        for total, index, part in zip(self._sums, (queries, keys, keys), parts):
            if index is None:
                total += part
            else:
                total.index_add_(0, index, part.to(total.dtype))

    def tensors(self) -> list[torch.Tensor]:
        return [total.to(dtype) for total, dtype in zip(self._sums, self._types, strict=True)]
