"""The figures that ``moejax analyse`` writes; :mod:`moejax.report.plots.routing` has them."""

from moejax.report.plots.routing import routing_figures

__all__ = ["routing_figures"]
