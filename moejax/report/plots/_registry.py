"""The table of plots."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moejax.registry import Registered, Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Plot = Callable[..., Any]
"""A plot: ``(data, target=0, **options) -> matplotlib figure``.

``data`` is a dictionary as in :mod:`moejax.report.schema`, and ``target`` the index of a target; plots of data without
targets ignore it.
"""

PLOTS: Registry[Plot] = Registry("plot", package="moejax.report.plots")
"""All plots by name."""


def register_plot(*names: str) -> Callable[[Registered], Registered]:
    """Decorator that enters a plot under each of ``names``.

    Example::

        @register_plot("signs")
        def signs(report, target=0):
            figure = matplotlib.figure.Figure()
            figure.subplots().plot(numpy.sign(report["targets"][target]["tokens"]))
            return figure

    Raises:
        ConfigError: there is no name, or another plot has one of them.
    """
    return PLOTS.register(*names)


def plot(name: str, data: Any, target: int = 0, **options: Any) -> Figure:
    """Draw the plot of that name.

    Args:
        name: a key of :data:`PLOTS`.
        data: the dictionary that the plot reads, such as ``Relevance.to_dict()`` or ``study.Analysis.to_dict()``.
        target: index of the target of an explanation.
        options: further arguments of the plot, such as ``kind="attention"`` of plots of routing.

    Raises:
        MoejaxError: there is no such plot (the message lists all names), or the data has nothing to draw.
        ValueError: the arrays of the data do not fit together.
    """
    return PLOTS.find(name)(data, target, **options)
