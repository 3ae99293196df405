"""Scaled dot-product attention with grouped key/value heads, an explicit mask and learned sinks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.rules.primitives import gate


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G C"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    sinks: Float[Array, " H"] | None = None,
    edges: Float[Array, "B H T S"] | None = None,
) -> Float[Array, "B T H C"]:
    """``softmax(q k^T * scale) v`` for each head; query head ``h`` reads key/value head ``h // (H // G)``.

    A sink is one more logit of each head, whose value is zero: it takes part in the softmax and adds nothing. Scores
    and softmax are in float32 whatever the inputs' dtype. A query that may see no key (padding) yields the mean of all
    values: finite, so that its zero cotangent stays zero. ``edges`` multiplies the pattern.
    """
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
    if edges is not None:
        pattern = gate(pattern, edges.reshape(pattern.shape))
    return jnp.einsum("bgrts,bsgc->btgrc", pattern.astype(v.dtype), v).reshape(batch, queries, heads, width)
