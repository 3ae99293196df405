"""What the kernels of the grouped product share: how rows are cut into tiles, and what ``vmap`` makes of a kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int


def cut(
    first: Int[Array, " G"], load: Int[Array, " G"], rows: int, height: int
) -> tuple[Int[Array, "3 I"], Int[Array, "1"]]:
    """Group, first row and number of rows of every tile, and how many tiles there are.

    Group ``g`` has rows ``first[g]`` to ``first[g] + load[g]`` of ``rows`` in all; a tile has no more than ``height``.
    """
    groups = len(load)
    count = -(-load // height)
    last = jnp.cumsum(count)
    index = jnp.arange(rows // height + groups, dtype=jnp.int32)
    group = jnp.minimum((index[:, None] >= last).sum(1, dtype=jnp.int32), groups - 1)
    inner = (index - (last - count)[group]) * height
    table = jnp.stack([group, first[group] + inner, jnp.minimum(load[group] - inner, height)])
    return table.astype(jnp.int32), last[-1:].astype(jnp.int32)


def rows_together(run: Callable[..., Array]) -> Callable[..., Array]:
    """``run(x, weight, first, load)`` whose batch over ``x`` alone is one product, which reads the weights once."""
    product = custom_vmap(run)

    @product.def_vmap
    def several(size: int, in_batched: list[Any], x: Array, weight: Any, first: Array, load: Array):
        operands = (x, weight, first, load)
        rows_alone = in_batched[0] and not any(jax.tree.leaves(in_batched[1:]))
        if not rows_alone:
            each = jax.tree.map(
                lambda a, batched: a if batched else jnp.broadcast_to(a, (size, *a.shape)), operands, tuple(in_batched)
            )
            return lax.map(lambda one: product(*one), each), True
        # a row's copies stand together, so that a group's rows still do
        rows = jnp.moveaxis(x, 0, 1).reshape(-1, x.shape[-1])
        y = product(rows, weight, first * size, load * size)
        return jnp.moveaxis(y.reshape(-1, size, y.shape[-1]), 1, 0), True

    return product
