"""A policy made concrete on a layout: boolean masks [B, 1, Q, K], True = may attend.

Shape names: B rows, Q queries, K keys. Queries are the last Q of the K tokens; the ones before them are in a cache.
"""

from dataclasses import dataclass

import torch

from fmtrain.layout import Layout
from fmtrain.policies import Policy, past, revealed, tokens


@dataclass(frozen=True)
class Masks:
    """The two halves of what a query may attend to. `revealed` is None where the policy reveals nothing."""

    past_B1QK: torch.Tensor
    revealed_B1QK: torch.Tensor | None

    @property
    def both_B1QK(self) -> torch.Tensor:
        return self.past_B1QK if self.revealed_B1QK is None else self.past_B1QK | self.revealed_B1QK


def build(policy: Policy, layout: Layout, start: int = 0) -> Masks:
    """The masks of `policy` for the queries from `start` on."""
    index = torch.arange(layout.shape[1], device=layout.role.device)
    q, k = tokens(layout, index[start:], 1), tokens(layout, index, 2)
    return Masks(past(q, k)[:, None], revealed(policy, q, k)[:, None] if policy.reveals else None)
