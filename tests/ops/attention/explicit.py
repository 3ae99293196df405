"""Causal attention in formulas, with the two passes of a kernel."""

import jax
import jax.numpy as jnp

from moejax.ops.attention.fused import causal_mask


def explicit_scores(q, k, scale, window):
    repeated = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bthc,bshc->bhts", q, repeated) * scale
    return jnp.where(causal_mask(q.shape[1], window), scores, -jnp.inf)


def explicit_forward(q, k, v, scale, window):
    scores = explicit_scores(q, k, scale, window)
    statistics = jax.nn.logsumexp(scores, axis=-1)
    values = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return jnp.einsum("bhts,bshc->bthc", jnp.exp(scores - statistics[..., None]), values), statistics


def explicit_backward(cotangent, q, k, v, out, statistics, scale, window):
    """From the statistics and the output that it is given, as a kernel does."""
    groups = k.shape[2]

    def by_group(x):
        return x.reshape(*x.shape[:2], groups, -1, x.shape[-1]).sum(3)

    pattern = jnp.exp(explicit_scores(q, k, scale, window) - statistics[..., None])
    keys, values = (jnp.repeat(x, q.shape[2] // groups, axis=2) for x in (k, v))
    towards = jnp.einsum("bthc,bshc->bhts", cotangent, values)
    scores = pattern * (towards - (cotangent * out).sum(-1).swapaxes(1, 2)[..., None]) * scale
    dq = jnp.einsum("bhts,bshc->bthc", scores, keys)
    dk = by_group(jnp.einsum("bhts,bthc->bshc", scores, q))
    return dq, dk, by_group(jnp.einsum("bhts,bthc->bshc", pattern, cotangent))
