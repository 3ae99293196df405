"""Weights of the selected experts from their scores."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Weigh = Callable[[Array], Array]


def raw(scores: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """The scores themselves."""
    return scores


def renormalised(scores: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """The scores over their sum; zeros where all of them are zero."""
    total = scores.sum(-1, keepdims=True)
    return scores / jnp.where(total == 0, 1, total)


def softmax(scores: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """Softmax over the selected."""
    return jax.nn.softmax(scores, axis=-1)


def scaled(factor: float) -> Weigh:
    """``factor`` times the renormalised scores (DeepSeek-V3's ``routed_scaling_factor``)."""
    return lambda scores: factor * renormalised(scores)


WEIGHTS: dict[str, Weigh] = {"raw": raw, "renormalised": renormalised, "softmax": softmax}
"""Weights of the selected experts from their scores, by name; ``renormalised`` makes them sum to one."""
