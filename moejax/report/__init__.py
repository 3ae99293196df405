"""Reports for people: explanations in the terminal, as a page and as figures; tables and plots of other measurements.

Every view takes plain data (:mod:`moejax.report.schema`), so that a report saved as JSON can be shown later, on a
machine without a model. Plots are found by name: ``report.plot("experts", relevance.to_dict())``.
"""

from moejax.report.aggregate import summary_line
from moejax.report.figure_file import save_figure
from moejax.report.html import to_html, to_notebook
from moejax.report.plots import PLOTS, figure, plot, register_plot
from moejax.report.terminal import render

__all__ = [
    "PLOTS",
    "figure",
    "plot",
    "register_plot",
    "render",
    "save_figure",
    "summary_line",
    "to_html",
    "to_notebook",
]
