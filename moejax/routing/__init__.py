"""Routing as pure functions on arrays: score, select, weigh; and the auxiliary losses of router training."""

from moejax.routing.core import SCORES, WEIGHTS, Routing, route
from moejax.routing.losses import balance_loss, z_loss

__all__ = ["SCORES", "WEIGHTS", "Routing", "balance_loss", "route", "z_loss"]
