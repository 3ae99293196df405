"""Helpers of the plots: figures that show themselves in notebooks, fonts, colour scales and maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.report import aggregate, colours
from moejax.report.aggregate import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font

_LABEL_LENGTH = 14
"""Longest label of a token, in characters."""

_FALLBACK_FONTS = ("Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Devanagari")
"""Fonts for characters that matplotlib's default font lacks, in order of preference."""


class Fonts:
    """The installed fonts to use for tokens, and the characters that they can draw together."""

    def __init__(self) -> None:
        from matplotlib import font_manager, rcParams

        installed = set(font_manager.get_font_names())
        self.families = [*rcParams["font.family"], *(name for name in _FALLBACK_FONTS if name in installed)]
        paths = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in self.families]
        fonts: list[FT2Font] = [font_manager.get_font(path) for path in paths]
        self._drawable = set().union(*(font.get_charmap() for font in fonts))

    def drawable(self, text: str) -> str:
        """The text, shortened, with a replacement sign for characters that no font has.

        Matplotlib would warn about each such character.
        """
        shown = "".join(c if ord(c) in self._drawable else "\ufffd" for c in aggregate.visible(text))
        return shown if len(shown) <= _LABEL_LENGTH else shown[: _LABEL_LENGTH - 1] + "…"

    def style(self) -> dict[str, Any]:
        """Arguments for text that shows tokens; a dollar sign in them does not begin a formula."""
        return {"parse_math": False, "fontfamily": self.families}


def new_figure(width: float | int, height: float | int, dpi: int = 120, **options: Any) -> Figure:
    """An empty figure, without pyplot, that shows itself in notebooks; width and height in inches."""
    from moejax.report.notebook_figure import NotebookFigure

    return NotebookFigure(figsize=(width, height), layout="constrained", dpi=dpi, **options)


def diverging_map() -> Colormap:
    """The colour scale of signed relevance."""
    from matplotlib import colors

    stops = [tuple(c / 255 for c in stop) for stop in colours.DIVERGING]
    return colors.LinearSegmentedColormap.from_list("relevance", stops)


def draw_map(axes: Axes, values: Floats, title: str, columns: str) -> None:
    """A map of signed values, layers by ``columns``, white at zero, with its colour bar."""
    scale = aggregate.scale_of(values)
    image = axes.imshow(values, cmap=diverging_map(), vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(columns, fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.tick_params(labelsize=8, length=2)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, aspect=12)
    bar.ax.tick_params(labelsize=8)


def label_layers(axes: Axes, rows: int, final: bool) -> None:
    """Number the rows of a map by layer; with ``final``, the last row is labelled ``final``."""
    last = rows - 1 if final else rows
    step = max(1, round(last / 12))
    ticks = [row for row in range(0, last, step) if not final or last - row >= step or row == 0]
    axes.set_yticks(ticks + [last] * final, [str(row) for row in ticks] + ["final"] * final)


def label_tokens(axes: Axes, tokens: list[str], weight: Floats, fonts: Fonts, most: int) -> None:
    """Name every token if there are at most ``most``; otherwise the tokens of largest weight that have enough room."""
    gap = len(tokens) / most
    chosen: list[int] = []
    for index in np.argsort(-weight, kind="stable"):
        if all(abs(int(index) - other) >= gap for other in chosen):
            chosen.append(int(index))
    names = [fonts.drawable(tokens[index].strip(" ") or tokens[index]) for index in chosen]
    upright = len(tokens) > 14
    style = {"rotation": 90, "va": "top"} if upright else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(chosen, names, fontsize=8, **style, **fonts.style())
    axes.tick_params(axis="x", length=2)
