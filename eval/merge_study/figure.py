"""The picture of a merge study: heat maps of layers x heads, and what the forms cost in loss."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

SHARES = {
    "future": "attention on the future under {policy}\n"
    "(sum of a query's weights on its revealed keys)",
    "pooled": "what the merge pools of it\n(C$_i$, kernel size {kernel_size})",
}
DISTANCES = {
    "merge_distance": "merge, from direct access\n(relative distance of outputs)",
    "control_distance": "control: same mass to the sink,\nblind to the future",
    "causal_distance": "causal: no future at all,\nno mass moved",
}
COLOURS = {"direct": "#4c566a", "merge": "#1b7837", "control": "#d6604d", "causal": "#4393c3"}
ANNOTATED = 100  # cells; more of them have no room for a number


def _heat_map(axes: Axes, values: np.ndarray, title: str, top: float, colours: str) -> AxesImage:
    image = axes.imshow(values, vmin=0, vmax=top, cmap=colours, aspect="auto")
    axes.set_title(title, fontsize=10)
    layers, heads = values.shape
    axes.set_xticks(range(0, heads, max(1, heads // 8)))
    axes.set_yticks(range(0, layers, max(1, layers // 12)))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    if values.size <= ANNOTATED:
        for (layer, head), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
            style = {"ha": "center", "va": "center", "color": "black" if bright else "white"}
            axes.text(head, layer, f"{value:.2f}", fontsize=9, **style)
    return image


def _row(
    axes: list[Axes], maps: dict[str, np.ndarray], titles: dict[str, str], colours: str, label: str
) -> None:
    """Heat maps side by side on one scale, with one colour bar."""
    top = max(values.max() for values in maps.values())
    for each, (name, values) in zip(axes, maps.items()):
        image = _heat_map(each, values, titles[name], top, colours)
    axes[0].figure.colorbar(image, ax=axes, label=label, pad=0.01, fraction=0.05)


def _losses(axes: Axes, result: dict) -> None:
    """Differences of loss to direct access, with their 95 % intervals."""
    forms = [form for form in result["loss"] if form != "direct"]
    for place, form in enumerate(forms):
        part = result["loss"][form]["minus_direct"]
        mean, style = part["mean"], {"fmt": "o", "capsize": 4, "markersize": 7}
        spread = [[mean - part["low"]], [part["high"] - mean]]
        axes.errorbar([mean], [place], xerr=spread, color=COLOURS[form], **style)
        above = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{mean:+.3f}", (mean, place), fontsize=9, **above)
    axes.axvline(0, color=COLOURS["direct"], linewidth=1, linestyle="--")
    axes.set_yticks(range(len(forms)), forms)
    axes.set_ylim(len(forms) - 0.5, -0.7)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("nats per answer token, 95 % interval")
    direct = result["loss"]["direct"]["mean"]
    axes.set_title(f"loss above direct access\n(direct: {direct:.3f})", fontsize=10)


def draw(result: dict, path: str | Path) -> None:
    """Write the PNG. result: the content of merge_study.json."""
    maps = {name: np.asarray(values) for name, values in result["per_head"].items()}
    height = np.clip(1.4 + 0.42 * len(maps["future"]), 3.2, 5.5)  # inches of a row
    figure = Figure(figsize=(14, 2 * height + 0.8), dpi=130, layout="constrained")
    figure.suptitle(
        f"{result['mask']} against direct access: {result['checkpoint']} on {result['rows']} rows "
        f"of {Path(result['dataset']).name}, {result['queries']} queries that reveal something",
        fontsize=12,
    )
    upper, lower = (part.subplots(1, 3) for part in figure.subfigures(2, 1))
    names = {"policy": result["policy"], "kernel_size": result["merge"]["kernel_size"]}
    titles = {name: title.format(**names) for name, title in SHARES.items()}
    shares = {name: maps[name] for name in SHARES}
    _row(list(upper[:2]), shares, titles, "viridis", "attention, mean of queries")
    _losses(upper[2], result)
    distances = {name: maps[name] for name in DISTANCES}
    _row(list(lower), distances, DISTANCES, "magma", r"$\|o - o_{direct}\| \;/\; \|o_{direct}\|$")
    figure.savefig(path, format="png")
