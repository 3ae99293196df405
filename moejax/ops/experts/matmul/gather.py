"""The grouped matmul for rows ordered as the slots are: copy the matrix of each row's expert, then multiply.

This is the plain reference, and the fastest implementation for the few rows of a decoding step.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.ops.experts.dispatch.assignment import Assignment
from moejax.ops.experts.matmul.registry import register_matmul
from moejax.ops.packed import Packed, unpack_in_turn


@register_matmul("gather", priority=10, by_expert=False)
def matmul(
    x: Float[Array, "P *I"], weight: Float[Array, "E *O D"] | Packed, assignment: Assignment, transpose: bool
) -> Float[Array, "P *Z"]:
    """Each row times the matrix of its expert, or times the transposed matrix (``registry.Product``)."""
    # an elementwise product and a sum, for which XLA reads the matrices in place; for a matmul it would copy them first
    x, weight = unpack_in_turn(x, weight[assignment.ids.ravel()])
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    outputs = tuple(range(1, weight.ndim - 1))
    terms = jnp.expand_dims(x, -1 if transpose else outputs).astype(accumulator) * weight.astype(accumulator)
    return terms.sum(outputs if transpose else -1).astype(x.dtype)


def weight_gradient(
    transpose: bool,
    x: Float[Array, "P *I"],
    cotangent: Float[Array, "P *Z"],
    weight: Float[Array, "E *O D"],
    assignment: Assignment,
) -> Float[Array, "E *O D"]:
    """The sum over an expert's rows of ``cotangent x^T`` (with ``transpose`` of ``x cotangent^T``)."""
    m = output_letters(weight)
    spec = f"pe,p{m},pd->e{m}d" if transpose else f"pe,pd,p{m}->e{m}d"
    is_expert = assignment.ids[..., None] == jnp.arange(len(weight))
    belongs = is_expert & (assignment.rank_in_expert >= 0)[..., None]
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    operands = (a.astype(accumulator) for a in (belongs.reshape(len(x), -1), x, cotangent))
    return jnp.einsum(spec, *operands).astype(weight.dtype)


def output_letters(weight: Float[Array, "E *O D"] | Packed) -> str:
    """A letter for each output axis of an expert's matrix, for ``einsum``."""
    return "mno"[: weight.ndim - 2]
