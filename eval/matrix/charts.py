"""Pictures of a report: the colours of heat maps, points with intervals, and masks.

They are inline SVG that takes the page's style.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fmtrain.layout import Layout
from fmtrain.masks import EXAMPLE, State, states

Colour = tuple[int, int, int]
# lightness alone carries the order, so that no colour vision is needed; (light theme, dark theme)
LOW: tuple[Colour, Colour] = ((238, 243, 248), (23, 34, 46))
HIGH: tuple[Colour, Colour] = ((10, 74, 122), (156, 208, 255))
LESS: tuple[Colour, Colour] = ((168, 80, 6), (255, 184, 112))
GROUND: tuple[Colour, Colour] = ((247, 247, 245), (27, 31, 36))
MOST = 0.5  # the difference that has the full colour


def mix(low: Colour, high: Colour, part: float) -> Colour:
    """The colour at `part` (0..1) between two."""
    return tuple(round(a + (b - a) * part) for a, b in zip(low, high))


def luminance(colour: Colour) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def style(light: Colour, dark: Colour) -> str:
    """CSS variables of a cell: background and text in both themes.

    The text is black or white, whichever contrasts more.
    """
    variables = []
    for suffix, colour in (("", light), ("d", dark)):
        ink = "#000" if luminance(colour) > 0.179 else "#fff"
        variables.append(f"--b{suffix}:#{bytes(colour).hex()};--t{suffix}:{ink}")
    return ";".join(variables)


def heat(part: float) -> str:
    """Style of a value at `part` (0..1) of its range."""
    return style(*(mix(LOW[k], HIGH[k], part) for k in (0, 1)))


def change(difference: float) -> str:
    """Style of a difference, on the same scale in every map: from -MOST to MOST.

    The root makes a difference of one point visible beside one of fifty.
    """
    part = math.copysign(math.sqrt(min(abs(difference) / MOST, 1)), difference)
    return style(*(mix(GROUND[k], (HIGH if part > 0 else LESS)[k], abs(part)) for k in (0, 1)))


def svg(width: float, height: float, title: str, parts: Sequence[str], css: str = "") -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    content = f"<title>{escape(title)}</title>{''.join(parts)}"
    return f'<svg class="{css}" {size} role="img">{content}</svg>'


# Of each `State`; a pooled pair is closed, with a ring on it.
SQUARES = ("closed", "past", "revealed", "closed")
TOKENS = {"T": "text", "A": "answer"}  # every other letter is a token of an image


def mask_picture(name: str, picture: str = EXAMPLE) -> str:
    """A mask on a row of two turns: rows are queries, columns keys.

    A light form attends causally; what it pools has a mark of its own.
    """
    cell, edge, parts = 13, 15, []
    letters = [letter for letter in picture if letter.isalpha()]
    for k, letter in enumerate(letters):
        css, at = f"token {TOKENS.get(letter, 'visual')}", edge + (k + 0.5) * cell
        parts.append(f'<text class="{css}" x="{at:g}" y="11">{letter}</text>')
        parts.append(f'<text class="{css}" x="7" y="{at + 4:g}">{letter}</text>')
    for q, row in enumerate(states(name, Layout.parse(picture)).tolist()):
        for k, state in enumerate(row):
            x, y = edge + k * cell, edge + q * cell
            parts.append(_square(SQUARES[state], x, y, cell))
            if state == State.POOLED:
                centre = f'cx="{x + cell / 2:g}" cy="{y + cell / 2:g}"'
                parts.append(f'<circle class="pooled" {centre} r="3"/>')
    size = edge + cell * len(letters) + 1
    return svg(size, size, f"the mask {name} on {picture}", parts, "policy")


def _square(css: str, x: float, y: float, cell: float) -> str:
    place = f'x="{x + 0.75:g}" y="{y + 0.75:g}"'
    side = f"{cell - 1.5:g}"
    return f'<rect class="{css}" {place} width="{side}" height="{side}" rx="2"/>'


PLOT, TEXT = 204.0, 136.0  # pixels of a chart: of its plot, of the figures beside it
EDGE, NAME, LINE, GAP = 12.0, 15.0, 15.0, 7.0  # around the plot; of a name, a point, between groups
STEPS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Point:
    """A value with its interval, the value of each run, and the text beside them."""

    css: str
    value: float
    low: float
    high: float
    by_run: Sequence[float]
    text: str


def ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers of an axis that holds both ends."""
    step = next((step for step in STEPS if (high - low) / step <= 5), STEPS[-1])
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def points(
    groups: Sequence[tuple[str, Sequence[Point]]], lines: Mapping[str, float], title: str
) -> str:
    """Points with intervals and a dot for each run, a line each, under the name of their group.

    lines: {CSS class: value that is marked over all groups}. Zero is on the axis.
    """
    values = [0.0, *lines.values()]
    for _, of_group in groups:
        for point in of_group:
            values += [point.low, point.high, *point.by_run]
    axis = ticks(min(values), max(values))

    def at(value: float) -> float:
        return EDGE + PLOT * (value - axis[0]) / (axis[-1] - axis[0])

    parts, y = [], 0.0
    for name, of_group in groups:
        parts.append(f'<text class="name" x="0" y="{y + 11:g}">{escape(name)}</text>')
        y += NAME
        for point in of_group:
            parts.append(_point(point, y + LINE / 2, at))
            y += LINE
        y += GAP
    grid = [f'<path class="grid" d="M{at(value):.1f} {NAME:g}V{y:g}"/>' for value in axis]
    for css, value in {"zero": 0.0, **lines}.items():
        grid.append(f'<path class="{css}" d="M{at(value):.1f} {NAME:g}V{y:g}"/>')
    for value in axis:
        figure = f"{100 * value:.1f}".removesuffix(".0").replace("-", "\N{MINUS SIGN}")
        parts.append(f'<text class="tick" x="{at(value):.1f}" y="{y + 13:g}">{figure}</text>')
    return svg(2 * EDGE + PLOT + TEXT, y + 18, title, [*grid, *parts], "points")


def _point(point: Point, y: float, at) -> str:
    """One line of a chart; at: where a value is on the axis."""
    low, high, middle = at(point.low), at(point.high), at(point.value)
    dots = [f'<circle class="run" cx="{at(one):.1f}" cy="{y:g}" r="2.6"/>' for one in point.by_run]
    ends = f"M{low:.1f} {y - 3:g}v6M{high:.1f} {y - 3:g}v6"
    return (
        f'<g class="{point.css}"><path class="whisker" d="M{low:.1f} {y:g}H{high:.1f}{ends}"/>'
        f'<path class="value" d="M{middle:.1f} {y - 5.5:g}v11"/>{"".join(dots)}'
        f'<text class="figures" x="{2 * EDGE + PLOT:g}" y="{y + 4:g}">{escape(point.text)}</text>'
        "</g>"
    )


CURVE, HIGH_CURVE, LABEL = 300.0, 130.0, 30.0  # pixels: of a curve's plot, and of its labels


def curves(series: Mapping[str, Mapping], top: float, scale: float, title: str) -> str:
    """Means against steps, each in the range of its runs; the axes open at 0.

    series: {CSS class: {"steps", "mean", "low", "high"}}. top: a value that the axis holds. scale:
    1 in the figures of the axis.
    """
    axis = ticks(0.0, top)
    last = max(one["steps"][-1] for one in series.values())

    def x(step: float) -> float:
        return LABEL + CURVE * step / last

    def y(value: float) -> float:
        return EDGE + HIGH_CURVE * (1 - value / axis[-1])

    parts = []
    for value in axis:
        parts.append(f'<path class="grid" d="M{LABEL:g} {y(value):.1f}h{CURVE:g}"/>')
        figure = f"{scale * value:.3g}"
        parts.append(
            f'<text class="height" x="{LABEL - 5:g}" y="{y(value) + 4:.1f}">{figure}</text>'
        )
    for step in (0, last // 2, last):
        text = f"{step}" if step in (0, last) else f"{step} steps"
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{y(0) + 16:.1f}">{text}</text>')
    for css, one in series.items():
        highs = _corners(map(x, one["steps"]), map(y, one["high"]))
        lows = _corners(map(x, one["steps"]), map(y, one["low"]))
        mean = "L".join(_corners(map(x, one["steps"]), map(y, one["mean"])))
        band = "L".join([*highs, *reversed(lows)])
        parts.append(f'<g class="{css}"><path class="band" d="M{band}Z"/>')
        parts.append(f'<path class="mean" d="M{mean}"/></g>')
    return svg(LABEL + CURVE + 24, y(0) + 20, title, parts, "curves")


def _corners(xs: Iterable[float], ys: Iterable[float]) -> list[str]:
    return [f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True)]
