"""Pictures of a report: the colours of heat maps, bars with intervals, and masks.

They are inline SVG that takes the page's style.
"""

from collections.abc import Sequence
from html import escape

from fmtrain.layout import Layout
from fmtrain.masks import EXAMPLE, State, states

Colour = tuple[int, int, int]
# lightness alone carries the order, so that no colour vision is needed; (light theme, dark theme)
LOW: tuple[Colour, Colour] = ((238, 243, 248), (23, 34, 46))
HIGH: tuple[Colour, Colour] = ((10, 74, 122), (156, 208, 255))
LESS: tuple[Colour, Colour] = ((168, 80, 6), (255, 184, 112))
GROUND: tuple[Colour, Colour] = ((247, 247, 245), (27, 31, 36))


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


def change(part: float) -> str:
    """Style of a difference: -1..1 of the largest absolute one."""
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


SERIES = {
    "base": "base, mask switched on",
    "inference-only": "causal training, mask switched on",
    "trained": "trained with the mask",
}


LEFT, WIDTH, BAR, GAP, TOP = 118.0, 236.0, 9.0, 9.0, 6.0  # pixels of a chart of bars
LETTER = 7.0  # pixels of a letter of a mask's name, at most


def bars(groups: Sequence[tuple[str, dict[str, dict]]], line: float | None, title: str) -> str:
    """Horizontal bars with intervals.

    groups: {series: {score, low, high}} of each mask; `line` marks a score to compare with.
    """
    highs = []
    for _, series in groups:
        highs += [entry["high"] for entry in series.values()]
    highest = max(highs, default=1.0)
    full = next(limit for limit in (0.1, 0.25, 0.5, 0.75, 1.0) if highest <= limit + 1e-9)
    left = max([LEFT, *(LETTER * len(name) + 8 for name, _ in groups)])
    parts, y = [], TOP
    for name, series in groups:
        middle = y + BAR * len(series) / 2
        parts.append(
            f'<text class="name" x="{left - 8:g}" y="{middle + 4:g}">{escape(name)}</text>'
        )
        for kind, entry in series.items():
            parts.append(_bar(name, kind, entry, left, y, full))
            y += BAR
        y += GAP
    bottom = y - GAP + 4
    for k in range(5):
        x, value = left + WIDTH * k / 4, f"{full * k / 4:.3f}".rstrip("0").rstrip(".")
        parts.insert(0, f'<path class="grid" d="M{x:g} {TOP - 4:g}V{bottom:g}"/>')
        parts.append(f'<text class="tick" x="{x:g}" y="{bottom + 14:g}">{value}</text>')
    if line is not None:
        x = left + WIDTH * line / full
        parts.append(f'<path class="reference" d="M{x:.1f} {TOP - 4:g}V{bottom:g}"/>')
    return svg(left + WIDTH + 18, bottom + 20, title, parts, "bars")


def _bar(name: str, kind: str, entry: dict, left: float, y: float, full: float) -> str:
    """One bar with its whisker; full: the score at the right end."""
    score, low, high = (left + WIDTH * entry[key] / full for key in ("score", "low", "high"))
    middle = y + BAR / 2
    tip = (
        f"{name}, {SERIES[kind]}: {entry['score']:.4f} "
        f"[{entry['low']:.4f}, {entry['high']:.4f}], n {entry['n']}"
    )
    place = f'x="{left:g}" y="{y + 1:g}" width="{score - left:.1f}" height="{BAR - 2:g}"'
    ends = f"M{low:.1f} {middle - 2:g}v4M{high:.1f} {middle - 2:g}v4"
    whisker = f"M{low:.1f} {middle:g}H{high:.1f}{ends}"
    return (
        f'<g><title>{escape(tip)}</title><rect class="bar {kind}" {place}/>'
        f'<path class="whisker" d="{whisker}"/></g>'
    )
