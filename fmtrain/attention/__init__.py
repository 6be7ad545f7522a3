"""Attention under a mask, computed by one of several backends.

A backend is a module with `prepare(layout, mask, start)`, run once per forward, `attend(q, k, v,
plan, scale)`, run in every layer, and `STEP`, what it prepares for one token that sees everything.
`reference` defines what is correct; the others are tested against it. Optional packages are
imported inside the backend that needs them.

Shape names: B rows, H query heads, G key heads (H is a multiple), Q queries, K keys, D head size.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fmtrain.layout import Layout
from fmtrain.masks import Mask
from fmtrain.merge import Merge
from fmtrain.policies import Policy

BACKENDS = ("reference", "sdpa", "flash")


@dataclass(frozen=True)
class Plan:
    """What one forward needs to attend in every layer: the backend and what it prepared from the
    layout."""

    backend: ModuleType
    prepared: Any
    length: int  # of the keys, those in the cache included

    def attend(
        self,
        q_BHQD,
        k_BGKD,
        v_BGKD,
        scale: float | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scale = scale or q_BHQD.shape[-1] ** -0.5
        return self.backend.attend(q_BHQD, k_BGKD, v_BGKD, self.prepared, scale, bias)


def get_backend(name: str) -> ModuleType:
    """The module of a backend, or of the rule that takes one (`auto`). Raises `ValueError` for an
    unknown name."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(
            f"unknown attention backend {name!r}; known are auto, {', '.join(BACKENDS)}"
        )
    return importlib.import_module(f"fmtrain.attention.{name}")


def plan(layout: Layout, mask: Mask, backend: ModuleType, start: int = 0) -> Plan:
    """Prepare `backend` for one forward whose queries are the tokens from `start` on."""
    return Plan(backend, backend.prepare(layout, mask, start), layout.shape[1])


def step(backend: ModuleType, length: int) -> Plan:
    """The plan of one decoded token that attends to all of the `length` tokens up to it."""
    return Plan(backend, backend.STEP, length)


def attend(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    layout: Layout,
    mask: str | Policy | Mask,
    backend: str = "reference",
    merge: Merge | None = None,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One attention call under a mask: what `attach` runs in every layer. Returns [B, H, T, D].

    `layout` describes the keys; with fewer queries than keys the queries are the last ones. `merge`
    gives the options of a light form, `scale` defaults to D ** -0.5. `bias` [H] or []
    is added to the scores of what the policy reveals. Raises `ValueError` for shapes that do not
    fit each other.
    """
    (B, H, Q, D), (G, K) = q_BHTD.shape, k_BGTD.shape[1:3]
    if (
        k_BGTD.shape != v_BGTD.shape
        or k_BGTD.shape != (B, G, K, D)
        or H % G
        or Q > K
        or layout.shape != (B, K)
    ):
        shapes = [tuple(tensor.shape) for tensor in (q_BHTD, k_BGTD, v_BGTD)]
        raise ValueError(
            f"shapes do not fit: q {shapes[0]}, k {shapes[1]}, v {shapes[2]}, layout {layout.shape}"
        )
    prepared = plan(layout, Mask.of(mask, merge), get_backend(backend), start=K - Q)
    return prepared.attend(q_BHTD, k_BGTD, v_BGTD, scale, bias)
