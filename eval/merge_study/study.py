"""Measuring what the light form of a mask keeps of direct access to the future.

One attention call is taken apart by the definitions of the reference backend; sums are kept per
layer and head; then the whole model runs under each of four forms. Shape names: B rows, H heads, Q
queries, K keys, D head size, L layers.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fmtrain.attention import reference
from fmtrain.data.collator import Collator
from fmtrain.data.encode import Encoded
from fmtrain.host import ATTENTION, PLAN, unwrap
from fmtrain.masks import Allowed, Mask
from fmtrain.merge import Pooling, share
from fmtrain.patch import attach

FORMS = ("direct", "merge", "control", "causal")


@dataclass(frozen=True)
class Pieces:
    """One attention call, taken apart.

    Outputs [B, H, Q, D] of direct access, of causal attention, and the sink's value; per query
    [B, H, Q] the attention on revealed keys, C_i, and what the merge makes of the row: the merged
    output is keep * causal + add * sink. reveals [B, 1, Q]: whether a query reveals anything.
    """

    direct: torch.Tensor
    causal: torch.Tensor
    sink: torch.Tensor
    future: torch.Tensor
    pooled: torch.Tensor
    keep: torch.Tensor
    add: torch.Tensor
    reveals: torch.Tensor

    def mixed(self, keep: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
        """keep * causal + add * sink [B, H, Q, D]; keep and add [B, H, Q]."""
        return keep[..., None] * self.causal + add[..., None] * self.sink


def take_apart(q_BHQD, k_BGKD, v_BGKD, scale: float | None, pooling: Pooling) -> Pieces:
    """The pieces of one attention call under a light form, as `reference` defines it."""
    scale = scale or q_BHQD.shape[-1] ** -0.5
    past, revealed = pooling.past_B1QK, pooling.revealed_B1QK
    B_BHQK = reference.weights(q_BHQD, k_BGKD, Allowed(past, revealed), scale)
    A_BHQK = reference.weights(q_BHQD, k_BGKD, Allowed(past, None), scale)
    v_BHKD = v_BGKD.repeat_interleave(q_BHQD.shape[1] // v_BGKD.shape[1], dim=1).to(B_BHQK.dtype)
    F_BHQK = B_BHQK * revealed
    future, C = F_BHQK.sum(-1), pooling.pooled(F_BHQK)
    total = 1 - future + C if pooling.merge.normalize else torch.ones_like(C)
    sink = share(pooling.sink_BQK, v_BHKD.dtype)[:, None] @ v_BHKD
    return Pieces(
        direct=B_BHQK @ v_BHKD,
        causal=A_BHQK @ v_BHKD,
        sink=sink,
        future=future,
        pooled=C,
        keep=(1 - future) / total,
        add=C / total,
        reveals=revealed.any(-1),
    )


class Tally:
    """Sums over the queries that reveal something, per layer and head [L, H]."""

    NAMES = ("future", "pooled", "keep", "add")

    def __init__(self, layers: int, heads: int):
        exact = {"dtype": torch.float64}
        self.queries = torch.zeros(layers, dtype=torch.long)
        self.sums = {name: torch.zeros(layers, heads, **exact) for name in self.NAMES}
        self.products = torch.zeros(layers, heads, 3, 3, **exact)  # of causal, sink and direct
        self.merge_error = torch.zeros(layers, heads, **exact)  # squared, against direct

    def count(self, layer: int, pieces: Pieces) -> None:
        """Add the queries of one attention call."""
        reveals_BQ = pieces.reveals[:, 0]

        def revealing(values_BHQ: torch.Tensor) -> torch.Tensor:
            """Those of the queries that reveal something [N, H, ...]."""
            return values_BHQ.transpose(1, 2)[reveals_BQ]

        outputs = [revealing(out) for out in (pieces.causal, pieces.sink, pieces.direct)]
        outputs = torch.stack(outputs).double()
        self.queries[layer] += int(reveals_BQ.sum())
        for name, total in self.sums.items():
            total[layer] += revealing(getattr(pieces, name)).double().sum(0).cpu()
        self.products[layer] += torch.einsum("xqhd,yqhd->hxy", outputs, outputs).cpu()
        error = revealing(pieces.mixed(pieces.keep, pieces.add) - pieces.direct).double()
        self.merge_error[layer] += error.square().sum((0, 2)).cpu()

    def mean(self, name: str) -> torch.Tensor:
        return self.sums[name] / self.queries[:, None]

    def distances(self) -> dict[str, torch.Tensor]:
        """||o - o_direct|| / ||o_direct|| over all queries together [L, H], of each other form."""
        size, errors = self.products[..., 2, 2], {"merge": self.merge_error}
        control = torch.stack([self.mean("keep"), self.mean("add"), -torch.ones_like(size)], -1)
        causal = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).expand_as(control)
        for form, x in (("control", control), ("causal", causal)):
            errors[form] = torch.einsum("lhx,lhxy,lhy->lh", x, self.products, x)
        return {form: (error.clamp(min=0) / size).sqrt() for form, error in errors.items()}


@contextlib.contextmanager
def attention_by(model, compute: Callable[[int, Pieces], torch.Tensor]) -> Iterator[None]:
    """Let `compute(layer, pieces)` [B, H, Q, D] be the attention of every layer.

    The model carries a light form, on the reference backend.
    """
    original = ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def replaced(module, query, key, value, attention_mask, scaling=None, **kwargs):
        pieces = take_apart(query, key, value, scaling, kwargs[PLAN].prepared)
        out = compute(module.layer_idx, pieces)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, replaced)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, original)


@dataclass(frozen=True)
class Study:
    """tally: on the activations of direct access. losses: nats per token of each row, by form."""

    tally: Tally
    losses: dict[str, list[float]]


@torch.no_grad()
def study(model, encoded: Sequence[Encoded], mask: Mask) -> Study:
    """Measure `model` (with nothing attached) on encoded rows, under a light form.

    The control that the whole model runs under takes its means from the model's run under merge.
    Raises `ValueError` if no row reveals anything.
    """
    text = unwrap(model).config.get_text_config()
    direct, light = (Tally(text.num_hidden_layers, text.num_attention_heads) for _ in range(2))

    def measured(layer: int, pieces: Pieces) -> torch.Tensor:
        direct.count(layer, pieces)
        return pieces.direct

    def merged(layer: int, pieces: Pieces) -> torch.Tensor:
        light.count(layer, pieces)
        return pieces.mixed(pieces.keep, pieces.add)

    def controlled(layer: int, pieces: Pieces) -> torch.Tensor:
        keep = light.mean("keep")[layer][:, None].to(pieces.keep)
        add = light.mean("add")[layer][:, None].to(pieces.add)
        keep = torch.where(pieces.reveals, keep, 1.0)
        return pieces.mixed(keep, torch.where(pieces.reveals, add, 0.0))

    forms = {
        "direct": measured,
        "merge": merged,
        "control": controlled,
        "causal": lambda layer, pieces: pieces.causal,
    }
    losses: dict[str, list[float]] = {form: [] for form in FORMS}
    steps = tqdm(total=len(FORMS) * len(encoded), unit="row", leave=False)
    with attach(model, mask, "reference"), steps:
        for form in FORMS:  # in this order: merge counts what control uses
            with attention_by(model, forms[form]):
                for row in encoded:
                    losses[form].append(model(**row.kwargs(), use_cache=False).loss.item())
                    steps.update()
            if form == "direct" and not direct.queries.any():
                raise ValueError(
                    f"policy {mask.policy.name!r} reveals nothing in these {len(encoded)} rows; "
                    "do they have images?"
                )
    return Study(direct, losses)


def encode_rows(model, processor, rows: Sequence[dict], image_root: str) -> list[Encoded]:
    """Each row as a batch of its own, with labels, on the model's device."""
    collator = Collator(processor, image_root)
    return [Encoded.from_batch(collator([row])).to(model) for row in rows]
