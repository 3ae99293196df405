"""A relevance report as one matplotlib figure. Matplotlib is imported when a figure is asked for, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.report import aggregate
from moejax.report.aggregate import DIVERGING, Floats, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font

_WIDTH = 10.0
_LABELS = 48
"""As many token labels as stand side by side in a figure of this width."""
_LABEL_LENGTH = 14
_GREY = "#57606a"
# Asked for in this order where a token has letters that matplotlib's own font lacks.
_FALLBACK_FONTS = ("Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Devanagari")


def figure(report: Report, target: int = 0) -> Figure:
    """One figure for one target: relevance by token, by layer and expert, and by layer and token.

    Of a model without experts, by layer and head in their place.

    The figure belongs to no pyplot state: it shows itself in a notebook and saves itself with ``savefig``.
    """
    from matplotlib import colors

    from moejax.report.notebook_figure import NotebookFigure

    aggregate.check(report)
    chosen = report["targets"][target]
    layers, parts = aggregate.floats(chosen["layers"]), aggregate.expert_map(report, target)
    kind = "expert" if parts.size else "head"
    parts = parts if parts.size else aggregate.head_map(report, target)
    heights = [2.0, _map_height(len(parts)), _map_height(len(layers))]
    drawing = NotebookFigure(figsize=(_WIDTH, sum(heights) + 2.4), layout="constrained", dpi=120)
    cmap = colors.LinearSegmentedColormap.from_list("relevance", [tuple(c / 255 for c in stop) for stop in DIVERGING])
    top, middle, bottom = drawing.subplots(3, 1, height_ratios=heights)
    fonts = Fonts()
    _draw_title(drawing, report, target, fonts)
    _draw_tokens(top, report, chosen, cmap, fonts)
    _draw_map(middle, parts, cmap, f"Layer by {kind}, summed over tokens", kind)
    _label_layers(middle, len(parts), final=False)
    _draw_map(bottom, layers, cmap, "Layer by token, residual stream entering each layer", "")
    _label_layers(bottom, len(layers), final=True)
    _label_tokens(bottom, report["tokens"], np.abs(np.nan_to_num(layers)).max(axis=0), fonts)
    return drawing


class Fonts:
    """The installed fonts that can be asked for, and which characters they can draw between them."""

    def __init__(self) -> None:
        from matplotlib import font_manager, rcParams

        installed = set(font_manager.get_font_names())
        self.families = [*rcParams["font.family"], *(name for name in _FALLBACK_FONTS if name in installed)]
        paths = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in self.families]
        fonts: list[FT2Font] = [font_manager.get_font(path) for path in paths]
        self._drawable = set().union(*(font.get_charmap() for font in fonts))

    def drawable(self, text: str) -> str:
        """The text with a replacement sign for what no font can draw: matplotlib would warn at every such character."""
        shown = "".join(c if ord(c) in self._drawable else "\ufffd" for c in aggregate.visible(text))
        return shown if len(shown) <= _LABEL_LENGTH else shown[: _LABEL_LENGTH - 1] + "…"

    def style(self) -> dict[str, Any]:
        # A dollar sign in a token is a dollar sign, not the beginning of a formula.
        return {"parse_math": False, "fontfamily": self.families}


def _draw_title(drawing: Figure, report: Report, target: int, fonts: Fonts) -> None:
    chosen = report["targets"][target]
    label = " - ".join(fonts.drawable(part) for part in chosen["label"].split(" - "))
    drawing.suptitle(f"{label}   {chosen['value']:.3f}   ({report['model']})", fontsize=12, **fonts.style())
    line = f"{report['rule']}\n{aggregate.summary_line(report, target)}"
    drawing.supxlabel(line, fontsize=8.5, color=_GREY, **fonts.style())


def _draw_tokens(axes: Axes, report: Report, chosen: dict[str, Any], cmap: Colormap, fonts: Fonts) -> None:
    values = aggregate.floats(chosen["tokens"])
    scale = aggregate.scale_of(values)
    # Never the white of zero: a small bar must still be seen, so colours begin a third of the way out.
    tint = [cmap(0.5 + np.sign(v) * (1 / 6 + abs(v) / scale / 3)) for v in np.nan_to_num(values)]
    axes.bar(np.arange(len(values)), values, color=tint, width=0.82 if len(values) <= 2 * _LABELS else 1.0)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.axvline(chosen["position"], color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_title("Tokens (dotted: where the target is predicted)", loc="left", fontsize=10)
    axes.set_ylabel("relevance", fontsize=9)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    _label_tokens(axes, report["tokens"], np.abs(np.nan_to_num(values)), fonts)


def _draw_map(axes: Axes, values: Floats, cmap: Colormap, title: str, columns: str) -> None:
    scale = aggregate.scale_of(values)
    image = axes.imshow(values, cmap=cmap, vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(columns, fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.tick_params(labelsize=8, length=2)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, aspect=12)
    bar.ax.tick_params(labelsize=8)


def _label_layers(axes: Axes, rows: int, final: bool) -> None:
    last = rows - 1 if final else rows
    step = max(1, round(last / 12))
    ticks = [row for row in range(0, last, step) if not final or last - row >= step or row == 0]
    axes.set_yticks(ticks + [last] * final, [str(row) for row in ticks] + ["final"] * final)


def _label_tokens(axes: Axes, tokens: list[str], weight: Floats, fonts: Fonts) -> None:
    """Name every token where there is room, else those with the most relevance that do not stand too close."""
    gap = len(tokens) / _LABELS
    chosen: list[int] = []
    for index in np.argsort(-weight, kind="stable"):
        if all(abs(int(index) - other) >= gap for other in chosen):
            chosen.append(int(index))
    names = [fonts.drawable(tokens[index].strip(" ") or tokens[index]) for index in chosen]
    upright = len(tokens) > 14
    style = {"rotation": 90, "va": "top"} if upright else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(chosen, names, fontsize=8, **style, **fonts.style())
    axes.tick_params(axis="x", length=2)


def _map_height(rows: int) -> float:
    return min(4.5, max(1.5, 0.17 * rows))
