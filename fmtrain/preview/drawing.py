"""Pictures of masks as PNG files: the mask of one row, however long, and all policies side by side.

Rows of a picture are queries (who looks), columns are keys (what is looked at). matplotlib is imported by what draws.
Shape names: N cells along an edge of a picture, a token each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from fmtrain.layout import Layout, Role
from fmtrain.policies import POLICIES, Policy, T, V, get_policy, past, revealed, tokens

CLOSED, CAUSAL, REVEALED = range(3)
STATES = {
    CLOSED: "#F1F3F5",
    CAUSAL: "#9AA7B8",
    REVEALED: "#E8590C",
}  # they differ in lightness too: fit for colour-blind readers
TEXT, IMAGES, ANSWER, PAD, INK, GREY = (
    "#56B4E9",
    ("#00795A", "#6CCBAE"),
    "#B0478F",
    "#D5D9DD",
    "#1B1F24",
    "#4A525B",
)
LIMIT = 1400  # cells along an edge; longer rows are sampled
NAMES = {Role.TEXT: "text", Role.VISUAL: "image", Role.ANSWER: "answer", Role.PAD: "padding"}
DPI = 100
DASHES = (0, (3, 2))
READING = "Rows look, columns are looked at"
EXAMPLE = "TIIITJJJTTAA / TKKKTAA"


class Run(NamedTuple):
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
    def colour(self) -> str:
        return {
            Role.TEXT: TEXT,
            Role.VISUAL: IMAGES[self.image % 2],
            Role.ANSWER: ANSWER,
            Role.PAD: PAD,
        }[self.role]

    @property
    def label(self) -> str:
        return f"image {self.image}" if self.role == Role.VISUAL else NAMES[self.role]


class Box(NamedTuple):
    """Where in a PNG a mask stands, in pixels from the upper left, and how many cells it has along an edge."""

    left: int
    top: int
    side: int
    cells: int

    def centre(self, query: int, key: int) -> tuple[int, int]:
        """The pixel (x, y) in the middle of a cell."""
        return tuple(
            int(start + (cell + 0.5) * self.side / self.cells)
            for start, cell in ((self.left, key), (self.top, query))
        )


def runs(layout: Layout) -> list[Run]:
    """The first row of a layout, cut wherever role, image, prefill or sample changes."""
    columns = torch.stack(
        [layout.role[0], layout.image[0], layout.prefill[0], layout.sample[0]]
    ).cpu()
    cuts = (columns[:, 1:] != columns[:, :-1]).any(0).nonzero().flatten() + 1
    edges = [0, *cuts.tolist(), columns.shape[1]]
    return [
        Run(start, stop, Role(role), *rest)
        for start, stop in pairwise(edges)
        for role, *rest in [columns[:, start].tolist()]
    ]


def states(policy: Policy, layout: Layout, index: torch.Tensor) -> torch.Tensor:
    """What the tokens at `index` [N] of the first row are to each other: `CLOSED`, `CAUSAL` or `REVEALED` [N, N]."""
    q, k = tokens(layout[:1], index, 1), tokens(layout[:1], index, 2)
    real = (q.role != Role.PAD) & (k.role != Role.PAD)
    return ((past(q, k) & real) * CAUSAL + revealed(policy, q, k) * REVEALED)[0]


def sampled(parts: list[Run], limit: int = LIMIT) -> torch.Tensor:
    """At most `limit` tokens, evenly spread: each stands for its neighbours, the one of the shortest run first, so that no
    run is lost that has a cell to itself. Their positions [N]."""
    length = parts[-1].stop
    lengths = torch.cat([torch.full((run.length,), run.length) for run in parts])
    edges = torch.linspace(0, length, min(length, limit) + 1, dtype=torch.float64).long().tolist()
    return torch.tensor(
        [start + int(lengths[start:stop].argmin()) for start, stop in pairwise(edges)]
    )


def reveals(policy: Policy) -> str:
    """`V→V, V→T`; `nothing` for the causal policy."""
    pairs = [f"{q.name[0]}→{k.name[0]}" for q in (V, T) for k in (V, T) if (q, k) in policy.reveals]
    return ", ".join(pairs) + (" in one image" if policy.within_image else "") or "nothing"


def in_words(policy: Policy) -> str:
    """What a policy adds to causal attention, as one clause."""
    if not policy.reveals:
        return "a token sees what came before it"
    if policy.within_image:
        return "each image sees all of itself"
    if len(policy.reveals) == 4:
        return "the prompt of a turn sees all of itself"
    name, clauses = {V: "images", T: "text"}, []
    for query, verb in ((V, " see"), (T, " sees")):
        if keys := [name[key] for key in (V, T) if (query, key) in policy.reveals]:
            clauses.append(f"{name[query]}{'' if clauses else verb} later {' and '.join(keys)}")
    return ", ".join(clauses)


@dataclass
class Canvas:
    """A matplotlib figure whose parts are placed in pixels from the upper left corner."""

    width: int
    height: int

    def __post_init__(self):
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError("a picture needs matplotlib: pip install 'fmtrain[eval]'") from error
        self.figure = Figure(
            figsize=(self.width / DPI, self.height / DPI), dpi=DPI, facecolor="white"
        )
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.page = self.figure.add_axes([0, 0, 1, 1])
        self.page.set(xlim=(0, self.width), ylim=(self.height, 0))
        self.page.axis("off")

    def text(self, x: float, y: float, words: str, size: float, **style) -> float:
        """Write with letters of `size` pixels; returns the x at which the words end."""
        style = {"color": INK, "va": "center", **style}
        written = self.page.text(x, y, words, fontsize=size * 72 / DPI, **style)
        return written.get_window_extent(self.renderer).x1

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        from matplotlib.patches import Rectangle

        self.page.add_patch(
            Rectangle(
                (x, y),
                width,
                height,
                facecolor=colour,
                edgecolor="none",
                antialiased=False,
                zorder=1,
            )
        )

    def line(
        self, x: list[float], y: list[float], width: float, colour: str = INK, **style
    ) -> None:
        self.page.plot(
            x,
            y,
            color=colour,
            linewidth=width * 72 / DPI,
            solid_capstyle="butt",
            dash_capstyle="butt",
            zorder=3,
            **style,
        )

    def cells(self, box: Box, values: torch.Tensor) -> None:
        """The states [N, N] as squares that fill the box; a gap between them where they are large enough."""
        from matplotlib.colors import ListedColormap

        axes = self.figure.add_axes(
            [
                box.left / self.width,
                1 - (box.top + box.side) / self.height,
                box.side / self.width,
                box.side / self.height,
            ]
        )
        axes.set_zorder(-1)
        axes.axis("off")
        axes.imshow(
            values.numpy(),
            cmap=ListedColormap(list(STATES.values())),
            vmin=0,
            vmax=2,
            interpolation="nearest",
            aspect="auto",
        )
        cell = box.side / box.cells
        if cell >= 10:
            for k in range(1, box.cells):
                self.line([box.left + k * cell] * 2, [box.top, box.top + box.side], 1, "white")
                self.line([box.left, box.left + box.side], [box.top + k * cell] * 2, 1, "white")

    def save(self, file: str | Path) -> None:
        """Raises `ValueError` if the file cannot be written."""
        try:
            self.figure.savefig(file, format="png", dpi=DPI, facecolor="white")
        except OSError as error:
            raise ValueError(f"cannot write {file}: {error.strerror}") from error


def _opens_turn(before: Run, run: Run) -> bool:
    return run.sample != before.sample or (run.prefill != before.prefill and run.prefill > 0)


def _strips(canvas: Canvas, box: Box, parts: list[Run], length: int, thick: int) -> None:
    """The roles of the tokens above and left of a mask, and lines where a turn or a sample begins."""
    scale = box.side / length
    gap = max(3, thick // 6)
    for run in parts:
        start, size = run.start * scale, run.length * scale
        canvas.rectangle(box.left + start, box.top - gap - thick, size, thick, run.colour)
        canvas.rectangle(box.left - gap - thick, box.top + start, thick, size, run.colour)
    for before, run in pairwise(parts):
        at, ends = run.start * scale, (-gap - thick, box.side)
        if run.sample != before.sample:
            style = dict(width=max(2, thick / 10))
        else:
            own = [other for other in parts if other.sample == run.sample]
            ends = own[0].start * scale, own[-1].stop * scale
            if _opens_turn(before, run):
                style = dict(width=max(1.5, thick / 14), linestyle=DASHES)
            elif (
                Role.VISUAL in (run.role, before.role)
                and min(run.length, before.length) * scale >= 4
            ):
                style = dict(width=0.8, alpha=0.35)
            else:
                continue
        canvas.line([box.left + at] * 2, [box.top + end for end in ends], **style)
        canvas.line([box.left + end for end in ends], [box.top + at] * 2, **style)


def _legend(
    canvas: Canvas, left: float, top: float, size: float, entries: list[tuple[str, str]]
) -> None:
    """A line of coloured squares with their meaning; the colours "-" and ":" stand for the lines of `_strips`."""
    x = left
    for colour, words in entries:
        if colour in "-:":
            canvas.line(
                [x, x + size],
                [top, top],
                max(2, size / 10),
                linestyle="-" if colour == "-" else DASHES,
            )
        else:
            canvas.rectangle(x, top - size / 2, size, size, colour)
            canvas.line(
                [x, x + size, x + size, x, x],
                [top - size / 2] * 2 + [top + size / 2] * 2 + [top - size / 2],
                1,
                alpha=0.25,
            )
        x = canvas.text(x + 1.4 * size, top, words, size) + 1.4 * size if words else x + 1.2 * size


def _cells_legend(policy: str) -> list[tuple[str, str]]:
    return [
        (STATES[CAUSAL], "attends (causal)"),
        (STATES[REVEALED], f"revealed by {policy}"),
        (STATES[CLOSED], "closed"),
    ]


def _roles_legend(parts: list[Run]) -> list[tuple[str, str]]:
    """The roles that occur, and the lines that are drawn."""
    roles, images = {run.role for run in parts}, {run.image for run in parts} - {-1}
    entries = [
        (IMAGES[k], "" if k == 0 and len(images) > 1 else "image")
        for k in range(min(2, len(images)))
    ]
    entries += [
        (colour, NAMES[role])
        for colour, role in ((TEXT, T), (ANSWER, Role.ANSWER), (PAD, Role.PAD))
        if role in roles
    ]
    entries += [(":", "next turn")] if any(run.prefill > 0 for run in parts) else []
    return entries + ([("-", "next sample")] if any(run.sample > 0 for run in parts) else [])


def draw_row(layout: Layout, policy: "str | Policy", file: str | Path, title: str = "") -> Box:
    """The mask of a layout's first row as a PNG; returns where the mask stands in it.

    A row of more than `LIMIT` tokens is sampled, so that no [T, T] tensor is built. Raises `ValueError` if matplotlib is
    missing or the file cannot be written.
    """
    policy, parts, length = get_policy(policy), runs(layout), layout.shape[1]
    index = sampled(parts)
    side = len(index) * max(1, min(44, LIMIT // len(index)))
    box = Box(170, 230, side, len(index))
    canvas = Canvas(max(box.left + side + 60, 860), box.top + side + 150)
    canvas.cells(box, states(policy, layout, index))
    _strips(canvas, box, parts, length, 20)
    scale, edge = side / length, side + 8
    longest = sorted(parts, key=lambda run: -run.length)
    for run, at in _spaced(longest, lambda run: (run.start + run.stop) / 2 * scale):
        words = run.label + (f" × {run.length}" if run.role == Role.VISUAL else "")
        canvas.text(box.left - 30, box.top + at, words, 13, ha="right")
        canvas.text(box.left + at, box.top - 30, words, 13, ha="center", va="bottom", rotation=90)
    turns = [parts[0], *(run for before, run in pairwise(parts) if _opens_turn(before, run))]
    for run, at in _spaced(turns + longest, lambda run: run.start * scale):
        canvas.text(box.left + edge, box.top + at, str(run.start), 12)
        canvas.text(
            box.left + at, box.top + edge, str(run.start), 12, ha="center", va="top", rotation=90
        )
    canvas.text(24, 32, policy.name, 24, weight="bold")
    canvas.text(24, 64, f"reveals {reveals(policy)}: {in_words(policy)}", 15)
    canvas.text(24, 90, title, 15)
    bottom = box.top + edge + 62
    _legend(canvas, 24, bottom, 15, _cells_legend(policy.name))
    _legend(canvas, 24, bottom + 28, 15, _roles_legend(parts))
    canvas.text(24, bottom + 56, f"{READING}. The numbers are positions of tokens.", 13, color=GREY)
    canvas.save(file)
    return box


def _spaced(parts: list[Run], place: Callable[[Run], float]) -> list[tuple[Run, float]]:
    """The runs whose words fit beside each other, 17 pixels apart; earlier ones of the list are chosen first."""
    chosen: list[tuple[Run, float]] = []
    for run in parts:
        if all(abs(place(run) - other) >= 17 for _, other in chosen):
            chosen.append((run, place(run)))
    return chosen


def _twin(policy: Policy) -> str:
    """` (same as v2t)` for a policy that is another one under a second name."""
    first = next(
        p
        for p in POLICIES.values()
        if (p.reveals, p.within_image) == (policy.reveals, policy.within_image)
    )
    return "" if first is policy else f" (same as {first.name})"


def draw_policies(file: str | Path, example: str = EXAMPLE) -> list[Box]:
    """All policies on one row as a PNG of small multiples, for a page 900 pixels wide at twice that resolution."""
    layout = Layout.parse(example)
    parts, length = runs(layout), layout.shape[1]
    cell, thick, columns, step = 26, 30, 3, (600, 690)
    lines = -(-len(POLICIES) // columns)
    canvas = Canvas(columns * step[0], lines * step[1] + 180)
    boxes = []
    for number, policy in enumerate(POLICIES.values()):
        row, column = divmod(number, columns)
        box = Box(column * step[0] + 76, row * step[1] + 176, cell * length, length)
        boxes.append(box)
        canvas.cells(box, states(policy, layout, torch.arange(length)))
        _strips(canvas, box, parts, length, thick)
        for run in parts:
            name = {Role.TEXT: "T", Role.ANSWER: "ans"}.get(run.role) or "ABCD"[run.image]
            middle = (run.start + run.length / 2) * cell
            style = dict(
                ha="center",
                weight="bold",
                color="white" if run.colour in (IMAGES[0], ANSWER) else INK,
            )
            canvas.text(box.left + middle, box.top - 5 - thick / 2, name, 20, **style)
            canvas.text(box.left - 5 - thick / 2, box.top + middle, name, 20, rotation=90, **style)
        end = canvas.text(box.left - 35, box.top - 112, policy.name + ":", 34, weight="bold")
        canvas.text(
            end + 14,
            box.top - 111,
            reveals(policy),
            28,
            color="#B8430A" if policy.reveals else GREY,
        )
        canvas.text(box.left - 35, box.top - 66, in_words(policy) + _twin(policy), 25, color=GREY)
    bottom = lines * step[1] + 40
    _legend(canvas, 41, bottom, 26, [*_cells_legend("the policy"), (":", "next turn")])
    roles = [
        (TEXT, "T  text of the prompt"),
        (IMAGES[0], ""),
        (IMAGES[1], "A, B, C  images (V)"),
        (ANSWER, "ans  answer"),
    ]
    _legend(canvas, 41, bottom + 52, 26, roles)
    canvas.text(
        41,
        bottom + 102,
        f"{READING}. Nothing looks ahead out of its own turn, or at an answer.",
        25,
        color=GREY,
    )
    canvas.save(file)
    return boxes
