"""Plots found by name. A plot is a function of plain data that returns a matplotlib figure.

``relevance.py`` plots explanations, ``routing.py`` plots routing statistics; a new file in this folder, or a file of
yours, adds a plot with :func:`register_plot`. Matplotlib is imported when a plot is drawn, not before.
"""

from moejax.report.plots._drawing import Fonts
from moejax.report.plots._registry import PLOTS, Plot, plot, register_plot
from moejax.report.plots.relevance import figure

__all__ = ["PLOTS", "Fonts", "Plot", "figure", "plot", "register_plot"]
