"""A plot of relevance by token as horizontal bars, the largest first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.report import register_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register_plot("top-tokens")
def top_tokens(report: dict[str, Any], target: int = 0, top: int = 10) -> Figure:
    """The tokens with the largest relevance, positive or negative.

    Args:
        report: what ``Relevance.to_dict()`` returns; nothing else is needed, so a saved report can be drawn.
        target: which of the N targets.
        top: how many tokens.
    """
    # imported late: a command that draws nothing does not wait for matplotlib
    from matplotlib.figure import Figure

    values = np.asarray(report["targets"][target]["tokens"])
    shown = np.argsort(-np.abs(values))[:top][::-1]
    figure = Figure(figsize=(5, 0.3 * len(shown) + 1), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), values[shown], color=np.where(values[shown] > 0, "#b2182b", "#2166ac"))
    axes.set_yticks(range(len(shown)), [repr(report["tokens"][index]) for index in shown])
    axes.set_xlabel("relevance")
    axes.set_title(report["targets"][target]["label"])
    return figure


if __name__ == "__main__":
    import moejax
    from moejax import report as views

    lm = moejax.load("tiny-olmoe")
    report = moejax.explain(lm, "And the LORD said unto").to_dict()
    figure = views.plot("top-tokens", report)
    assert len(figure.axes[0].patches) == len(report["tokens"])
