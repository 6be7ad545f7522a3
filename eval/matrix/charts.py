"""Pictures of a report: the colours of heat maps, bars with intervals and masks, as inline SVG that takes the page's style."""

from collections.abc import Sequence
from html import escape

from fmtrain.layout import Layout
from fmtrain.policies import EXAMPLE, allowed

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
    """CSS variables of a cell: background and text in both themes; black or white text, whichever contrasts more."""
    found = []
    for suffix, colour in (("", light), ("d", dark)):
        found.append(
            f"--b{suffix}:#{bytes(colour).hex()};--t{suffix}:{'#000' if luminance(colour) > 0.179 else '#fff'}"
        )
    return ";".join(found)


def heat(part: float) -> str:
    """Style of a value at `part` (0..1) of its range."""
    return style(*(mix(LOW[k], HIGH[k], part) for k in (0, 1)))


def change(part: float) -> str:
    """Style of a difference: -1..1 of the largest absolute one."""
    return style(*(mix(GROUND[k], (HIGH if part > 0 else LESS)[k], abs(part)) for k in (0, 1)))


def svg(width: float, height: float, title: str, parts: Sequence[str], css: str = "") -> str:
    return (
        f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def policy_picture(mask: str, picture: str = EXAMPLE) -> str:
    """A mask on a row of two turns: rows are queries, columns keys."""
    layout = Layout.parse(picture)
    may = allowed(mask.partition("+")[0], layout)[0].tolist()
    names, cell, edge = [c for c in picture if c.isalpha()], 13, 15
    parts = []
    for k, name in enumerate(names):
        kind = "answer" if name == "A" else "text" if name == "T" else "visual"
        at = edge + (k + 0.5) * cell
        parts.append(f'<text class="token {kind}" x="{at:g}" y="11">{name}</text>')
        parts.append(f'<text class="token {kind}" x="7" y="{at + 4:g}">{name}</text>')
    for q, row in enumerate(may):
        for k, open_ in enumerate(row):
            css = "closed" if not open_ else "revealed" if k > q else "past"
            x, y = edge + k * cell, edge + q * cell
            parts.append(
                f'<rect class="{css}" x="{x + 0.75:g}" y="{y + 0.75:g}" width="{cell - 1.5:g}" height="{cell - 1.5:g}" rx="2"/>'
            )
    size = edge + cell * len(names) + 1
    return svg(size, size, f"the mask {mask} on {picture}", parts, "policy")


SERIES = {
    "base": "base, mask switched on",
    "inference-only": "causal training, mask switched on",
    "trained": "trained with the mask",
}


def bars(groups: Sequence[tuple[str, dict[str, dict]]], line: float | None, title: str) -> str:
    """Horizontal bars with intervals: groups of {series: {score, low, high}}; `line` marks a score to compare with."""
    left, width, bar, gap, top = 118.0, 236.0, 9.0, 9.0, 6.0
    highest = max((one["high"] for _, series in groups for one in series.values()), default=1.0)
    full = next(limit for limit in (0.1, 0.25, 0.5, 0.75, 1.0) if highest <= limit + 1e-9)
    parts, y = [], top
    for name, series in groups:
        tall = bar * len(series)
        parts.append(
            f'<text class="name" x="{left - 8:g}" y="{y + tall / 2 + 4:g}">{escape(name)}</text>'
        )
        for kind, one in series.items():
            score, low, high = (left + width * one[key] / full for key in ("score", "low", "high"))
            middle = y + bar / 2
            tip = f"{name}, {SERIES[kind]}: {one['score']:.4f} [{one['low']:.4f}, {one['high']:.4f}], n {one['n']}"
            whisker = f"M{low:.1f} {middle:g}H{high:.1f}M{low:.1f} {middle - 2:g}v4M{high:.1f} {middle - 2:g}v4"
            parts.append(
                f'<g><title>{escape(tip)}</title><rect class="bar {kind}" x="{left:g}" y="{y + 1:g}" width="{score - left:.1f}" '
                f'height="{bar - 2:g}"/><path class="whisker" d="{whisker}"/></g>'
            )
            y += bar
        y += gap
    bottom = y - gap + 4
    for k in range(5):
        x, value = left + width * k / 4, f"{full * k / 4:.3f}".rstrip("0").rstrip(".")
        parts.insert(0, f'<path class="grid" d="M{x:g} {top - 4:g}V{bottom:g}"/>')
        parts.append(f'<text class="tick" x="{x:g}" y="{bottom + 14:g}">{value}</text>')
    if line is not None:
        x = left + width * line / full
        parts.append(f'<path class="reference" d="M{x:.1f} {top - 4:g}V{bottom:g}"/>')
    return svg(left + width + 18, bottom + 20, title, parts, "bars")
