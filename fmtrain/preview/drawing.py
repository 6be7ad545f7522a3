"""Pictures of masks as PNG files: the mask of one row, however long, and several masks side by
side.

Rows of a picture are queries (who looks), columns are keys (what is looked at). A light form is
drawn as what it attends to, causal, with the pairs that it pools in a colour of their own. Shape
names: N cells along an edge, a token each.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from fmtrain.layout import Layout, Role
from fmtrain.masks import Mask, State, states
from fmtrain.policies import POLICIES, Policy, T, V
from fmtrain.preview.canvas import INK, Box, Canvas
from fmtrain.preview.spans import NAMES, Span, spans

# They differ in lightness too: fit for colour-blind readers.
STATES = {
    State.CLOSED: "#F1F3F5",
    State.CAUSAL: "#9AA7B8",
    State.REVEALED: "#E8590C",
    State.POOLED: "#FBD0AE",
}
TEXT, IMAGES, ANSWER, PAD = "#56B4E9", ("#00795A", "#6CCBAE"), "#B0478F", "#D5D9DD"
GREY, RUST = "#4A525B", "#B8430A"
LIMIT = 1400  # cells along an edge; longer rows are sampled
DASHES = (0, (3, 2))
READING = "Rows look, columns are looked at"
EXAMPLE = "TIIITJJJTTAA / TKKKTAA"


def colour_of(span: Span) -> str:
    image = IMAGES[span.image % 2]
    return {Role.TEXT: TEXT, Role.VISUAL: image, Role.ANSWER: ANSWER, Role.PAD: PAD}[span.role]


def sampled(row: list[Span], limit: int = LIMIT) -> torch.Tensor:
    """At most `limit` tokens, evenly spread: each stands for its neighbours, the one of the
    shortest span first, so that no span is lost that has a cell to itself. Their positions [N]."""
    length = row[-1].stop
    lengths = torch.cat([torch.full((span.length,), span.length) for span in row])
    edges = torch.linspace(0, length, min(length, limit) + 1, dtype=torch.float64).long().tolist()
    return torch.tensor(
        [start + int(lengths[start:stop].argmin()) for start, stop in pairwise(edges)]
    )


def reveals(policy: Policy) -> str:
    """`V→V, V→T`; `nothing` for the causal policy."""
    order = ((V, V), (V, T), (T, V), (T, T))
    pairs = [f"{q.name[0]}→{k.name[0]}" for q, k in order if (q, k) in policy.reveals]
    return ", ".join(pairs) + (" in one image" if policy.within_image else "") or "nothing"


def in_words(mask: Mask) -> str:
    """What a mask adds to causal attention, as one clause; a light form pools what others see."""
    policy, one, many = mask.policy, "sees", "see"
    if mask.merge:
        one, many = "pools", "pool"
    if not policy.reveals:
        return "a token sees what came before it"
    if policy.within_image:
        return f"each image {one} all of itself"
    if len(policy.reveals) == 4:
        return f"the prompt of a turn {one} all of itself"
    name, clauses = {V: "images", T: "text"}, []
    for query, verb in ((V, f" {many}"), (T, f" {one}")):
        keys = [name[key] for key in (V, T) if (query, key) in policy.reveals]
        if keys:
            clauses.append(f"{name[query]}{'' if clauses else verb} later {' and '.join(keys)}")
    return ", ".join(clauses)


def _opens_turn(before: Span, span: Span) -> bool:
    return span.sample != before.sample or (span.prefill != before.prefill and span.prefill > 0)


def _strips(canvas: Canvas, box: Box, row: list[Span], length: int, thick: int) -> None:
    """The roles of the tokens above and left of a mask, and lines where a turn or a sample
    begins."""
    scale = box.side / length
    gap = max(3, thick // 6)
    for span in row:
        start, size = span.start * scale, span.length * scale
        canvas.rectangle(box.left + start, box.top - gap - thick, size, thick, colour_of(span))
        canvas.rectangle(box.left - gap - thick, box.top + start, thick, size, colour_of(span))
    for before, span in pairwise(row):
        at, ends = span.start * scale, (-gap - thick, box.side)
        if span.sample != before.sample:
            style = dict(width=max(2, thick / 10))
        else:
            own = [other for other in row if other.sample == span.sample]
            ends = own[0].start * scale, own[-1].stop * scale
            if _opens_turn(before, span):
                style = dict(width=max(1.5, thick / 14), linestyle=DASHES)
            elif (
                Role.VISUAL in (span.role, before.role)
                and min(span.length, before.length) * scale >= 4
            ):
                style = dict(width=0.8, alpha=0.35)
            else:
                continue
        canvas.line([box.left + at] * 2, [box.top + end for end in ends], **style)
        canvas.line([box.left + end for end in ends], [box.top + at] * 2, **style)


def _legend(
    canvas: Canvas, left: float, top: float, size: float, entries: list[tuple[str, str]]
) -> None:
    """A line of coloured squares with their meaning; the colours "-" and ":" stand for the lines of
    `_strips`."""
    x = left
    for colour, words in entries:
        if colour in "-:":
            style = "-" if colour == "-" else DASHES
            canvas.line([x, x + size], [top, top], max(2, size / 10), linestyle=style)
        else:
            canvas.rectangle(x, top - size / 2, size, size, colour)
            upper, lower = top - size / 2, top + size / 2
            across, down = [x, x + size, x + size, x, x], [upper, upper, lower, lower, upper]
            canvas.line(across, down, 1, alpha=0.25)
        x = canvas.text(x + 1.4 * size, top, words, size) + 1.4 * size if words else x + 1.2 * size


def _cells_legend(masks: Sequence[Mask], name: str) -> list[tuple[str, str]]:
    """The states that occur; `name`: what they are revealed by."""
    entries = [(STATES[State.CAUSAL], "attends (causal)")]
    if any(mask.looks_ahead and not mask.merge for mask in masks):
        entries.append((STATES[State.REVEALED], f"revealed by {name}"))
    if any(mask.merge for mask in masks):
        entries.append((STATES[State.POOLED], "pooled into the first positions, not attended to"))
    return [*entries, (STATES[State.CLOSED], "closed")]


def _roles_legend(row: list[Span]) -> list[tuple[str, str]]:
    """The roles that occur, and the lines that are drawn."""
    roles, images = {span.role for span in row}, {span.image for span in row} - {-1}
    entries = []
    if images:
        entries = (
            [(IMAGES[0], "image")] if len(images) == 1 else [(IMAGES[0], ""), (IMAGES[1], "image")]
        )
    for colour, role in ((TEXT, T), (ANSWER, Role.ANSWER), (PAD, Role.PAD)):
        if role in roles:
            entries.append((colour, NAMES[role]))
    if any(span.prefill > 0 for span in row):
        entries.append((":", "next turn"))
    if any(span.sample > 0 for span in row):
        entries.append(("-", "next sample"))
    return entries


def draw_row(layout: Layout, mask: str | Policy | Mask, file: str | Path, title: str = "") -> Box:
    """The mask of a layout's first row as a PNG; returns where the mask stands in it.

    A row of more than `LIMIT` tokens is sampled, so that no [T, T] tensor is built. Raises
    `ValueError` if matplotlib is missing or the file cannot be written.
    """
    mask, row, length = Mask.of(mask), spans(layout), layout.shape[1]
    index = sampled(row)
    side = len(index) * max(1, min(44, LIMIT // len(index)))
    box = Box(170, 230, side, len(index))
    canvas = Canvas(max(box.left + side + 60, 860), box.top + side + 150)
    canvas.cells(box, states(mask, layout, index), list(STATES.values()))
    _strips(canvas, box, row, length, 20)
    scale, edge = side / length, side + 8
    longest = sorted(row, key=lambda span: -span.length)
    for span, at in _spaced(longest, lambda span: (span.start + span.stop) / 2 * scale):
        words = span.label + (f" × {span.length}" if span.role == Role.VISUAL else "")
        canvas.text(box.left - 30, box.top + at, words, 13, ha="right")
        canvas.text(box.left + at, box.top - 30, words, 13, ha="center", va="bottom", rotation=90)
    turns = [row[0], *(span for before, span in pairwise(row) if _opens_turn(before, span))]
    for span, at in _spaced(turns + longest, lambda span: span.start * scale):
        canvas.text(box.left + edge, box.top + at, str(span.start), 12)
        canvas.text(
            box.left + at, box.top + edge, str(span.start), 12, ha="center", va="top", rotation=90
        )
    verb = "pools" if mask.merge else "reveals"
    canvas.text(24, 32, str(mask), 24, weight="bold")
    canvas.text(24, 64, f"{verb} {reveals(mask.policy)}: {in_words(mask)}", 15)
    canvas.text(24, 90, title, 15)
    bottom = box.top + edge + 62
    _legend(canvas, 24, bottom, 15, _cells_legend([mask], str(mask)))
    _legend(canvas, 24, bottom + 28, 15, _roles_legend(row))
    canvas.text(24, bottom + 56, f"{READING}. The numbers are positions of tokens.", 13, color=GREY)
    canvas.save(file)
    return box


def _spaced(row: list[Span], place: Callable[[Span], float]) -> list[tuple[Span, float]]:
    """The runs whose words fit beside each other, 17 pixels apart; earlier ones of the list are
    placed first."""
    placed: list[tuple[Span, float]] = []
    for span in row:
        if all(abs(place(span) - other) >= 17 for _, other in placed):
            placed.append((span, place(span)))
    return placed


def _twin(mask: Mask) -> str:
    """` (same as v2t)` for a policy that is another one under a second name."""
    table = (mask.policy.reveals, mask.policy.within_image)
    same = [
        policy for policy in POLICIES.values() if (policy.reveals, policy.within_image) == table
    ]
    return f" (same as {same[0].name})" if same and same[0].name != mask.policy.name else ""


def draw_masks(
    masks: Sequence[str | Policy | Mask], file: str | Path, example: str = EXAMPLE
) -> list[Box]:
    """Several masks on one row as a PNG of small multiples, for a page 900 pixels wide at twice
    that resolution."""
    masks = [Mask.of(mask) for mask in masks]
    layout = Layout.parse(example)
    row, length = spans(layout), layout.shape[1]
    cell, thick, columns, (wide, high) = 26, 30, 3, (600, 690)
    lines = -(-len(masks) // columns)
    canvas = Canvas(columns * wide, lines * high + 180)
    boxes = []
    for number, mask in enumerate(masks):
        line, column = divmod(number, columns)
        box = Box(column * wide + 76, line * high + 176, cell * length, length)
        boxes.append(box)
        canvas.cells(box, states(mask, layout, torch.arange(length)), list(STATES.values()))
        _strips(canvas, box, row, length, thick)
        _names(canvas, box, row, cell, thick)
        end = canvas.text(box.left - 35, box.top - 112, f"{mask}:", 34, weight="bold")
        colour = RUST if mask.looks_ahead else GREY
        canvas.text(end + 14, box.top - 111, reveals(mask.policy), 28, color=colour)
        words = in_words(mask) + _twin(mask)
        canvas.text(box.left - 35, box.top - 66, words, 25, color=GREY)
    bottom = lines * high + 40
    _legend(canvas, 41, bottom, 26, [*_cells_legend(masks, "the policy"), (":", "next turn")])
    roles = [(TEXT, "T  text of the prompt"), (IMAGES[0], ""), (IMAGES[1], "A, B, C  images (V)")]
    _legend(canvas, 41, bottom + 52, 26, [*roles, (ANSWER, "ans  answer")])
    words = f"{READING}. Nothing looks ahead out of its own turn, or at an answer."
    canvas.text(41, bottom + 102, words, 25, color=GREY)
    canvas.save(file)
    return boxes


def _names(canvas: Canvas, box: Box, row: list[Span], cell: int, thick: int) -> None:
    """What each span is, written into the strips."""
    for span in row:
        name = {Role.TEXT: "T", Role.ANSWER: "ans"}.get(span.role) or "ABCD"[span.image]
        middle, edge = (span.start + span.length / 2) * cell, 5 + thick / 2
        dark = colour_of(span) in (IMAGES[0], ANSWER)
        style = dict(ha="center", weight="bold", color="white" if dark else INK)
        canvas.text(box.left + middle, box.top - edge, name, 20, **style)
        canvas.text(box.left - edge, box.top + middle, name, 20, rotation=90, **style)
