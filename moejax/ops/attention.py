"""Scaled dot-product attention with grouped key/value heads and an explicit mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G C"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
) -> Float[Array, "B T H C"]:
    """``softmax(q k^T * scale) v`` for each head; query head ``h`` reads key/value head ``h // (H // G)``.

    Scores and softmax are in float32 whatever the inputs' dtype. A query that may see no key (padding) yields the mean
    of all values: finite, so that its zero cotangent stays zero.
    """
    batch, queries, heads, width = q.shape
    grouped = q.reshape(batch, queries, k.shape[2], -1, width)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btgrc,bsgc->bgrts", grouped, k, preferred_element_type=wide) * scale
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
    pattern = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bsgc->btgrc", pattern, v).reshape(batch, queries, heads, width)
