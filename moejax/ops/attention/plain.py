"""Attention as it is defined, all scores at once; differentiated by JAX, and in the edges too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.ops.cotangents import gate


def plain(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G C"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    sinks: Float[Array, " H"] | None = None,
    edges: Float[Array, "B H T S"] | None = None,
) -> Float[Array, "B T H C"]:
    """The reference that the other implementations are tested against; arguments as in :func:`attention`."""
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, queries, groups, -1, width)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btgrc,bsgc->bgrts", grouped, k, preferred_element_type=wide) * scale
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
    if sinks is None:
        pattern = jax.nn.softmax(scores, axis=-1)
    else:
        sink = jnp.broadcast_to(sinks.astype(wide).reshape(groups, -1, 1, 1), (*scores.shape[:-1], 1))
        pattern = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    # of a query that sees nothing all scores are alike, and so would be its pattern
    pattern = jnp.where(mask.any(-1)[:, None, None, :, None], pattern, 0)
    if edges is not None:
        pattern = gate(pattern, edges.reshape(pattern.shape))
    return jnp.einsum("bgrts,bsgc->btgrc", pattern.astype(v.dtype), v).reshape(batch, queries, heads, width)
