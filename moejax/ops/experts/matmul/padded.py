"""The grouped matmul for rows by expert, in plain JAX: copy each group to a buffer of equal size, multiply as a batch.

The size of the buffers, their *capacity*, is chosen at run time among a few that are compiled (:func:`capacities`): the
smallest one that holds the largest group. If none does, the largest is filled and multiplied several times. So nothing
is dropped, and groups of similar sizes waste little work.

For group sizes ``[2, 0, 3, 1]`` and capacity 3 the buffers hold these rows (``*``: some other row, multiplied but never
read)::

    expert 0   0   1   *
    expert 1   *   *   *
    expert 2   16  17  18
    expert 3   24  *   *
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.ops.experts.dispatch.assignment import Assignment, take
from moejax.ops.experts.matmul.gather import output_letters
from moejax.ops.experts.matmul.registry import register_matmul
from moejax.ops.packed import Packed, unpack_in_turn


def capacities(tokens: int, slots: int, experts: int) -> list[int]:
    """Rows of an expert's buffer to choose from at run time, for T tokens with K slots each.

    1.5, 2.5 and 8 times the mean group size, rounded up to a multiple of 16, but at most T, since no group is larger.
    """
    mean = tokens * slots / experts
    return sorted({min(tokens, math.ceil(factor * mean / 16) * 16) for factor in (1.5, 2.5, 8)})


@register_matmul("padded", priority=10, by_expert=True)
def matmul(
    x: Float[Array, "P *I"], weight: Float[Array, "E *O D"] | Packed, assignment: Assignment, transpose: bool
) -> Float[Array, "P *Z"]:
    """Each row times the matrix of its expert, or times the transposed matrix (``registry.Product``)."""
    x, weight = unpack_in_turn(x, weight)
    m, expert = output_letters(weight), jnp.minimum(assignment.row_expert, len(weight) - 1)
    spec = f"ec{m},e{m}d->ecd" if transpose else f"ecd,e{m}d->ec{m}"
    width = weight.shape[-1:] if transpose else weight.shape[1:-1]
    row_in_group = jnp.arange(len(x), dtype=jnp.int32) - take(assignment.group_offsets, expert)

    def one_pass(capacity: int, x: Array, weight: Array, start: Array | int) -> Array:
        # buffer rows beyond the end of a group are multiplied too, and never read
        product = jnp.einsum(spec, take(x, buffer_rows(assignment, capacity, start)), weight).reshape(-1, *width)
        return take(product.astype(x.dtype), expert * capacity + (row_in_group - start).clip(0, capacity - 1))

    def several_passes(capacity: int, x: Array, weight: Array) -> Array:
        def update(i: Array, y: Array) -> Array:
            from_here = (row_in_group >= i * capacity).reshape(-1, *[1] * len(width))
            return jnp.where(from_here, one_pass(capacity, x, weight, i * capacity), y)

        zeros = jnp.zeros((len(x), *width), x.dtype)
        return jax.lax.fori_loop(0, -(-assignment.group_sizes.max() // capacity), update, zeros)

    def single_pass(capacity, x, weight):
        return one_pass(capacity, x, weight, 0)

    return with_capacity(single_pass, several_passes, assignment, x, weight)


def weight_gradient(
    transpose: bool,
    x: Float[Array, "P *I"],
    cotangent: Float[Array, "P *Z"],
    weight: Float[Array, "E *O D"],
    assignment: Assignment,
) -> Float[Array, "E *O D"]:
    """The sum over an expert's rows of ``cotangent x^T`` (with ``transpose`` of ``x cotangent^T``)."""
    m = output_letters(weight)
    spec = f"ec{m},ecd->e{m}d" if transpose else f"ecd,ec{m}->e{m}d"

    def single_pass(capacity: int, x: Array, cotangent: Array, start: Array | int = 0) -> Array:
        rows = buffer_rows(assignment, capacity, start)
        has_slot = start + jnp.arange(capacity) < assignment.group_sizes[:, None]

        def fill(a):
            return jnp.where(has_slot.reshape(*has_slot.shape, *[1] * (a.ndim - 1)), take(a, rows), 0)

        return jnp.einsum(spec, fill(x), fill(cotangent))

    def several_passes(capacity: int, x: Array, cotangent: Array) -> Array:
        def update(i, total):
            return total + single_pass(capacity, x, cotangent, i * capacity)

        passes = -(-assignment.group_sizes.max() // capacity)
        return jax.lax.fori_loop(0, passes, update, jnp.zeros(weight.shape, x.dtype))

    return with_capacity(single_pass, several_passes, assignment, x, cotangent).astype(weight.dtype)


def with_capacity(
    single_pass: Callable[..., Array], several_passes: Callable[..., Array], assignment: Assignment, *operands: Any
) -> Array:
    """Run ``single_pass`` with the smallest capacity that holds the largest group; ``several_passes`` if none does."""
    tokens, slots = assignment.ids.shape
    steps = capacities(tokens, slots, len(assignment.group_sizes))
    branches = [partial(single_pass, capacity) for capacity in steps]
    if steps[-1] < tokens:
        branches.append(partial(several_passes, steps[-1]))
    if len(branches) == 1:
        return branches[0](*operands)
    branch = (assignment.group_sizes.max() > jnp.array(steps[: len(branches) - 1])).sum()
    return jax.lax.switch(branch, branches, *operands)


def buffer_rows(assignment: Assignment, capacity: int, start: Array | int) -> Int[Array, "E Q"]:
    """The row at each of the Q positions of the experts' buffers, beginning at row ``start`` of each group."""
    rows = assignment.group_offsets[:, None] + start + jnp.arange(capacity, dtype=jnp.int32)
    return jnp.minimum(rows, len(assignment.row_to_slot) - 1)
