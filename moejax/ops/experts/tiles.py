"""What kernels of the grouped product share: how rows are cut into tiles, and what names and ``vmap`` make of one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int

from moejax.ops.experts.assignment import sum_before


def cut(first: Int[Array, " G"], load: Int[Array, " G"], rows: int, height: int) -> Int[Array, "4 I"]:
    """Group, first row and number of rows of every tile, and how many tiles there are (everywhere the same).

    Group ``g`` has rows ``first[g]`` to ``first[g] + load[g]`` of ``rows`` in all; a tile has no more than ``height``.
    Tiles that are left over have no rows; there are a multiple of 8, whole lines to copy.
    """
    count = -(-load // height)
    index = jnp.arange(-(-(rows // height + len(load)) // 8) * 8, dtype=jnp.int32)[:, None]
    inner = index - sum_before(count)
    here = (inner >= 0) & (inner < count)
    group, start = jnp.arange(len(load), dtype=jnp.int32), inner * height
    # picked by sums over groups, which on a GPU are one kernel
    picked = [jnp.where(here, a, 0) for a in (group, first + start, jnp.minimum(load - start, height))]
    return jnp.stack([*picked, jnp.broadcast_to(count, here.shape)]).sum(2, dtype=jnp.int32)


def nameless(context: Any) -> None:
    """Take away the number of kernels that the process lowered before, which is part of a kernel's name for dumps.

    With it the persistent cache would only find what processes compile in the same order. Run inside of a kernel.
    """
    from jaxlib.mlir import ir

    context.module.operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get("grouped_matmul")


def rows_together(run: Callable[..., Array]) -> Callable[..., Array]:
    """``run(x, weight, first, load)`` whose batch over ``x`` alone is one product, which reads the weights once."""
    product = custom_vmap(run)

    @product.def_vmap
    def several(size: int, in_batched: list[Any], x: Array, weight: Any, first: Array, load: Array):
        # what is not in the batch is one for all, not copied for each
        leaves, tree = jax.tree.flatten((x, weight, first, load))
        batched = jax.tree.leaves(in_batched)
        if not in_batched[0] or sum(batched) > 1:

            def one(moving: list[Array]) -> Array:
                each = iter(moving)
                return product(*tree.unflatten(next(each) if b else a for a, b in zip(leaves, batched, strict=True)))

            return lax.map(one, [a for a, b in zip(leaves, batched, strict=True) if b]), True
        # a row's copies stand together, so that a group's rows still do
        rows = jnp.moveaxis(x, 0, 1).reshape(-1, x.shape[-1])
        y = product(rows, weight, first * size, load * size)
        return jnp.moveaxis(y.reshape(-1, size, y.shape[-1]), 1, 0), True

    return product
