"""What people look at: a relevance report in the terminal, as a page of its own, and as a figure.

Every view takes the dictionary made by ``Relevance.to_dict()`` and nothing else, so that a report saved as JSON can be
shown later, on a machine without a model.
"""

from moejax.report.aggregate import summary_line
from moejax.report.html import to_html
from moejax.report.plots import figure
from moejax.report.terminal import render

__all__ = ["figure", "render", "summary_line", "to_html"]
