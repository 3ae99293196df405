"""The grouped product as one kernel for NVIDIA's Hopper GPUs (compute capability 9), written in Pallas.

Tiles of rows are cut expert by expert, so that the work is that of the loads, however uneven. Every multiprocessor
takes tile after tile: one warpgroup copies blocks of rows and weights to shared memory, some steps ahead, and two
multiply half of the tile's rows each.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moejax.ops.device import generation, target, whole
from moejax.ops.experts.assignment import Assignment
from moejax.ops.experts.places import ALIGNED
from moejax.ops.experts.tiles import cut, nameless, rows_together
from moejax.ops.mxfp4 import MXFP4

_UNIT = 64
"""Widths are multiples of it: so many numbers are 128 bytes, what the copy engine swizzles."""

_MANY = 128
"""Mean rows of an expert from which on multiplying takes longer than reading the weights; then tiles are wide."""


class Tiling(NamedTuple):
    """Rows and columns of a tile, what a step contracts, steps that are copied ahead, multiprocessors."""

    rows: int
    columns: int
    depth: int
    stages: int
    processors: int


def suits(itemsize: int, *widths: int, mesh: Mesh | None = None) -> bool:
    """Whether there is such a GPU, and the kernel multiplies between these widths numbers of ``itemsize`` bytes.

    What XLA splits over devices by other axes of a mesh it cannot split inside of a kernel.
    """
    fit = itemsize == 2 and not any(width % _UNIT for width in widths)
    return fit and whole(mesh) and generation(target(mesh)) == 9


def fits(x: Float[Array, "P D"], weight: Float[Array, "E *M D"] | MXFP4, assignment: Assignment) -> bool:
    """Whether the kernel takes these operands, both ways."""
    alike = isinstance(weight, MXFP4) or weight.dtype == x.dtype
    widths = weight.shape[-1], math.prod(weight.shape[1:-1])
    return assignment.by_expert and alike and suits(x.dtype.itemsize, *widths, mesh=assignment.mesh)


def tiling(rows: int, experts: int, depth: int, columns: int, mesh: Mesh | None = None) -> Tiling:
    """For ``rows`` in all, contracted over ``depth``, and that many columns of the product; multiples of 64."""
    wide = (256, 192, 128, 64) if rows >= _MANY * experts else (128, 192, 64)
    width = next(w for w in wide if columns % w == 0)
    stages = {256: 4, 192: 4, 128: 6, 64: 8}[width]
    # where reading takes longer than multiplying: 256 bytes of a row at a time come faster than 128 of twice as many
    double = width <= 128 and depth % (2 * _UNIT) == 0
    return Tiling(128, width, _UNIT << double, stages >> double, target(mesh).core_count)


def matmul(
    x: Float[Array, "P A"],
    weight: Float[Array, "E M D"],
    first: Int[Array, " E"],
    load: Int[Array, " E"],
    transpose: bool,
    interpret: Any = None,
    mesh: Mesh | None = None,
) -> Float[Array, "P B"]:
    """Rows ``first[e]`` to ``first[e] + load[e]`` times the transposed matrix of expert ``e``, or times the matrix.

    ``first`` has multiples of 8. With a batch of ``x`` the weights are read once. What other rows hold is left open.
    """

    def run(x: Array, weight: Array, first: Array, load: Array) -> Array:
        depth, columns = weight.shape[1:] if transpose else weight.shape[:0:-1]
        t = tiling(len(x), len(weight), depth, columns, mesh)
        aligned = -(-load // ALIGNED) * ALIGNED
        return _kernel(x, weight, cut(first, aligned, len(x), t.rows), t, transpose, interpret)

    return rows_together(run)(x, weight, first, load)


# layers of equal shapes share one lowering, which takes a fifth of a second
@partial(jax.jit, static_argnames=("t", "transpose", "interpret"))
def _kernel(x: Array, weight: Array, table: Array, t: Tiling, transpose: bool, interpret: Any) -> Array:
    # imported late: it takes a quarter of a second, and only such a GPU needs it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    (rows, depth), columns = x.shape, weight.shape[2 if transpose else 1]
    steps, across = depth // t.depth, columns // t.columns
    stages, half = min(t.stages, steps), t.rows // 2
    stored = 128 if t.columns % 128 == 0 else 64

    def body(x, weight, table, y, xs, ws, ys, loaded, used):
        if interpret is None:
            gpu.inline_mgpu()(nameless)()
        group, processor = lax.axis_index("group"), lax.axis_index("processor")
        mine = lax.div(table[3, 0] * across - processor + (t.processors - 1), t.processors)

        def tile_at(i: Array) -> tuple[Array, ...]:
            index = processor + i * t.processors
            m = lax.div(index, across)
            return table[0, m], pl.multiple_of(table[1, m], ALIGNED), table[2, m], lax.rem(index, across) * t.columns

        @pl.when(group == 2)
        def _copy():
            gpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine)
            def _tile(i):
                expert, start, held, column = tile_at(i)

                @pl.loop(0, steps)
                def _step(k):
                    n = i * steps + k
                    stage, part = lax.rem(n, stages), pl.ds(k * t.depth, t.depth)
                    wide = pl.ds(column, t.columns)
                    pl.when(n >= stages)(lambda: gpu.barrier_wait(used.at[stage]))

                    # few rows are many tiles of weights, each of which reads the same rows anew
                    def rows_of_x(count):
                        part_of = xs.at[stage, pl.ds(0, count)]
                        gpu.copy_gmem_to_smem(x.at[pl.ds(start, count), part], part_of, loaded.at[stage])

                    pl.when(held > half)(lambda: rows_of_x(t.rows))
                    pl.when(held <= half)(lambda: rows_of_x(half))
                    block = weight.at[expert, part, wide] if transpose else weight.at[expert, wide, part]
                    gpu.copy_gmem_to_smem(block, ws.at[stage], loaded.at[stage])

            # leave no barrier behind that somebody still arrives at
            @pl.loop(jnp.maximum(mine * steps - stages, 0), mine * steps)
            def _rest(n):
                gpu.barrier_wait(used.at[lax.rem(n, stages)])

        @pl.when(group < 2)
        def _multiply():
            gpu.set_max_registers(232, action="increase")

            @pl.loop(0, mine)
            def _tile(i):
                _, start, held, column = tile_at(i)

                def product(total):
                    @pl.loop(0, steps)
                    def _step(k):
                        n = i * steps + k
                        stage = lax.rem(n, stages)
                        gpu.barrier_wait(loaded.at[stage])
                        block = ws.at[stage] if transpose else ws.at[stage].transpose((1, 0))
                        gpu.wgmma(total, xs.at[stage, pl.ds(group * half, half)], block)
                        # the product before this one has ended, so that its stage may be written
                        gpu.wgmma_wait(1)
                        pl.when(k > 0)(lambda: gpu.barrier_arrive(used.at[lax.rem(n - 1, stages)]))

                    found = total[...]
                    gpu.barrier_arrive(used.at[lax.rem(i * steps + steps - 1, stages)])
                    return found

                found = pl.run_scoped(product, gpu.WGMMAAccumulatorRef((half, t.columns), jnp.float32)).astype(y.dtype)
                own = jnp.clip(held - group * half, 0, half)
                for c in range(0, t.columns, stored):
                    gpu.wait_smem_to_gmem(0, wait_read_only=True)
                    ys[group] = found[:, c : c + stored]
                    gpu.commit_smem()
                    # copies have fixed sizes, and rows of the next expert must not be touched: powers of two
                    size = half
                    while size >= ALIGNED:

                        @pl.when((own & size) != 0)
                        def _store(size=size, c=c):
                            done = pl.multiple_of(own & ~(2 * size - 1), ALIGNED)
                            there = pl.ds(pl.multiple_of(start + group * half + done, ALIGNED), size)
                            part = ys.at[group, pl.ds(done, size)]
                            gpu.copy_smem_to_gmem(part, y.at[there, pl.ds(column + c, stored)])

                        size //= 2

            gpu.wait_smem_to_gmem(0)

    # what a profile shows
    body.__name__ = f"grouped_matmul_{rows}x{depth}x{columns}"
    layout = (gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128))
    block = (t.depth, t.columns) if transpose else (t.columns, t.depth)
    run = gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid=(t.processors,),
        grid_names=("processor",),
        num_threads=3,
        thread_name="group",
        scratch_types=[
            gpu.SMEM((stages, t.rows, t.depth), x.dtype, transforms=layout),
            gpu.SMEM((stages, *block), x.dtype, transforms=layout),
            gpu.SMEM((2, half, stored), x.dtype, transforms=layout),
            gpu.Barrier(num_arrivals=2, num_barriers=stages),
            gpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        interpret=interpret,
    )
    # with 64-bit numbers, constants in the kernel would be of another type than the table's numbers
    with jax.enable_x64(False):
        return run(x, weight, table)
