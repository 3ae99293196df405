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
from moejax.routing.selection import GROUP_SCORES, group_limited
from moejax.routing.weights import WEIGHTS, Renormalised, scaled

__all__ = [
    "GROUP_SCORES",
    "SCORES",
    "WEIGHTS",
    "Renormalised",
    "Routing",
    "balance_loss",
    "cv_squared_loss",
    "entropy_loss",
    "group_limited",
    "keep_sum",
    "mutual_information_loss",
    "null_reward",
    "route",
    "scaled",
    "statistics",
    "z_loss",
]
