"""Attention as it is defined, with all scores in memory; JAX differentiates it, in the edges too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.ops.attention.registry import Options, register_attention
from moejax.ops.cotangents import gate


@register_attention("plain", priority=10, reads_edges=True)
def plain(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G Cv"],
    mask: Bool[Array, "B T S"],
    sinks: Float[Array, " H"] | None,
    options: Options,
) -> Float[Array, "B T H Cv"]:
    """The reference against which the other implementations are tested; arguments as in :func:`attention`."""
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, queries, groups, -1, width)
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btgrc,bsgc->bgrts", grouped, k, preferred_element_type=accumulator) * options.scale
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(accumulator).min)
    if sinks is None:
        pattern = jax.nn.softmax(scores, axis=-1)
    else:
        sink = jnp.broadcast_to(sinks.astype(accumulator).reshape(groups, -1, 1, 1), (*scores.shape[:-1], 1))
        pattern = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    # a query that sees nothing has equal scores, and would have a uniform pattern
    pattern = jnp.where(mask.any(-1)[:, None, None, :, None], pattern, 0)
    if callable(options.edges):
        pattern = options.edges(pattern.reshape(batch, heads, *pattern.shape[3:])).reshape(pattern.shape)
    elif options.edges is not None:
        pattern = gate(pattern, options.edges.reshape(pattern.shape))
    return jnp.einsum("bgrts,bsgc->btgrc", pattern.astype(v.dtype), v).reshape(batch, queries, heads, v.shape[-1])
