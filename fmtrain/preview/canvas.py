"""A page to draw on, placed in pixels. matplotlib is imported by what draws.

Shape names: N cells along an edge of a picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

INK = "#1B1F24"
DPI = 100


class Box(NamedTuple):
    """Where in a PNG a mask stands, in pixels from the upper left, and how many cells it has along
    an edge."""

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
            raise ValueError(
                "a picture needs matplotlib: pip install 'fmtrain[preview]'"
            ) from error
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

        style = dict(facecolor=colour, edgecolor="none", antialiased=False, zorder=1)
        self.page.add_patch(Rectangle((x, y), width, height, **style))

    def line(
        self, x: list[float], y: list[float], width: float, colour: str = INK, **style
    ) -> None:
        style = {"solid_capstyle": "butt", "dash_capstyle": "butt", "zorder": 3, **style}
        self.page.plot(x, y, color=colour, linewidth=width * 72 / DPI, **style)

    def cells(self, box: Box, values: torch.Tensor, colours: list[str]) -> None:
        """Small numbers [N, N] as squares of their colours that fill the box; a gap between them
        where they are large enough."""
        from matplotlib.colors import ListedColormap

        left, bottom = box.left / self.width, 1 - (box.top + box.side) / self.height
        axes = self.figure.add_axes([left, bottom, box.side / self.width, box.side / self.height])
        axes.set_zorder(-1)
        axes.axis("off")
        scale = dict(cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1)
        axes.imshow(values.numpy(), interpolation="nearest", aspect="auto", **scale)
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
