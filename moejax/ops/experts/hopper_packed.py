"""The grouped product with matrices in MXFP4 as one kernel for NVIDIA's Hopper GPUs, written in Pallas.

As in :mod:`moejax.ops.experts.hopper`, tiles of rows are cut expert by expert, and every multiprocessor takes tile
after tile: one warpgroup copies packed weights and rows to shared memory, some steps ahead, with scales as powers of
two, and two unpack weights in registers and multiply them from there (:mod:`moejax.ops.experts.lanes`). Their product
is the transposed one: weights are the matrix of 64 rows that the matrix unit takes from registers, and rows the one
that it reads from shared memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Int

from moejax.ops.device import generation, target
from moejax.ops.experts.places import ALIGNED
from moejax.ops.experts.tiles import cut, nameless
from moejax.ops.mxfp4 import BLOCK, MXFP4


class Tiling(NamedTuple):
    """Rows that a tile may have, steps of rows and pairs of steps of weights that are copied ahead, multiprocessors.

    Registers do not suffice for more rows than 96.
    """

    rows: tuple[int, ...]
    x_stages: int
    w_stages: int
    processors: int


_ROWS = (64, 80, 96)

_NEAR = 256
"""Tiles of a table that is copied to shared memory, as many as one copy may have; a longer one is read where it is."""


def suits(rows: int, m: int, d: int, mesh: Mesh | None = None) -> bool:
    """Whether there is such a GPU, and the kernel takes so many rows and matrices ``[m, d]``, both ways."""
    # no smaller than what is copied at a time
    fit = rows >= _ROWS[-1] and rows % ALIGNED == 0 and min(m, d) >= 256 and m % 64 == 0
    return fit and generation(target(mesh)) == 9


def matmul(
    x: BFloat16[Array, "P A"],
    weight: MXFP4,
    first: Int[Array, " E"],
    load: Int[Array, " E"],
    transpose: bool,
    mesh: Mesh | None = None,
) -> BFloat16[Array, "P B"]:
    """Rows ``first[e]`` to ``first[e] + load[e]`` times the transposed matrix of expert ``e``, or times the matrix.

    ``weight`` has shape ``[E, M, D]``, ``first`` multiples of 8. What other rows hold is left open. Weights below
    2^-100 and products below 2^-94 lose bits or count as zero; of a block whose scale is beyond 2^33, zeros become NaN
    and others infinite. Batches are for :func:`moejax.ops.experts.packed.matmul`.
    """
    t = Tiling(_ROWS, 4, 3, target(mesh).core_count)
    table = cut(first, load, len(x), t.rows[-1])
    return _kernel(x if transpose else by_place(x), weight, table, t, transpose)


def by_place(x: Float[Array, "P D"]) -> Float[Array, "P D128"]:
    """Rows whose entries stand, block by block of 128, as threads contract them; zeros fill up the last block.

    Of four blocks of 32 weights, a scale each, a thread at place q of its quad reads block q: four words, of which
    entries n and n + 4 are a pair. Of 16 entries that the matrix unit contracts, it holds pairs 2q and 2q + 8.
    As a copy by index, which XLA makes part of what computes the rows.
    """
    width = -(-x.shape[1] // 128) * 128
    # place, word, one of a pair, which of four pairs (two axes) -> word, which pair, place, one of it
    block = np.arange(128).reshape(4, 4, 2, 2, 2).transpose(1, 3, 4, 0, 2).ravel()
    index = (np.arange(0, width, 128)[:, None] + block).ravel()
    inside = index < x.shape[1]
    found = x.at[:, np.where(inside, index, 0).astype(np.uint32)].get(mode="promise_in_bounds")
    return found if inside.all() else jnp.where(inside, found, 0)


# layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("t", "transpose"))
def _kernel(x: Array, weight: MXFP4, table: Array, t: Tiling, transpose: bool) -> Array:
    # imported late: it takes a quarter of a second, and only such a GPU needs it
    from jax.experimental import pallas as pl
    from jax.experimental.mosaic import gpu as mosaic
    from jax.experimental.pallas import mosaic_gpu as gpu

    from moejax.ops.experts import lanes

    _, m, d = weight.shape
    depth, width = (m, d) if transpose else (d, m)
    steps, across = -(-depth // lanes.DEPTH), -(-width // lanes.COLUMNS)
    pairs = -(-steps // 2)
    near = table.shape[1] <= _NEAR
    ask, put, store = lanes.ask(m, d), lanes.put(transpose), lanes.store(width)
    values = [lanes.values(half, transpose) for half in range(2)]

    def when(condition: Array) -> Callable[[Callable[[], Any]], Any]:
        # `pl.when` makes a number of it, for which JAX asks the assembler's version, and that takes 5 ms
        return lambda run: lax.switch(jnp.where(condition, 1, 0), [lambda: None, run])

    def body(x, blocks, scales, table, y, near_tiles, xs, ws, powers, tiles_loaded, x_loaded, x_used, w_loaded, w_used):
        gpu.inline_mgpu()(nameless)()
        group, processor = lax.axis_index("group"), lax.axis_index("processor")
        if near:
            when(group == 2)(lambda: gpu.copy_gmem_to_smem(table, near_tiles, tiles_loaded))
            gpu.barrier_wait(tiles_loaded)
        tiles = near_tiles if near else table
        mine = lax.div(tiles[3, 0] * across - processor + (t.processors - 1), t.processors)

        def tile_at(i: Array) -> tuple[Array, ...]:
            # after the last one, that one again
            index = processor + jnp.minimum(i, mine - 1) * t.processors
            n = lax.div(index, across)
            column = lax.rem(index, across) * lanes.COLUMNS
            return tiles[0, n], pl.multiple_of(tiles[1, n], ALIGNED), tiles[2, n], column

        def size_of(held: Array) -> Array:
            return sum((jnp.where(held > rows, 1, 0) for rows in t.rows[:-1]), jnp.int32(0))

        def copy_weights(i: Array, pair: Array, expert: Array, column: Array) -> None:
            n = i * pairs + pair
            stage = lax.rem(n, t.w_stages)
            when(n >= t.w_stages)(lambda: gpu.barrier_wait(w_used.at[stage]))
            if transpose:
                block = blocks.at[expert, pl.ds(pair * 256, 256), pl.ds(lax.div(column, 2), 128)]
            else:
                block = blocks.at[expert, pl.ds(column, 256), pl.ds(pair * 128, 128)]
            gpu.copy_gmem_to_smem(block, ws.at[stage], w_loaded.at[stage])

        def scales_of(pair: Array, expert: Array, column: Array) -> Array:
            row, block = (pair * 256, lax.div(column, BLOCK)) if transpose else (column, pair * 8)
            return ask(scales, expert, row, block)

        def put_scales(i: Array, pair: Array, found: Array) -> None:
            stage = lax.rem(i * pairs + pair, t.w_stages)
            put(found, powers.at[stage])
            gpu.barrier_arrive(w_loaded.at[stage])

        def copy_rows(i: Array, step: Array, start: Array, held: Array) -> None:
            n = i * steps + step
            stage = lax.rem(n, t.x_stages)
            when(n >= t.x_stages)(lambda: gpu.barrier_wait(x_used.at[stage]))
            part = pl.ds(pl.multiple_of(step * lanes.DEPTH, lanes.DEPTH), lanes.DEPTH)
            for k, rows in enumerate(t.rows):

                @when(size_of(held) == k)
                def _(rows=rows):
                    block = x.at[pl.ds(start, rows), part]
                    gpu.copy_gmem_to_smem(block, xs.at[stage, pl.ds(0, rows)], x_loaded.at[stage])

        @when((group == 2) & (mine > 0))
        def _copy():
            # no more than the others leave of what three equal warpgroups get: they would wait for it forever
            gpu.set_max_registers(40, action="decrease")
            expert, _, _, column = tile_at(jnp.int32(0))
            found = scales_of(jnp.int32(0), expert, column)
            copy_weights(jnp.int32(0), jnp.int32(0), expert, column)
            put_scales(jnp.int32(0), jnp.int32(0), found)

            @pl.loop(0, mine)
            def _tile(i):
                expert, start, held, column = tile_at(i)
                next_expert, _, _, next_column = tile_at(i + 1)

                @pl.loop(0, pairs)
                def _pair(k):
                    last = k == pairs - 1
                    following = jnp.where(last, i + 1, i), jnp.where(last, 0, k + 1)
                    of = jnp.where(last, next_expert, expert), jnp.where(last, next_column, column)
                    more = (i < mine - 1) | jnp.logical_not(last)
                    # weights come from far: they are asked for before rows, which come from the cache
                    found = scales_of(following[1], *of)
                    when(more)(lambda: copy_weights(*following, *of))
                    copy_rows(i, 2 * k, start, held)
                    when(2 * k + 1 < steps)(lambda: copy_rows(i, 2 * k + 1, start, held))
                    when(more)(lambda: put_scales(*following, found))

            # leave no barrier behind that somebody still arrives at
            for total, used in ((mine * steps, x_used), (mine * pairs, w_used)):
                stages = used.shape[0]

                @pl.loop(jnp.maximum(total - stages, 0), total)
                def _rest(n, used=used, stages=stages):
                    gpu.barrier_wait(used.at[lax.rem(n, stages)])

        @when((group < 2) & (mine > 0))
        def _multiply():
            gpu.set_max_registers(232, action="increase")

            @pl.loop(0, mine)
            def _tile(i):
                _, start, held, column = tile_at(i)

                def product(rows: int, *sums: Any) -> list[Array]:
                    def step(k: Array, before: lanes.Values) -> lanes.Values:
                        n, odd, last = i * steps + k, lax.rem(k, 2), k == steps - 1
                        stage, w_stage = lax.rem(n, t.x_stages), lax.rem(i * pairs + lax.div(k, 2), t.w_stages)
                        when(odd == 0)(lambda: gpu.barrier_wait(w_loaded.at[w_stage]))
                        packed, power = ws.at[w_stage], powers.at[w_stage]
                        if not transpose:
                            packed, power = lanes.words(packed, group, odd), lanes.powers_of_columns(power, group, odd)
                        gpu.barrier_wait(x_loaded.at[stage])
                        for half in range(2):
                            # unpacked while the matrix unit multiplies the half before
                            weights = values[half](packed, power, group, odd)
                            block = xs.at[stage, pl.ds(0, rows), pl.ds(64 * half, 64)].transpose((1, 0))
                            for total, part in zip(sums, weights, strict=True):
                                gpu.wgmma(total, part, block)
                            gpu.wgmma_wait(2)
                            lanes.keep(*before, held)
                            before = weights
                            if half == 0:
                                when(k > 0)(lambda: gpu.barrier_arrive(x_used.at[lax.rem(n - 1, t.x_stages)]))
                        when((odd == 1) | last)(lambda: gpu.barrier_arrive(w_used.at[w_stage]))
                        return before

                    before = lax.fori_loop(0, steps, step, lanes.zeros())
                    found = [total[...] for total in sums]
                    lanes.keep(*before, held)
                    gpu.barrier_arrive(x_used.at[lax.rem(i * steps + steps - 1, t.x_stages)])
                    return found

                def tile_of(rows: int) -> None:
                    sums = [gpu.WGMMAAccumulatorRef((64, rows), jnp.float32)] * 2
                    store(y, *pl.run_scoped(partial(product, rows), *sums), start, held, column, group)

                lax.switch(size_of(held), [partial(tile_of, rows) for rows in t.rows])

    # what a profile shows
    body.__name__ = f"packed_matmul_hopper_{len(x)}x{depth}x{width}"
    swizzled = (gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128))
    run = gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(x), width), x.dtype),
        grid=(t.processors,),
        grid_names=("processor",),
        num_threads=3,
        thread_name="group",
        scratch_types=[
            gpu.SMEM((4, table.shape[1] if near else 8), table.dtype),
            gpu.SMEM((t.x_stages, t.rows[-1], lanes.DEPTH), x.dtype, transforms=swizzled),
            gpu.SMEM((t.w_stages, 256, 128), jnp.uint8, transforms=lanes.SWIZZLE),
            gpu.SMEM((t.w_stages, lanes.POWERS[transpose]), jnp.int32),
            gpu.Barrier(num_arrivals=1),
            gpu.Barrier(num_arrivals=1, num_barriers=t.x_stages),
            gpu.Barrier(num_arrivals=2, num_barriers=t.x_stages),
            gpu.Barrier(num_arrivals=2, num_barriers=t.w_stages),
            gpu.Barrier(num_arrivals=2, num_barriers=t.w_stages),
        ],
        # threads are told apart in `lanes`; what they read and others write is guarded by barriers here
        compiler_params=gpu.CompilerParams(
            lowering_semantics=mosaic.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    # with 64-bit numbers, constants in the kernel would be of another type than the table's numbers
    with jax.enable_x64(False):
        return run(x, weight.blocks.reshape(len(weight.blocks), m, d // 2), weight.scales, table)
