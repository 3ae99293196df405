"""One router algebra: a route is (score, select, weigh)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Score = Callable[[Array], Array]
Weigh = Callable[[Array], Array]


class Routing(NamedTuple):
    """Where tokens go. All in float32 or wider, whatever the model's dtype.

    Attributes:
        logits: router logits.
        scores: scores of all experts, from which the selection is made.
        ids: the selected experts, best first.
        weights: the weight of each selected expert's output.
    """

    logits: Float[Array, "*b E"]
    scores: Float[Array, "*b E"]
    ids: Int[Array, "*b K"]
    weights: Float[Array, "*b K"]


def _softmax(values: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    return jax.nn.softmax(values, axis=-1)


def _same(values: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
    return values


def _renormalised(values: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    return values / values.sum(-1, keepdims=True)


SCORES: dict[str, Score] = {"softmax": _softmax, "logits": _same}
"""Scores of all experts from router logits."""

WEIGHTS: dict[str, Weigh] = {"raw": _same, "renormalised": _renormalised, "softmax": _softmax}
"""Weights of the selected experts from their scores; ``renormalised`` makes them sum to one."""


def route(
    logits: Float[Array, "*b E"],
    num_selected: int,
    *,
    score: Score,
    weigh: Weigh,
    choices: Float[Array, "*b E"] | None = None,
    shares: Float[Array, "*b E"] | None = None,
) -> Routing:
    """Top-k routing. Ties go to the lower expert id; the selection itself has no gradient, its weights do.

    Args:
        choices: an expert at zero is selected only where no other is left; scores stay those of all.
        shares: factors of the selected experts' weights, which are then scaled to their former sum.
    """
    scores = score(logits)
    if choices is None:
        selected, ids = jax.lax.top_k(scores, num_selected)
    else:
        ids = jax.lax.top_k(jnp.where(choices > 0, scores, -jnp.inf), num_selected)[1]
        selected = jnp.take_along_axis(scores, ids, axis=-1)
    weights = weigh(selected)
    if shares is not None:
        weights = _keep_sum(weights, jnp.take_along_axis(shares, ids, axis=-1))
    return Routing(logits, scores, ids, weights)


def _keep_sum(weights: Float[Array, "*b K"], factors: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """``weights * factors`` scaled to the sum of ``weights``; where nothing is left, nothing makes up for it."""
    kept = weights * factors
    total = kept.sum(-1, keepdims=True)
    return kept * jnp.where(total == 0, 0, weights.sum(-1, keepdims=True) / jnp.where(total == 0, 1, total))
