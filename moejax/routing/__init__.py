"""Routing as pure functions on arrays: score, select, weigh; the losses of router training; statistics of routers."""

from moejax.routing import statistics
from moejax.routing.core import SCORES, WEIGHTS, Routing, route
from moejax.routing.losses import balance_loss, z_loss

__all__ = ["SCORES", "WEIGHTS", "Routing", "balance_loss", "route", "statistics", "z_loss"]
