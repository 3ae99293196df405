"""A grouped matmul that multiplies by all experts and then selects, and attention that keeps no scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.ops.attention.plain import plain
from moejax.ops.attention.registry import Options, register_attention
from moejax.ops.experts import Assignment, register_matmul


@register_matmul("dense", priority=0, by_expert=True)
def dense(x: Array, weight: Array, assignment: Assignment, transpose: bool) -> Array:
    """``y[p] = W[e] x[p]`` for the expert ``e`` of each row, or with the transposed matrix.

    E times the work of a grouped product; for few, small experts on a device that likes one large product.
    """
    matrices = weight.reshape(len(weight), -1, weight.shape[-1])  # [E, outputs, D]
    rows = x.reshape(len(x), -1)
    products = jnp.einsum("pm,emd->epd" if transpose else "pd,emd->epm", rows, matrices)
    # rows without a slot may yield anything, but must not read beyond the experts
    expert = jnp.minimum(assignment.row_expert, len(weight) - 1)
    selected = products[expert, jnp.arange(len(x))]
    return selected if transpose else selected.reshape(len(x), *weight.shape[1:-1])


@register_attention("recomputed", priority=0)
def recomputed(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G C"],
    mask: Bool[Array, "B T S"],
    sinks: Float[Array, " H"] | None,
    options: Options,
) -> Float[Array, "B T H C"]:
    """The plain reference, whose scores the backward pass computes again instead of keeping them."""
    return jax.checkpoint(lambda q, k, v: plain(q, k, v, mask, sinks, options))(q, k, v)


if __name__ == "__main__":
    import numpy as np

    from moejax.ops.attention import attention
    from moejax.ops.experts import assign, grouped_matmul, permute

    # the test that every implementation must pass: values and gradients of the plain reference
    keys = jax.random.split(jax.random.key(0), 6)
    tokens, slots, experts, width, hidden = 7, 2, 6, 24, 20
    scores = jax.random.normal(keys[0], (tokens, experts))
    assignment = assign(jax.lax.top_k(scores, slots)[1], experts)
    x = permute(jax.random.normal(keys[1], (tokens, 1, width)), assignment)
    weight = jax.random.normal(keys[2], (experts, hidden, width))

    def product(x: Array, implementation: str) -> Array:
        return grouped_matmul(x, weight, assignment, implementation=implementation)

    def run(q: Array, k: Array, v: Array, implementation: str) -> Array:
        return attention(q, k, v, None, scale=0.3, causal=True, implementation=implementation)

    heads = tuple(jax.random.normal(key, (3, tokens, 4, 10)) for key in keys[3:])
    for call, arguments, names in ((product, (x,), ("dense", "padded")), (run, heads, ("recomputed", "plain"))):
        (value, pull), (expected, pull_expected) = (
            jax.vjp(lambda *a, call=call, name=name: call(*a, implementation=name), *arguments) for name in names
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
        for gradient, other in zip(pull(value), pull_expected(value), strict=True):
            np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-4)
    print("equal to the plain references, forwards and backwards")
