"""Auxiliary losses of router training, in float32, with masks for padding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.routing.core import Routing


def _mean(values: Float[Array, "*b"], mask: Bool[Array, "*b"] | None) -> Float[Array, ""]:
    if mask is None:
        return values.mean()
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


def balance_loss(routing: Routing, mask: Bool[Array, "*b"] | None = None) -> Float[Array, ""]:
    """Load-balancing loss ``E * sum_e f_e P_e`` (Switch Transformer, arXiv 2101.03961, eq. 4, for top-k).

    ``f_e`` is the share of routed slots that expert ``e`` received, ``P_e`` its mean score, over all unmasked tokens;
    1 at perfect balance when the scores are probabilities.
    """
    experts = routing.scores.shape[-1]
    chosen = jax.nn.one_hot(routing.ids, experts, dtype=routing.scores.dtype).mean(-2)
    per_expert = lambda values: jax.vmap(_mean, (1, None))(  # noqa: E731
        values.reshape(-1, experts), None if mask is None else mask.reshape(-1)
    )
    return experts * jnp.dot(jax.lax.stop_gradient(per_expert(chosen)), per_expert(routing.scores))


def z_loss(routing: Routing, mask: Bool[Array, "*b"] | None = None) -> Float[Array, ""]:
    """Router z-loss: mean of ``logsumexp(logits) ** 2`` (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return _mean(jax.nn.logsumexp(routing.logits, axis=-1) ** 2, mask)
