"""Any function of an expert's weights and rows, where its products are not known one by one.

The rows are those of :mod:`moejax.ops.experts.dispatch.assignment`. :func:`grouped_matmul` is faster and needs less
memory; this is for experts that are somebody else's module.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.ops.experts.dispatch.assignment import Assignment, take
from moejax.ops.experts.matmul.padded import buffer_rows, with_capacity


def grouped_map(
    function: Callable[[Any, Float[Array, "N D"]], Float[Array, "N O"]],
    weights: Any,
    rows: Float[Array, "P D"],
    assignment: Assignment,
) -> Float[Array, "P O"]:
    """``function(weights[e], rows of expert e)`` for every expert; zero for rows without a slot.

    No slot is dropped. Differentiable in ``weights`` and ``rows``.

    Args:
        function: from the weights of one expert and any number of rows to as many rows, each by itself. It may be given
            rows of other experts too, whose results are not read.
        weights: a pytree of arrays ``[E ..]``.
    """
    last = len(assignment.group_sizes) - 1
    row_expert = assignment.row_expert
    expert = jnp.minimum(row_expert, last)

    def slots_alone(results: Array) -> Array:
        # the cotangents of other rows are copies of some slot's
        return jnp.where((row_expert <= last)[:, None], results, 0)

    if not assignment.by_expert:
        # few rows: the weights of each row's expert are copied
        by_row = jax.tree.map(lambda weight: take(weight, expert), weights)
        return slots_alone(jax.vmap(lambda weight, row: function(weight, row[None])[0])(by_row, rows))
    row_in_group = jnp.arange(len(rows), dtype=jnp.int32) - take(assignment.group_offsets, expert)

    def one_pass(capacity: int, weights: Any, rows: Array, start: Array | int = 0) -> Array:
        # the buffers of all experts have one size; what lies beyond the end of a group is computed and never read
        results = jax.vmap(function)(weights, take(rows, buffer_rows(assignment, capacity, start)))
        flat = results.reshape(-1, *results.shape[2:])
        return take(flat, expert * capacity + (row_in_group - start).clip(0, capacity - 1))

    def several_passes(capacity: int, weights: Any, rows: Array) -> Array:
        # a fixed number of passes, since a loop without one has no backward pass; those past the end are skipped
        one = jax.checkpoint(partial(one_pass, capacity))

        def add(results: Array, start: Array) -> tuple[Array, None]:
            here = (row_in_group >= start) & (row_in_group < start + capacity)
            found = jax.lax.cond(
                start < assignment.group_sizes.max(),
                one,
                lambda weights, rows, start: jnp.zeros_like(results),
                weights,
                rows,
                start,
            )
            return jnp.where(here[:, None], found, results), None

        like = jax.eval_shape(partial(one_pass, capacity), weights, rows)
        starts = jnp.arange(0, len(assignment.ids), capacity, dtype=jnp.int32)
        return jax.lax.scan(add, jnp.zeros(like.shape, like.dtype), starts)[0]

    return slots_alone(with_capacity(one_pass, several_passes, assignment, weights, rows))
