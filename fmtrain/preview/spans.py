"""A row cut into spans of like tokens, and counts that are exact at any length because of it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from fmtrain.data.encode import IGNORED
from fmtrain.layout import Layout, Role
from fmtrain.masks import Mask
from fmtrain.policies import Policy, past, revealed, tokens

NAMES = {Role.TEXT: "text", Role.VISUAL: "image", Role.ANSWER: "answer", Role.PAD: "padding"}


class Span(NamedTuple):
    """Consecutive tokens start .. stop - 1 of one role, image, prefill and sample."""

    start: int
    stop: int
    role: Role
    image: int
    prefill: int
    sample: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def label(self) -> str:
        return f"image {self.image}" if self.role == Role.VISUAL else NAMES[self.role]


def spans(layout: Layout) -> list[Span]:
    """The first row of a layout, cut wherever role, image, prefill or sample changes."""
    fields = (layout.role, layout.image, layout.prefill, layout.sample)
    columns = torch.stack([field[0] for field in fields]).cpu()
    cuts = (columns[:, 1:] != columns[:, :-1]).any(0).nonzero().flatten() + 1
    row = []
    for start, stop in pairwise([0, *cuts.tolist(), columns.shape[1]]):
        role, *rest = columns[:, start].tolist()
        row.append(Span(start, stop, Role(role), *rest))
    return row


def pairs(layout: Layout, policy: Policy) -> tuple[int, int]:
    """(causal, revealed) pairs of the first row, padding apart.

    The tokens of a span are alike, so two spans are compared once: for the past the last token of
    the one with the first of the other, for the future the first with the last. Inside a span half
    of the pairs count, and for causal attention the token itself.
    """
    real = [span for span in spans(layout) if span.role != Role.PAD]
    size = torch.tensor([span.length for span in real])
    first = torch.tensor([span.start for span in real])
    last = first + size - 1

    def count(open_NN: torch.Tensor, inside_N: torch.Tensor) -> int:
        number_NN = size[:, None] * size
        number_NN.diagonal().copy_(inside_N)
        return int(number_NN[open_NN].sum())

    row = layout[:1]
    causal = past(tokens(row, last, 1), tokens(row, first, 2))[0]
    ahead = revealed(policy, tokens(row, first, 1), tokens(row, last, 2))[0]
    return count(causal, size * (size + 1) // 2), count(ahead, size * (size - 1) // 2)


@dataclass(frozen=True)
class Figures:
    """The counts of a row. causal: pairs of causal attention, padding apart; ahead: pairs that the
    policy adds, or that the light form pools. questions: those whose answer is learnt, in samples
    with images; unseen: how many of them no image sees, under a policy that lets images see them;
    None under others."""

    tokens: int
    images: int
    image_tokens: int
    label_tokens: int
    prefills: int
    samples: int
    causal: int
    ahead: int
    questions: int
    unseen: int | None


def figures(labels: torch.Tensor, layout: Layout, mask: Mask) -> Figures:
    """Of a row's labels [1, T] and its layout."""
    layout = layout[:1]
    visual, real, fed = layout.visual, layout.real, layout.prefill >= 0
    causal, ahead = pairs(layout, mask.policy)
    questions, unseen = _questions(labels, layout)
    looks = (Role.VISUAL, Role.TEXT) in mask.policy.reveals
    return Figures(
        tokens=int(real.sum()),
        images=_distinct(layout.sample[visual], layout.image[visual]),
        image_tokens=int(visual.sum()),
        label_tokens=int((labels[:1] != IGNORED).sum()),
        prefills=_distinct(layout.sample[fed], layout.prefill[fed]),
        samples=len(layout.sample[real].unique()),
        causal=causal,
        ahead=ahead,
        questions=questions,
        unseen=unseen if looks else None,
    )


def _questions(labels: torch.Tensor, layout: Layout) -> tuple[int, int]:
    """How many questions have an answer that is learnt, in samples with images, and how many of
    them have no image in their prefill, which alone could see them."""
    row = spans(layout)
    shown = {span.sample for span in row if span.role == Role.VISUAL}
    seen = {(span.sample, span.prefill) for span in row if span.role == Role.VISUAL}
    asked, question = set(), None
    for span in row:
        if span.role != Role.ANSWER:
            question = span.sample, span.prefill
        elif span.sample in shown and (labels[0, span.start : span.stop] != IGNORED).any():
            asked.add(question)
    return len(asked), len(asked - seen)


def _distinct(*columns: torch.Tensor) -> int:
    return len(set(zip(*(column.tolist() for column in columns))))
