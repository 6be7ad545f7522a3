"""Who may look ahead at whom: every policy, as one table, and the predicates that make pairs of
tokens of it.

    python -m fmtrain.policies                    all policies on a two-turn row
    python -m fmtrain.policies v2v "TIITJJT AA"   one policy (or mask) on a row of your own

Sources: M^c, M^f, M^v2v, M^v2t are the future-aware masks of arXiv 2505.18605 (flags `original`,
`future`, `future_v2v`, `future_v2t` of its code); `mma` and `mma_interleaved` are modality-mutual
attention, arXiv 2503.02597; `image` is the bidirectional image block of Gemma 3 (transformers'
`blockwise_overlay`); `prefix_lm` is PaliGemma's prompt, turn by turn.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fmtrain.command_line import nearest
from fmtrain.layout import Layout, Role

T, V = Role.TEXT, Role.VISUAL


@dataclass(frozen=True)
class Policy:
    """What a policy adds to causal attention: (query role, key role) pairs, inside one prefill."""

    name: str
    reveals: frozenset[tuple[Role, Role]]
    within_image: bool = False  # V->V only inside the same image
    source: str = field(default="", compare=False)


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("causal", frozenset(), source="M^c"),
        Policy("future", frozenset({(V, V), (V, T)}), source="M^f, arXiv 2505.18605"),
        Policy("v2v", frozenset({(V, V)}), source="M^v2v, arXiv 2505.18605"),
        Policy("v2t", frozenset({(V, T)}), source="M^v2t, arXiv 2505.18605"),
        Policy("mma", frozenset({(V, T)}), source="arXiv 2503.02597; v2t under the prefill law"),
        Policy(
            "mma_interleaved",
            frozenset({(V, T), (T, V)}),
            source="arXiv 2503.02597, phi(i) != phi(j)",
        ),
        Policy("image", frozenset({(V, V)}), within_image=True, source="Gemma 3, Mixed Attention"),
        Policy(
            "prefix_lm",
            frozenset({(V, V), (V, T), (T, V), (T, T)}),
            source="PaliGemma; arXiv 2408.00539",
        ),
        Policy(
            "text_future", frozenset({(T, T), (T, V)}), source="the control of arXiv 2505.18605"
        ),
    )
}


def get_policy(policy: "str | Policy") -> Policy:
    """The policy of that name. Raises `ValueError` with the nearest known name."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        known = f"the nearest is {nearest(policy, POLICIES)!r}, known are {', '.join(POLICIES)}"
        raise ValueError(f"unknown policy {policy!r}; {known}")
    return POLICIES[policy]


class Tokens(NamedTuple):
    """Fields of some tokens, in shapes that broadcast against those of others; `index` is the
    position in the row."""

    role: torch.Tensor
    image: torch.Tensor
    prefill: torch.Tensor
    sample: torch.Tensor
    index: torch.Tensor


def revealed(policy: Policy, q: Tokens, k: Tokens) -> torch.Tensor:
    """The pairs that `policy` adds to causal attention: later keys of the query's own prefill."""
    return ahead(*sight_on(q.role.device, policy), q, k)


def sight(policy: Policy) -> tuple[list[int], list[int]]:
    """What each query role sees ahead, as a sum of 1 << key role: in its prefill, and among the
    tokens of its own image."""
    anywhere, within_image = [0] * len(Role), [0] * len(Role)
    for query, key in policy.reveals:
        image = policy.within_image and (query, key) == (V, V)
        (within_image if image else anywhere)[query] |= 1 << key
    return anywhere, within_image


def sight_on(device, policy: Policy) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`sight` as tensors; None where no role sees within its image alone."""
    anywhere, within_image = (torch.tensor(each, device=device) for each in sight(policy))
    return anywhere, within_image if policy.within_image else None


def ahead(
    anywhere: torch.Tensor, within_image: torch.Tensor | None, q: Tokens, k: Tokens
) -> torch.Tensor:
    """The later keys of the query's own prefill that roles with this sight see."""
    bit = 1 << k.role  # only one tensor of all pairs, however many pairs of roles there are
    pairs = (anywhere[q.role] & bit) != 0
    if within_image is not None:
        pairs = pairs | ((within_image[q.role] & bit) != 0) & (q.image == k.image)
    same = (q.sample == k.sample) & (q.prefill == k.prefill) & (q.prefill >= 0)
    return pairs & same & (k.index > q.index)


def past(q: Tokens, k: Tokens) -> torch.Tensor:
    """Causal attention inside each sample; a padded token attends to itself, so that no row is
    empty."""
    same = (q.sample == k.sample) & (q.sample >= 0)
    return (same & (k.index <= q.index)) | (q.index == k.index)


def tokens(layout: Layout, index: torch.Tensor, dim: int) -> Tokens:
    """The fields of the tokens at `index` (1-D), laid along dimension `dim` (1 for queries, 2 for
    keys) of [B, Q, K]."""
    other = 3 - dim
    those = layout[:, index].map(lambda tensor: tensor.unsqueeze(other))
    return Tokens(
        those.role, those.image, those.prefill, those.sample, index[None].unsqueeze(other)
    )
