"""Plots of what ``moejax analyse`` found. Matplotlib is imported when a figure is asked for, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.report.aggregate import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = dict[str, Any]

_GREY = "#57606a"
# Okabe and Ito's, which the colour-blind tell apart; on white, each with a marker of its own
_LINES = (("#0072B2", "o"), ("#56B4E9", "s"), ("#D55E00", "^"), ("#E69F00", "D"), ("#009E73", "v"))
_PER_LAYER = {
    "router_entropy": "router entropy / ln routes",
    "weight_entropy": "weight entropy / ln slots",
    "router_margin": "router margin",
    "weight_margin": "weight margin",
    "usage_entropy": "usage entropy / ln experts",
}
_PANELS = 4
"""Layers of which co-activation is drawn."""
_WORDS = {"feed_forward": "feed-forward experts", "attention": "attention experts"}


def routing_figures(found: Found) -> dict[str, Figure]:
    """Figures by file name: of each kind of mixture its utilisation, router, co-activation, overlap and labels.

    What the data has nothing for is left out.
    """
    figures: dict[str, Figure] = {}
    for kind, mixtures in found["mixtures"].items():
        layers = [layer for layer in mixtures["layers"] if layer["utilisation"] is not None]
        prefix, title = "" if kind == "feed_forward" else f"{kind}_", f"{visible(found['model'])}: {_WORDS[kind]}"
        if layers:
            figures[f"{prefix}utilisation"] = _utilisation(layers, title)
            figures[f"{prefix}router"] = _router(layers, title)
            figures[f"{prefix}coactivation"] = _coactivation(layers, title)
        if mixtures["layer_overlap"] is not None and len(mixtures["layers"]) > 1:
            figures[f"{prefix}layer_overlap"] = _overlap(mixtures, title)
        if any(layer["label_divergence"] is not None for layer in layers):
            figures[f"{prefix}labels"] = _labels(layers, found["labels"], title)
        if found["changes"] and any(change["overlap"] is not None for change in found["changes"][kind]):
            figures[f"{prefix}changes"] = _changes(found["changes"][kind], visible(found["against"]), title)
    return figures


def _utilisation(layers: list[Found], title: str) -> Figure:
    widest = max(layer["experts"] for layer in layers)
    loads = np.full((len(layers), widest), np.nan)
    for row, layer in zip(loads, layers, strict=True):
        row[: layer["experts"]] = np.array(layer["utilisation"]) * layer["experts"]
    drawing = _new(max(6.0, min(14.0, 0.16 * widest + 3)), max(2.6, min(9.0, 0.28 * len(layers) + 1.6)), title)
    axes = drawing.subplots()
    with np.errstate(divide="ignore"):
        _ratio_map(axes, np.log2(loads), "share of slots / even share")
    dead = [(at[1], at[0]) for at in np.argwhere(loads == 0)]
    if dead:
        axes.plot(*zip(*dead, strict=True), "x", color="white", markersize=5, linestyle="none")
    axes.set_title("Utilisation" + (" (x: selected by no token)" if dead else ""), loc="left", fontsize=10)
    axes.set_xlabel("expert")
    _label_layers(axes, layers)
    return drawing


def _router(layers: list[Found], title: str) -> Figure:
    drawing = _new(7.5, 4.2, title)
    axes = drawing.subplots()
    for (name, label), (colour, marker) in zip(_PER_LAYER.items(), _LINES, strict=True):
        _line(axes, layers, name, label, colour, marker)
    axes.set_title("How decided the router is, and how even the usage", loc="left", fontsize=10)
    axes.set_ylim(-0.02, 1.02)
    _finish_lines(axes, [layer["layer"] for layer in layers])
    return drawing


def _coactivation(layers: list[Found], title: str) -> Figure:
    chosen = [layers[i] for i in sorted({round(x) for x in np.linspace(0, len(layers) - 1, _PANELS)})]
    maps = []
    for layer in chosen:
        values = np.array(layer["coactivation"], np.float64)
        np.fill_diagonal(values, np.nan)
        maps.append(values)
    finite = [values[np.isfinite(values)].max(initial=0) for values in maps]
    drawing = _new(3.0 * len(chosen) + 1.4, 4.0, title)
    panels = np.atleast_1d(drawing.subplots(1, len(chosen), squeeze=False)[0])
    images = [_map(axes, v, "YlGnBu", max(*finite, 1e-9)) for axes, v in zip(panels, maps, strict=True)]
    for axes, layer in zip(panels, chosen, strict=True):
        axes.set_title(f"layer {layer['layer']}", loc="left", fontsize=10)
        axes.set_xlabel("also selected expert")
    panels[0].set_ylabel("of the tokens of expert")
    _bar(drawing, images[0], list(panels), "share of tokens")
    return drawing


def _overlap(mixtures: Found, title: str) -> Figure:
    values = np.array(mixtures["layer_overlap"], np.float64)
    values[values < 0] = np.nan
    np.fill_diagonal(values, np.nan)
    size = max(4.2, min(9.0, 0.22 * len(values) + 3))
    drawing = _new(size + 1.2, size, title)
    axes = drawing.subplots()
    image = _map(axes, values, "YlGnBu", max(float(np.nanmax(values, initial=0)), 1e-9))
    chance = mixtures["random_overlap"]
    told = "" if chance is None else f" (drawn at random: {chance:.3f})"
    axes.set_title(f"Overlap of a token's sets{told}", loc="left", fontsize=10)
    axes.set_xlabel("layer")
    _label_layers(axes, mixtures["layers"])
    _label_layers(axes, mixtures["layers"], across=True)
    _bar(drawing, image, axes, "intersection over union")
    if len(values) <= 12:
        for row, column in np.argwhere(np.isfinite(values)):
            dark = values[row, column] > 0.6 * np.nanmax(values)
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else "black"}
            axes.text(column, row, f"{values[row, column]:.2f}", **style)
    return drawing


def _labels(layers: list[Found], labels: list[str], title: str) -> Figure:
    known = [layer for layer in layers if layer["label_divergence"] is not None]
    most = max(known, key=lambda layer: layer["label_divergence"])
    usage = np.array(most["label_usage"], np.float64)
    usage[usage.sum(-1) == 0] = np.nan
    even = np.nanmean(usage, axis=0)
    drawing = _new(max(8.0, min(15.0, 0.16 * most["experts"] + 7)), max(3.6, min(9.0, 0.3 * len(labels) + 2)), title)
    left, right = drawing.subplots(1, 2, width_ratios=[1.6, 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        _ratio_map(left, np.log2(usage / even), "share of slots / mean of the labels")
    left.set_title(f"Usage by label, layer {most['layer']} (the most specialised)", loc="left", fontsize=10)
    left.set_xlabel("expert")
    left.set_yticks(range(len(labels)), [_short(label) for label in labels], fontsize=8, parse_math=False)
    _line(right, known, "label_divergence", "labels", *_LINES[0])
    _line(right, known, "token_specialisation", "token ids", *_LINES[2])
    right.set_title("Specialisation (0: none, 1: full)", loc="left", fontsize=10)
    right.set_ylim(0.0)
    _finish_lines(right, [layer["layer"] for layer in known])
    return drawing


def _changes(changes: list[Found], against: str, title: str) -> Figure:
    drawing = _new(7.0, 3.8, title)
    axes = drawing.subplots()
    _line(axes, changes, "overlap", "set overlap", *_LINES[0])
    _line(axes, changes, "switch_rate", "switch rate", *_LINES[2])
    axes.set_title(f"Against {against}, same data", loc="left", fontsize=10, parse_math=False)
    axes.set_ylim(-0.02, 1.02)
    _finish_lines(axes, [change["layer"] for change in changes])
    return drawing


# ---- what the figures share ----------------------------------------------------------------------------------------


def _new(width: float, height: float, title: str) -> Figure:
    from moejax.report.notebook_figure import NotebookFigure

    drawing = NotebookFigure(figsize=(width, height), layout="constrained", dpi=130, facecolor="white")
    drawing.suptitle(title, fontsize=11, parse_math=False)
    return drawing


def _map(axes: Axes, values: np.ndarray, colours: str, high: float, low: float = 0.0) -> Any:
    from matplotlib import colormaps

    cmap = colormaps[colours].with_extremes(bad="#e5e7eb")
    shown = np.ma.masked_invalid(values)
    return axes.imshow(shown, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")


def _ratio_map(axes: Axes, logs: np.ndarray, label: str) -> None:
    """Logarithms to base 2 of ratios, white where the ratio is one; what lies beyond the scale has its last colour."""
    high = float(np.clip(np.ceil(np.abs(logs[np.isfinite(logs)]).max(initial=0)), 1, 3))
    image = _map(axes, np.where(np.isneginf(logs), -high, logs), "PuOr_r", high, -high)
    bar = _bar(axes.figure, image, axes, label)
    ticks = np.arange(-high, high + 1)
    bar.set_ticks(ticks, labels=[f"{2.0**tick:g}" for tick in ticks])


def _bar(drawing: Any, image: Any, axes: Any, label: str) -> Any:
    bar = drawing.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=18)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return bar


def _line(axes: Axes, layers: list[Found], name: str, label: str, colour: str, marker: str) -> None:
    known = [(layer["layer"], layer[name]) for layer in layers if layer.get(name) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)


def _finish_lines(axes: Axes, layers: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(min(layers) - 0.3, max(layers) + 0.3)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _label_layers(axes: Axes, layers: list[Found], across: bool = False) -> None:
    step = max(1, -(-len(layers) // 24))
    ticks, names = range(0, len(layers), step), [str(layer["layer"]) for layer in layers[::step]]
    if across:
        axes.set_xticks(ticks, names)
    else:
        axes.set_yticks(ticks, names)
        axes.set_ylabel("layer")
    axes.tick_params(labelsize=8, length=2, color=_GREY)


def _short(label: str) -> str:
    shown = visible(label)
    return shown if len(shown) <= 18 else shown[:17] + "…"
