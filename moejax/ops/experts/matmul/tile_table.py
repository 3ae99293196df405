"""Shared by the kernels of the grouped matmul: the table of tiles, a stable name, and one product under ``vmap``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int

from moejax.ops.experts.dispatch.assignment import sum_before


def tile_table(
    group_offsets: Int[Array, " U"], group_sizes: Int[Array, " U"], rows: int, max_height: int
) -> Int[Array, "4 I"]:
    """Cut the rows of U groups into I tiles of at most ``max_height`` rows, none of which crosses a group's border.

    Returns one column for each tile: its group, its first row, its number of rows, and, in every column the same, how
    many tiles there are. I depends on shapes alone, so the last columns may be unused: these tiles have no rows. I is a
    multiple of 8, so that a GPU's copy engine can copy the table in full lines.

    An example with ``group_offsets=[0, 8]``, ``group_sizes=[3, 20]`` and ``max_height=16``::

        group   0   1   1   0  ..
        start   0   8  24   0  ..
        rows    3  16   4   0  ..
        tiles   3   3   3   3  ..

    Args:
        group_offsets: the first row of each group.
        group_sizes: the number of rows of each group.
        rows: number of rows P in all.
        max_height: rows of a tile at most.
    """
    tiles = -(-group_sizes // max_height)
    index = jnp.arange(-(-(rows // max_height + len(group_sizes)) // 8) * 8, dtype=jnp.int32)[:, None]
    tile_in_group = index - sum_before(tiles)
    belongs = (tile_in_group >= 0) & (tile_in_group < tiles)
    group, row_in_group = jnp.arange(len(group_sizes), dtype=jnp.int32), tile_in_group * max_height
    # selected by sums over groups, which are a single kernel on a GPU
    columns = (group, group_offsets + row_in_group, jnp.minimum(group_sizes - row_in_group, max_height))
    selected = [jnp.where(belongs, column, 0) for column in columns]
    return jnp.stack([*selected, jnp.broadcast_to(tiles, belongs.shape)]).sum(2, dtype=jnp.int32)


def stable_kernel_name(context: Any) -> None:
    """Remove the number of kernels that this process lowered earlier from the kernel's name in dumps.

    With the number in it, JAX's persistent cache would find a program only if kernels were lowered in the same order as
    before. Call this inside of the kernel.
    """
    from jaxlib.mlir import ir

    context.module.operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get("grouped_matmul")


def batch_as_rows(run: Callable[..., Array]) -> Callable[..., Array]:
    """Make ``vmap`` over the rows alone a single product with more rows, which reads the weights once.

    ``run(x, weight, group_offsets, group_sizes)`` computes one product; the returned function has the same arguments.
    If other arguments are batched too, the products run one after another.
    """
    product = custom_vmap(run)

    @product.def_vmap
    def batched_product(
        size: int, in_batched: list[Any], x: Array, weight: Any, group_offsets: Array, group_sizes: Array
    ):
        # arguments without a batch axis are shared, not copied for each product
        leaves, tree = jax.tree.flatten((x, weight, group_offsets, group_sizes))
        batched = jax.tree.leaves(in_batched)
        if not in_batched[0] or sum(batched) > 1:

            def single(batched_leaves: list[Array]) -> Array:
                each = iter(batched_leaves)
                return product(*tree.unflatten(next(each) if b else a for a, b in zip(leaves, batched, strict=True)))

            return lax.map(single, [a for a, b in zip(leaves, batched, strict=True) if b]), True
        # the batch's copies of a row are neighbours, so that the rows of a group stay together
        rows = jnp.moveaxis(x, 0, 1).reshape(-1, x.shape[-1])
        y = product(rows, weight, group_offsets * size, group_sizes * size)
        return jnp.moveaxis(y.reshape(-1, size, y.shape[-1]), 1, 0), True

    return product
