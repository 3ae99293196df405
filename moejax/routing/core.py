"""One router algebra: a route is (score, select, weigh)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
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


def route(logits: Float[Array, "*b E"], num_selected: int, *, score: Score, weigh: Weigh) -> Routing:
    """Top-k routing. Ties go to the lower expert id; the selection itself has no gradient, its weights do."""
    scores = score(logits)
    selected, ids = jax.lax.top_k(scores, num_selected)
    return Routing(logits, scores, ids, weigh(selected))
