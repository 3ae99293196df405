"""Figures of the relevance of a generated text: tokens by steps, the tokens of one step, and the graph of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.report.aggregate import Floats, scale_of
from moejax.report.colours import GREY
from moejax.report.plots._drawing import Fonts, diverging_map, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Size = tuple[float | int, float | int]
"""Width and height in inches."""

_ROW = 0.42
"""Height of a node in inches."""

_TALLEST = 80.0
"""Largest height of a graph in inches."""

_LABELS = 60
"""Most names along an axis."""

_NUMBERS = 400
"""Largest number of cells of a map with a number written into each."""


def token_map(
    columns: Sequence[Floats],
    tokens: Sequence[str],
    steps: Sequence[str],
    prompt: int,
    figsize: Size,
) -> Figure:
    """A map of tokens (rows) by steps (columns), blank where a token comes after the step.

    Args:
        columns: for each step the relevance of the tokens before it.
        tokens: text of each row.
        steps: text of each column.
        prompt: number of tokens of the prompt; a line marks its end.
        figsize: width and height in inches.
    """
    values = np.full((len(tokens), len(columns)), np.nan)
    for index, column in enumerate(columns):
        values[: len(column), index] = column
    drawing, fonts = new_figure(*figsize), Fonts()
    axes = drawing.subplots()
    _heat(drawing, axes, values)
    if len(tokens) > prompt:
        axes.axhline(prompt - 0.5, color=GREY, linewidth=0.8, linestyle=":")
    _name(axes, "y", tokens, fonts)
    _name(axes, "x", steps, fonts)
    axes.set_ylabel("token read")
    axes.set_xlabel("token generated")
    axes.set_title("Relevance of each token for each generated token", loc="left", fontsize=10)
    return drawing


def token_heatmap(scores: Floats, tokens: Sequence[str], step: str, figsize: Size) -> Figure:
    """A map of one row: the relevance of each token for one step."""
    drawing, fonts = new_figure(*figsize), Fonts()
    axes = drawing.subplots()
    _heat(drawing, axes, scores[None])
    _name(axes, "x", tokens, fonts)
    axes.set_yticks([])
    axes.set_title(f"Relevance for {fonts.drawable(step)}", loc="left", fontsize=10, **fonts.style())
    return drawing


def node_graph(
    nodes: Mapping[str, float | None],
    graph: Mapping[str, Mapping[str, Any]],
    *,
    title: str = "",
    with_text: bool = True,
) -> Figure:
    """Nodes as boxes coloured by their value, inputs at the bottom, with arrows in the direction of the forward pass.

    Args:
        nodes: the value of each node to draw, the output first; ``None`` draws it without one. Arrows to nodes that are
            not drawn are left out.
        graph: the ``class`` of every node, its ``type`` (``"stream"`` or ``"branch"``) and its ``child`` nodes.
        title: text above the graph.
        with_text: write names and draw arrows; without them, a graph of very many nodes is drawn quickly.
    """
    from matplotlib.patches import FancyBboxPatch

    height = min(_TALLEST, max(2.5, _ROW * len(nodes) + 1))
    drawing = new_figure(9.0, height)
    axes, cmap = drawing.subplots(), diverging_map()
    # the text must fit into its row, whatever the height of a row
    size = min(7.5, 72 * height / max(len(nodes) + 2, 1) * 0.4)
    largest = max((v for v in nodes.values() if v is not None and np.isfinite(v)), default=0.0) or 1.0
    places = {name: (float(graph[name]["type"] == "branch"), -float(i)) for i, name in enumerate(nodes)}
    for name, value in nodes.items():
        x, y = places[name]
        is_coloured = value is None or np.isfinite(value)
        shade = cmap(0.5 + 0.5 * min((value or 0.0) / largest, 1.0)) if is_coloured else GREY
        box = FancyBboxPatch((x - 0.42, y - 0.3), 0.84, 0.6, "round,pad=0,rounding_size=0.06", fc=shade, ec=GREY)
        axes.add_patch(box)
        if with_text:
            ink = "white" if (value or 0.0) > 0.7 * largest else "black"
            text = f"{name}  [{graph[name]['class']}]" + ("" if value is None else f"  {value:.4g}")
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
    # an arrow that skips a branch is drawn to the left of the arrow that leaves the branch
    side = -0.2 if below[0] == above[0] and above[1] - below[1] > 1.5 else 0.0
    style = {"arrowstyle": "-|>", "color": GREY, "lw": 0.7, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (above[0] + side, above[1] - 0.3), (below[0] + side, below[1] + 0.3), arrowprops=style)


def _heat(drawing: Figure, axes: Axes, values: Floats) -> None:
    """A map of signed values, with numbers if there are few."""
    scale = scale_of(values)
    image = axes.imshow(values, cmap=diverging_map(), vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
    drawing.colorbar(image, ax=axes, pad=0.01, fraction=0.03, label="relevance")
    if values.size <= _NUMBERS:
        for (y, x), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if abs(value) > 0.7 * scale else "black"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=6, color=ink)


def _name(axes: Axes, which: str, names: Sequence[str], fonts: Fonts) -> None:
    """Names along the ``"x"`` or ``"y"`` axis; every n-th if there are many."""
    step = max(1, -(-len(names) // _LABELS))
    ticks = list(range(0, len(names), step))
    labels = [fonts.drawable(names[i]) for i in ticks]
    if which == "y":
        axes.set_yticks(ticks, labels, fontsize=8, **fonts.style())
    else:
        axes.set_xticks(ticks, labels, fontsize=8, rotation=90, **fonts.style())
