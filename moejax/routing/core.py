"""One router algebra: a route is (score, select, weigh)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.routing.scores import Score
from moejax.routing.selection import Adjust
from moejax.routing.weights import Weigh

TopK = Callable[[Array, int], Sequence[Array]]
"""Values and indices of the largest of each row, largest first."""


class Routing(NamedTuple):
    """Where tokens go. All in float32 or wider, whatever the model's dtype.

    Attributes:
        logits: router logits.
        scores: scores of all experts, from which the selection is made.
        ids: the selected experts, best first. A slot that selected nothing has an id that no expert has, and weight 0.
        weights: the weight of each selected expert's output.
    """

    logits: Float[Array, "*b E"]
    scores: Float[Array, "*b E"]
    ids: Int[Array, "*b K"]
    weights: Float[Array, "*b K"]


def route(
    logits: Float[Array, "*b E"],
    num_selected: int,
    *,
    score: Score,
    weigh: Weigh,
    selectable: Float[Array, "*b E"] | None = None,
    weight_factors: Float[Array, "*b E"] | None = None,
    adjust: Adjust | None = None,
    top_k: TopK = jax.lax.top_k,
) -> Routing:
    """Top-k routing. Ties go to the lower expert id; the selection itself has no gradient, its weights do.

    Args:
        adjust: what the selection looks at, from the scores: a bias added, groups left out (``routing.selection``).
            The weights are those of the scores all the same.
        selectable: an expert at zero is selected only where no other is left; scores stay those of all.
        weight_factors: factors of the selected experts' weights, which are then scaled to their former sum.
        top_k: finds the best, as ``jax.lax.top_k`` does.
    """
    scores = score(logits)
    if selectable is None and adjust is None:
        selected, ids = top_k(scores, num_selected)
    else:
        seen = scores if adjust is None else jax.lax.stop_gradient(adjust(scores))
        if selectable is not None:
            # those of groups that are left out come before those that are closed
            seen = jnp.where(selectable > 0, jnp.maximum(seen, jnp.finfo(seen.dtype).min), -jnp.inf)
        ids = top_k(seen, num_selected)[1]
        selected = jnp.take_along_axis(scores, ids, axis=-1)
    weights = weigh(selected)
    if weight_factors is not None:
        weights = keep_sum(weights, jnp.take_along_axis(weight_factors, ids, axis=-1))
    return Routing(logits, scores, ids, weights)


def keep_sum(weights: Float[Array, "*b K"], factors: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """``weights * factors`` scaled to the sum of ``weights``; where nothing is left, nothing makes up for it."""
    kept = weights * factors
    total = kept.sum(-1, keepdims=True)
    return kept * jnp.where(total == 0, 0, weights.sum(-1, keepdims=True) / jnp.where(total == 0, 1, total))
