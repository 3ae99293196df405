"""Routing as pure functions on arrays: score, select, weigh; the losses of router training; statistics of routers."""

from moejax.routing import statistics
from moejax.routing.core import Routing, keep_sum, route
from moejax.routing.losses import (
    balance_loss,
    cv_squared_loss,
    entropy_loss,
    mutual_information_loss,
    null_reward,
    z_loss,
)
from moejax.routing.scores import SCORES
from moejax.routing.weights import WEIGHTS

__all__ = [
    "SCORES",
    "WEIGHTS",
    "Routing",
    "balance_loss",
    "cv_squared_loss",
    "entropy_loss",
    "keep_sum",
    "mutual_information_loss",
    "null_reward",
    "route",
    "statistics",
    "z_loss",
]
