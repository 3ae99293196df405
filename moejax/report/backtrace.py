"""Figures of a generation's relevance: tokens against steps, one step's tokens, and the graph of the model's nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.report.aggregate import DIVERGING, Floats, scale_of
from moejax.report.plots import Fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Size = tuple[float | int, float | int]
"""Width and height in inches."""

_GREY = "#57606a"
_ROW = 0.42
_TALLEST = 80.0
_LABELS = 60
_NUMBERS = 400
"""In more cells than these no numbers are written."""


def token_map(
    columns: Sequence[Floats],
    tokens: Sequence[str],
    steps: Sequence[str],
    prompt: int,
    figsize: Size,
) -> Figure:
    """Tokens (rows) by steps (columns), blank where a token came after the step.

    Args:
        columns: of each step the relevance of the tokens before it.
        prompt: how many tokens the prompt has; a line marks its end.
    """
    values = np.full((len(tokens), len(columns)), np.nan)
    for index, column in enumerate(columns):
        values[: len(column), index] = column
    drawing, fonts = _drawing(figsize), Fonts()
    axes = drawing.subplots()
    _heat(drawing, axes, values)
    if len(tokens) > prompt:
        axes.axhline(prompt - 0.5, color=_GREY, linewidth=0.8, linestyle=":")
    _name(axes, "y", tokens, fonts)
    _name(axes, "x", steps, fonts)
    axes.set_ylabel("token read")
    axes.set_xlabel("token generated")
    axes.set_title("Relevance of each token for each generated token", loc="left", fontsize=10)
    return drawing


def token_heatmap(scores: Floats, tokens: Sequence[str], step: str, figsize: Size) -> Figure:
    """One step's tokens in a row."""
    drawing, fonts = _drawing(figsize), Fonts()
    axes = drawing.subplots()
    _heat(drawing, axes, scores[None])
    _name(axes, "x", tokens, fonts)
    axes.set_yticks([])
    axes.set_title(f"Relevance for {fonts.drawable(step)}", loc="left", fontsize=10, **fonts.style())
    return drawing


def node_graph(
    nodes: Mapping[str, float], graph: Mapping[str, Mapping[str, Any]], *, title: str = "", with_text: bool = True
) -> Figure:
    """The nodes as boxes, inputs below, coloured by their value, with arrows the way values flow.

    Args:
        nodes: the value of each node to draw, the output first; the arrows of one that is left out are too.
        graph: of every node its ``class``, its ``type`` (``"stream"`` or ``"branch"``) and its ``child`` nodes.
        with_text: name the nodes; without, only colours are drawn, which is quick for very many.
    """
    from matplotlib.patches import FancyBboxPatch

    height = min(_TALLEST, max(2.5, _ROW * len(nodes) + 1))
    drawing = _drawing((9.0, height))
    axes, cmap = drawing.subplots(), _colours()
    # text must fit into its row, however low rows are
    size = min(7.5, 72 * height / max(len(nodes) + 2, 1) * 0.4)
    largest = max((v for v in nodes.values() if np.isfinite(v)), default=0.0) or 1.0
    places = {name: (float(graph[name]["type"] == "branch"), -float(i)) for i, name in enumerate(nodes)}
    for name, value in nodes.items():
        x, y = places[name]
        shade = cmap(0.5 + 0.5 * min(value / largest, 1.0)) if np.isfinite(value) else _GREY
        box = FancyBboxPatch((x - 0.42, y - 0.3), 0.84, 0.6, "round,pad=0,rounding_size=0.06", fc=shade, ec=_GREY)
        axes.add_patch(box)
        if with_text:
            ink = "white" if value > 0.7 * largest else "black"
            text = f"{name}  [{graph[name]['class']}]  {value:.4g}"
            axes.text(x, y, text, ha="center", va="center", fontsize=size, color=ink)
        for child in graph[name]["child"]:
            if with_text and child in places:
                _arrow(axes, places[child], places[name])
    axes.set_xlim(-0.6, 1.6)
    axes.set_ylim(-len(nodes), 1)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=10)
    return drawing


def _arrow(axes: Axes, below: tuple[float, float], above: tuple[float, float]) -> None:
    # what skips a branch keeps to the left of what comes from it
    side = -0.2 if below[0] == above[0] and above[1] - below[1] > 1.5 else 0.0
    style = {"arrowstyle": "-|>", "color": _GREY, "lw": 0.7, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (above[0] + side, above[1] - 0.3), (below[0] + side, below[1] + 0.3), arrowprops=style)


def _drawing(figsize: Size) -> Figure:
    from moejax.report.notebook_figure import NotebookFigure

    return NotebookFigure(figsize=figsize, layout="constrained", dpi=120)


def _colours() -> Colormap:
    from matplotlib import colors

    return colors.LinearSegmentedColormap.from_list("relevance", [tuple(c / 255 for c in stop) for stop in DIVERGING])


def _heat(drawing: Figure, axes: Axes, values: Floats) -> None:
    scale = scale_of(values)
    image = axes.imshow(values, cmap=_colours(), vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
    drawing.colorbar(image, ax=axes, pad=0.01, fraction=0.03, label="relevance")
    if values.size <= _NUMBERS:
        for (y, x), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if abs(value) > 0.7 * scale else "black"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=6, color=ink)


def _name(axes: Axes, which: str, names: Sequence[str], fonts: Fonts) -> None:
    step = max(1, -(-len(names) // _LABELS))
    ticks = list(range(0, len(names), step))
    labels = [fonts.drawable(names[i]) for i in ticks]
    if which == "y":
        axes.set_yticks(ticks, labels, fontsize=8, **fonts.style())
    else:
        axes.set_xticks(ticks, labels, fontsize=8, rotation=90, **fonts.style())
