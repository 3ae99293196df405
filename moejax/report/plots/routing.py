"""Plots of routing statistics: utilisation, router, co-activation, overlap of layers, labels, and changes.

Each takes the dictionary of ``study.Analysis.to_dict()``, an index ``target`` that it ignores (every plot has one; this
data has no targets), and the kind of mixture: ``"feed_forward"`` or ``"attention"``. All raise MoejaxError if the data
has nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.errors import MoejaxError
from moejax.report.aggregate import visible
from moejax.report.colours import GREY, GRID, MISSING, RATIOS, SERIES, SHARES
from moejax.report.plots._drawing import new_figure
from moejax.report.plots._registry import Plot, register_plot
from moejax.report.schema import LayerEntry, RoutingReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PER_LAYER = {
    "router_entropy": "router entropy / ln routes",
    "weight_entropy": "weight entropy / ln slots",
    "router_margin": "router margin",
    "weight_margin": "weight margin",
    "usage_entropy": "usage entropy / ln experts",
}
"""Statistics of a layer in the plot of the router, with their labels."""

_PANELS = 4
"""Number of layers in the plot of co-activation."""

KIND_NAMES = {"feed_forward": "feed-forward experts", "attention": "attention experts"}
"""Kinds of mixtures, with their names in tables and titles."""


def routing_figures(report: RoutingReport) -> dict[str, Figure]:
    """All figures that the statistics have data for, by file name: utilisation, router, co-activation, and so on.

    Names of figures of attention experts begin with ``attention_``.
    """
    figures: dict[str, Figure] = {}
    for kind in report["mixtures"]:
        prefix = "" if kind == "feed_forward" else f"{kind}_"
        figures |= {f"{prefix}{name}": _DRAW[name](report, kind=kind) for name in _available(report, kind)}
    return figures


def _available(report: RoutingReport, kind: str) -> list[str]:
    """Names of the plots of that kind of mixture that there is data for."""
    if kind not in report["mixtures"]:
        return []
    mixtures, layers = report["mixtures"][kind], _used_layers(report, kind)
    names = ["utilisation", "router", "coactivation"] if layers else []
    if mixtures["layer_overlap"] is not None and len(mixtures["layers"]) > 1:
        names.append("layer_overlap")
    if any(layer["label_divergence"] is not None for layer in layers):
        names.append("labels")
    if report["changes"] and any(change["overlap"] is not None for change in report["changes"][kind]):
        names.append("changes")
    return names


def _require(report: RoutingReport, kind: str, name: str) -> None:
    """Raise MoejaxError unless there is data for that plot."""
    names = _available(report, kind)
    if name not in names:
        has = f"there is {', '.join(names)}" if names else f"choose from the kinds {', '.join(report['mixtures'])}"
        raise MoejaxError(f"the statistics have no {name!r} of kind {kind!r} to plot; {has}.")


def _used_layers(report: RoutingReport, kind: str) -> list[LayerEntry]:
    """Statistics of the layers whose experts were used."""
    return [layer for layer in report["mixtures"][kind]["layers"] if layer["utilisation"] is not None]


def _title(report: RoutingReport, kind: str) -> str:
    return f"{visible(report['model'])}: {KIND_NAMES.get(kind, kind)}"


@register_plot("utilisation")
def utilisation(report: RoutingReport, target: int = 0, kind: str = "feed_forward") -> Figure:
    """Slots that each expert of each layer fills, over an even share; a cross marks experts that no token selected."""
    _require(report, kind, "utilisation")
    layers = _used_layers(report, kind)
    widest = max(layer["experts"] for layer in layers)
    loads = np.full((len(layers), widest), np.nan)
    for row, layer in zip(loads, layers, strict=True):
        row[: layer["experts"]] = np.array(layer["utilisation"]) * layer["experts"]
    drawing = _new(
        max(6.0, min(14.0, 0.16 * widest + 3)), max(2.6, min(9.0, 0.28 * len(layers) + 1.6)), _title(report, kind)
    )
    axes = drawing.subplots()
    with np.errstate(divide="ignore"):
        _ratio_map(axes, np.log2(loads), "slots / even share")
    dead = [(at[1], at[0]) for at in np.argwhere(loads == 0)]
    if dead:
        axes.plot(*zip(*dead, strict=True), "x", color="white", markersize=5, linestyle="none")
    axes.set_title("Utilisation" + (" (x: no token selects it)" if dead else ""), loc="left", fontsize=10)
    axes.set_xlabel("expert")
    _label_layers(axes, layers)
    return drawing


@register_plot("router")
def router(report: RoutingReport, target: int = 0, kind: str = "feed_forward") -> Figure:
    """Entropies and margins of the router, and evenness of the usage, by layer."""
    _require(report, kind, "router")
    layers = _used_layers(report, kind)
    drawing = _new(7.5, 4.2, _title(report, kind))
    axes = drawing.subplots()
    for (name, label), (colour, marker) in zip(_PER_LAYER.items(), SERIES, strict=True):
        _line(axes, layers, name, label, colour, marker)
    axes.set_title("Router entropy and margins, evenness of usage", loc="left", fontsize=10)
    axes.set_ylim(-0.02, 1.02)
    _finish_lines(axes, [layer["layer"] for layer in layers])
    return drawing


@register_plot("coactivation")
def coactivation(report: RoutingReport, target: int = 0, kind: str = "feed_forward") -> Figure:
    """Fraction of an expert's tokens that also selected another, for some layers."""
    _require(report, kind, "coactivation")
    layers = _used_layers(report, kind)
    chosen = [layers[i] for i in sorted({round(x) for x in np.linspace(0, len(layers) - 1, _PANELS)})]
    maps = []
    for layer in chosen:
        values = np.array(layer["coactivation"], np.float64)
        np.fill_diagonal(values, np.nan)
        maps.append(values)
    finite = [values[np.isfinite(values)].max(initial=0) for values in maps]
    drawing = _new(3.0 * len(chosen) + 1.4, 4.0, _title(report, kind))
    panels = np.atleast_1d(drawing.subplots(1, len(chosen), squeeze=False)[0])
    images = [_map(axes, v, SHARES, max(*finite, 1e-9)) for axes, v in zip(panels, maps, strict=True)]
    for axes, layer in zip(panels, chosen, strict=True):
        axes.set_title(f"layer {layer['layer']}", loc="left", fontsize=10)
        axes.set_xlabel("expert that they also select")
    panels[0].set_ylabel("tokens of expert")
    _bar(drawing, images[0], list(panels), "fraction of tokens")
    return drawing


@register_plot("layer_overlap")
def layer_overlap(report: RoutingReport, target: int = 0, kind: str = "feed_forward") -> Figure:
    """Intersection over union of a token's experts in each two layers."""
    _require(report, kind, "layer_overlap")
    mixtures = report["mixtures"][kind]
    values = np.array(mixtures["layer_overlap"], np.float64)
    values[values < 0] = np.nan
    np.fill_diagonal(values, np.nan)
    size = max(4.2, min(9.0, 0.22 * len(values) + 3))
    drawing = _new(size + 1.2, size, _title(report, kind))
    axes = drawing.subplots()
    image = _map(axes, values, SHARES, max(float(np.nanmax(values, initial=0)), 1e-9))
    chance = mixtures["random_overlap"]
    expected = "" if chance is None else f" (at random: {chance:.3f})"
    axes.set_title(f"Overlap of a token's experts in two layers{expected}", loc="left", fontsize=10)
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


@register_plot("labels")
def labels(report: RoutingReport, target: int = 0, kind: str = "feed_forward") -> Figure:
    """Usage by label in the most specialised layer, and specialisation by layer."""
    _require(report, kind, "labels")
    layers, texts = _used_layers(report, kind), report["labels"]
    known = [layer for layer in layers if layer["label_divergence"] is not None]
    most = max(known, key=lambda layer: layer["label_divergence"] or 0.0)
    usage = np.array(most["label_usage"], np.float64)
    usage[usage.sum(-1) == 0] = np.nan
    even = np.nanmean(usage, axis=0)
    drawing = _new(
        max(8.0, min(15.0, 0.16 * most["experts"] + 7)), max(3.6, min(9.0, 0.3 * len(texts) + 2)), _title(report, kind)
    )
    left, right = drawing.subplots(1, 2, width_ratios=[1.6, 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        _ratio_map(left, np.log2(usage / even), "usage / mean usage of the labels")
    left.set_title(f"Usage by label, layer {most['layer']} (the most specialised)", loc="left", fontsize=10)
    left.set_xlabel("expert")
    left.set_yticks(range(len(texts)), [_short(label) for label in texts], fontsize=8, parse_math=False)
    _line(right, known, "label_divergence", "labels", *SERIES[0])
    _line(right, known, "token_specialisation", "token ids", *SERIES[2])
    right.set_title("Specialisation (0: none, 1: full)", loc="left", fontsize=10)
    right.set_ylim(0.0)
    _finish_lines(right, [layer["layer"] for layer in known])
    return drawing


@register_plot("changes")
def changes(report: RoutingReport, target: int = 0, kind: str = "feed_forward") -> Figure:
    """Overlap with another checkpoint's selections, and switch rate, by layer."""
    _require(report, kind, "changes")
    assert report["changes"] is not None
    entries, against = report["changes"][kind], visible(report["against"] or "")
    drawing = _new(7.0, 3.8, _title(report, kind))
    axes = drawing.subplots()
    _line(axes, entries, "overlap", "set overlap", *SERIES[0])
    _line(axes, entries, "switch_rate", "switch rate", *SERIES[2])
    axes.set_title(f"Against {against}, same data", loc="left", fontsize=10, parse_math=False)
    axes.set_ylim(-0.02, 1.02)
    _finish_lines(axes, [entry["layer"] for entry in entries])
    return drawing


# ---- helpers of these figures --------------------------------------------------------------------------------------


def _new(width: float, height: float, title: str) -> Figure:
    drawing = new_figure(width, height, dpi=130, facecolor="white")
    drawing.suptitle(title, fontsize=11, parse_math=False)
    return drawing


def _map(axes: Axes, values: np.ndarray, colours: str, high: float, low: float = 0.0) -> Any:
    from matplotlib import colormaps

    cmap = colormaps[colours].with_extremes(bad=MISSING)
    shown = np.ma.masked_invalid(values)
    return axes.imshow(shown, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")


def _ratio_map(axes: Axes, logs: np.ndarray, label: str) -> None:
    """A map of base-2 logarithms of ratios, white at a ratio of one; values beyond the scale get its last colour."""
    high = float(np.clip(np.ceil(np.abs(logs[np.isfinite(logs)]).max(initial=0)), 1, 3))
    image = _map(axes, np.where(np.isneginf(logs), -high, logs), RATIOS, high, -high)
    bar = _bar(axes.figure, image, axes, label)
    ticks = np.arange(-high, high + 1)
    bar.set_ticks(ticks, labels=[f"{2.0**tick:g}" for tick in ticks])


def _bar(drawing: Any, image: Any, axes: Any, label: str) -> Any:
    bar = drawing.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=18)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return bar


def _line(axes: Axes, layers: Sequence[Mapping[str, Any]], name: str, label: str, colour: str, marker: str) -> None:
    known = [(layer["layer"], layer[name]) for layer in layers if layer.get(name) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)


def _finish_lines(axes: Axes, layers: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(min(layers) - 0.3, max(layers) + 0.3)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _label_layers(axes: Axes, layers: Sequence[LayerEntry], across: bool = False) -> None:
    step = max(1, -(-len(layers) // 24))
    ticks, names = range(0, len(layers), step), [str(layer["layer"]) for layer in layers[::step]]
    if across:
        axes.set_xticks(ticks, names)
    else:
        axes.set_yticks(ticks, names)
        axes.set_ylabel("layer")
    axes.tick_params(labelsize=8, length=2, color=GREY)


def _short(label: str) -> str:
    shown = visible(label)
    return shown if len(shown) <= 18 else shown[:17] + "…"


_DRAW: dict[str, Plot] = {
    "utilisation": utilisation,
    "router": router,
    "coactivation": coactivation,
    "layer_overlap": layer_overlap,
    "labels": labels,
    "changes": changes,
}
"""The plots that :func:`routing_figures` draws, in its order."""
