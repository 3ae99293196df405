"""The router algebra: score all experts, select K of them for each token, weigh the selected."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.routing.scores import Score
from moejax.routing.selection import Adjust
from moejax.routing.weights import Weigh

TopK = Callable[[Array, int], Sequence[Array]]
"""Values and indices of the ``k`` largest entries of each row, largest first: ``(rows, k) -> (values, indices)``."""


class Routing(NamedTuple):
    """A router's decision for each token, in float32 or wider whatever the model's dtype.

    Attributes:
        logits: router logits.
        scores: scores of all experts, from which the selection is made.
        ids: the selected experts, best first. An empty slot has an id outside of ``0 .. E - 1`` and weight 0.
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
    """Top-k routing: ``weigh(score(logits))`` of the ``num_selected`` best experts.

    Ties go to the lower expert id. The selection has no gradient; the weights have.

    Args:
        logits: router logits.
        num_selected: ``K``, experts of each token.
        score: scores of all experts, such as an entry of :data:`moejax.routing.SCORES`.
        weigh: weights from the selected scores, such as an entry of :data:`moejax.routing.WEIGHTS`.
        selectable: experts at zero are selected only if no other expert is left; their scores stay in ``scores``.
        weight_factors: multiply the selected experts' weights, which are then scaled back to their former sum.
        adjust: maps the scores to those by which experts are selected, such as a bias or a limit to groups
            (:mod:`moejax.routing.selection`). The weights come from the unadjusted scores.
        top_k: finds the best, with the interface of ``jax.lax.top_k``.
    """
    scores = score(logits)
    if selectable is None and adjust is None:
        selected, ids = top_k(scores, num_selected)
    else:
        seen = scores if adjust is None else jax.lax.stop_gradient(adjust(scores))
        if selectable is not None:
            # adjust excludes with -inf too: experts of excluded groups rank above experts closed by ``selectable``
            seen = jnp.where(selectable > 0, jnp.maximum(seen, jnp.finfo(seen.dtype).min), -jnp.inf)
        ids = top_k(seen, num_selected)[1]
        selected = jnp.take_along_axis(scores, ids, axis=-1)
    weights = weigh(selected)
    if weight_factors is not None:
        weights = keep_sum(weights, jnp.take_along_axis(weight_factors, ids, axis=-1))
    return Routing(logits, scores, ids, weights)


def keep_sum(weights: Float[Array, "*b K"], factors: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """``weights * factors``, scaled to the sum of ``weights``; zeros where the products sum to zero."""
    kept = weights * factors
    total = kept.sum(-1, keepdims=True)
    return kept * jnp.where(total == 0, 0, weights.sum(-1, keepdims=True) / jnp.where(total == 0, 1, total))
