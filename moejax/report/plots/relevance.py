"""Plots of an explanation: tokens, experts, heads, layers, an overview, and the matrix of all targets.

Each takes the dictionary of ``Relevance.to_dict()``, the index of a target, and a ``scale``: ``"linear"``, or
``"sqrt"`` for colours (and heights of bars) by the square root. All raise ValueError if the arrays of the dictionary do
not fit together, and MoejaxError for another scale. The figures do not use pyplot: they show themselves in a notebook,
and ``savefig`` writes them to a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moejax.errors import MoejaxError
from moejax.report import aggregate, colours, merge
from moejax.report.colours import GREY
from moejax.report.plots._drawing import (
    Fonts,
    diverging_map,
    draw_map,
    label_layers,
    label_tokens,
    new_figure,
    ticks_of,
)
from moejax.report.plots._registry import register_plot
from moejax.report.schema import RelevanceReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 10.0
"""Width of every figure in inches."""

_LABELS = 48
"""Number of token labels that fit side by side in that width."""


@register_plot("overview")
def figure(report: RelevanceReport, target: int = 0, scale: str = "linear") -> Figure:
    """Relevance by token, by layer and expert (by layer and head if there are no experts), and by layer and token."""
    aggregate.check(report)
    has_experts = bool(aggregate.expert_map(report, target).size)
    parts = aggregate.expert_map(report, target) if has_experts else aggregate.head_map(report, target)
    heights = [2.0, _map_height(len(parts)), _map_height(len(report["targets"][target]["layers"]))]
    drawing, fonts = new_figure(_WIDTH, sum(heights) + 2.4), Fonts()
    top, middle, bottom = drawing.subplots(3, 1, height_ratios=heights)
    _draw_title(drawing, report, target, fonts)
    _draw_tokens(top, report, target, fonts, scale)
    (_draw_experts if has_experts else _draw_heads)(middle, report, target, scale)
    _draw_layers(bottom, report, target, fonts, scale)
    return drawing


@register_plot("tokens")
def tokens(report: RelevanceReport, target: int = 0, scale: str = "linear") -> Figure:
    """Relevance of each input token, as bars."""
    drawing, fonts = _titled(report, target, 2.0)
    _draw_tokens(drawing.subplots(), report, target, fonts, scale)
    return drawing


@register_plot("experts")
def experts(report: RelevanceReport, target: int = 0, scale: str = "linear") -> Figure:
    """Relevance by layer and expert, summed over the tokens routed to it.

    Raises:
        MoejaxError: the model has no experts.
    """
    drawing, _ = _titled(report, target, _map_height(len(report["expert_ids"])))
    if not report["num_experts"]:
        raise MoejaxError(f"{report['model']} has no experts to plot; plot 'heads' or 'layers'.")
    _draw_experts(drawing.subplots(), report, target, scale)
    return drawing


@register_plot("heads")
def heads(report: RelevanceReport, target: int = 0, scale: str = "linear") -> Figure:
    """Relevance by layer and attention head, summed over tokens.

    Raises:
        MoejaxError: the model has no attention heads.
    """
    drawing, _ = _titled(report, target, _map_height(len(report["expert_ids"])))
    if not aggregate.head_map(report, target).size:
        raise MoejaxError(f"{report['model']} has no attention heads to plot; plot 'layers'.")
    _draw_heads(drawing.subplots(), report, target, scale)
    return drawing


@register_plot("layers")
def layers(report: RelevanceReport, target: int = 0, scale: str = "linear") -> Figure:
    """Relevance by layer and token of the residual stream that enters each layer, and in a last row the final norm."""
    drawing, fonts = _titled(report, target, _map_height(len(report["expert_ids"]) + 1))
    _draw_layers(drawing.subplots(), report, target, fonts, scale)
    return drawing


@register_plot("matrix")
def matrix(report: RelevanceReport, target: int = 0, scale: str = "linear") -> Figure:
    """Relevance of each input token for every target, targets by tokens; blank where a token comes after the target.

    A line stands between prompt and answer. ``target`` is ignored: the plot has them all.
    """
    aggregate.check(report)
    rows = report["targets"]
    values = np.stack([aggregate.floats(row["tokens"]) for row in rows])
    after = np.arange(values.shape[1]) > np.array([[row["position"]] for row in rows])
    values = np.where(after, np.nan, values)
    drawing, fonts = new_figure(_WIDTH, min(14.0, 0.24 * len(rows) + 2.2)), Fonts()
    title = f"{report['model']}   {report['rule']}"
    drawing.suptitle(title, fontsize=12, **fonts.style())
    axes = drawing.subplots()
    draw_map(axes, values, "Target by token", "", scale, rows="target")
    _mark_prompt(axes, report)
    step = max(1, -(-len(rows) // _LABELS))
    names = [fonts.drawable(row["label"]) for row in rows[::step]]
    axes.set_yticks(range(0, len(rows), step), names, fontsize=8, **fonts.style())
    label_tokens(axes, report["tokens"], np.abs(np.nan_to_num(values)).max(axis=0), fonts, _LABELS)
    return drawing


def _mark_prompt(axes: Axes, report: RelevanceReport) -> None:
    """A line between prompt and answer."""
    length = merge.prompt_length(report)
    if length < len(report["tokens"]):
        axes.axvline(length - 0.5, color=GREY, linewidth=1.2)


def _titled(report: RelevanceReport, target: int, height: float) -> tuple[Figure, Fonts]:
    """A figure with title and ledger for one panel of that height in inches."""
    aggregate.check(report)
    drawing, fonts = new_figure(_WIDTH, height + 1.4), Fonts()
    _draw_title(drawing, report, target, fonts)
    return drawing, fonts


def _draw_title(drawing: Figure, report: RelevanceReport, target: int, fonts: Fonts) -> None:
    """The target's label, value and model above; the rule and the ledger below."""
    chosen = report["targets"][target]
    label = " - ".join(fonts.drawable(part) for part in chosen["label"].split(" - "))
    drawing.suptitle(f"{label}   {chosen['value']:.3f}   ({report['model']})", fontsize=12, **fonts.style())
    line = f"{report['rule']}\n{aggregate.summary_line(report, target)}"
    drawing.supxlabel(line, fontsize=8.5, color=GREY, **fonts.style())


def _draw_tokens(axes: Axes, report: RelevanceReport, target: int, fonts: Fonts, scale: str) -> None:
    chosen, cmap = report["targets"][target], diverging_map()
    values = aggregate.floats(chosen["tokens"])
    largest = aggregate.scale_of(values)
    # colours begin a third of the way from white, so that small bars are visible
    tint = [cmap(0.5 + np.sign(v) * (1 / 6 + abs(v) / largest / 3)) for v in np.nan_to_num(values)]
    axes.bar(np.arange(len(values)), values, color=tint, width=0.82 if len(values) <= 2 * _LABELS else 1.0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(chosen["position"], color=GREY, linewidth=0.8, linestyle=":")
    _mark_prompt(axes, report)
    rooted = ", square-root heights" if colours.check_scale(scale) == "sqrt" else ""
    begins = "; solid: where the answer begins" if merge.prompt_length(report) < len(values) else ""
    axes.set_title(f"Tokens (dotted: where the target is predicted{begins}){rooted}", loc="left", fontsize=10)
    axes.set_ylabel("relevance", fontsize=9)
    if rooted:
        axes.set_yscale("function", functions=(colours.signed_root, colours.signed_square))
        ticks = [tick for tick in ticks_of(largest, scale) if values.min() <= tick <= values.max()]
        axes.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks], minor=False)
        axes.minorticks_off()
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    label_tokens(axes, report["tokens"], np.abs(np.nan_to_num(values)), fonts, _LABELS)


def _draw_experts(axes: Axes, report: RelevanceReport, target: int, scale: str) -> None:
    values = aggregate.expert_map(report, target)
    draw_map(axes, values, "Layer by expert, summed over tokens", "expert", scale)
    label_layers(axes, len(values), final=False)


def _draw_heads(axes: Axes, report: RelevanceReport, target: int, scale: str) -> None:
    values = aggregate.head_map(report, target)
    draw_map(axes, values, "Layer by head, summed over tokens", "head", scale)
    label_layers(axes, len(values), final=False)


def _draw_layers(axes: Axes, report: RelevanceReport, target: int, fonts: Fonts, scale: str) -> None:
    values = aggregate.floats(report["targets"][target]["layers"])
    draw_map(axes, values, "Layer by token, residual stream entering each layer", "", scale)
    _mark_prompt(axes, report)
    label_layers(axes, len(values), final=True)
    label_tokens(axes, report["tokens"], np.abs(np.nan_to_num(values)).max(axis=0), fonts, _LABELS)


def _map_height(rows: int) -> float:
    """Height in inches of a map with so many rows."""
    return min(4.5, max(1.5, 0.17 * rows))
