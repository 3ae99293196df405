"""Helpers of the plots: figures that show themselves in notebooks, fonts, colour scales and maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.report import aggregate, colours
from moejax.report.aggregate import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
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


def color_norm(largest: float, scale: str) -> Normalize:
    """Map values of -``largest`` to ``largest`` to colours; white at zero.

    Raises:
        MoejaxError: there is no such scale.
    """
    from matplotlib import colors

    if colours.check_scale(scale) == "sqrt":
        return colors.FuncNorm((colours.signed_root, colours.signed_square), vmin=-largest, vmax=largest)
    return colors.Normalize(-largest, largest)


def ticks_of(largest: float, scale: str) -> list[float]:
    """Values to mark along a scale of -``largest`` to ``largest``; those of roots lie evenly, not on round numbers."""
    parts = (0.04, 0.25, 1.0) if scale == "sqrt" else (0.5, 1.0)
    return [*(-largest * part for part in reversed(parts)), 0.0, *(largest * part for part in parts)]


def draw_map(axes: Axes, values: Floats, title: str, columns: str, scale: str, rows: str = "layer") -> None:
    """A map of signed values, ``rows`` by ``columns``, white at zero, with its colour bar."""
    largest = aggregate.scale_of(values)
    norm = color_norm(largest, scale)
    image = axes.imshow(values, cmap=diverging_map(), norm=norm, aspect="auto", interpolation="nearest")
    axes.set_title(title + (", square-root colours" if scale == "sqrt" else ""), loc="left", fontsize=10)
    axes.set_xlabel(columns, fontsize=9)
    axes.set_ylabel(rows, fontsize=9)
    axes.tick_params(labelsize=8, length=2)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, aspect=12)
    bar.ax.tick_params(labelsize=8)
    if scale == "sqrt":
        ticks = ticks_of(largest, scale)
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        bar.minorticks_off()


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
