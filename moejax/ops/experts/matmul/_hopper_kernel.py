"""The grouped matmul as one kernel for NVIDIA's Hopper GPUs (compute capability 9.0), written in Pallas (Mosaic GPU).

Each group of rows is cut into tiles of up to 128 rows (:mod:`moejax.ops.experts.matmul.tile_table`), so that the work
is proportional to the group sizes, however uneven they are. There is one program for each multiprocessor, and it
computes one tile of the output after another. Of its three warpgroups, one copies blocks of rows and weights to shared
memory, some steps ahead, and the two others multiply, each one half of the tile's rows::

                    depth             columns                        columns
                 +---------+        +---------+                   +-----------+
                 |         |        | step 0  | depth             | warpgroup |  64 rows
        128 rows |    x    |   @    +---------+          =        |     0     |
                 |         |        | step 1  |                   +-----------+
                 |         |        +---------+                   | warpgroup |  64 rows
                 +---------+        |   ...   |                   |     1     |
               of one step          one column of weight tiles    +-----------+

Shared memory, in bytes. ``depth`` is 64 or 128; ``stages`` is 4 for tiles of 192 or 256 columns, and 6 (128 columns) or
8 (64 columns) otherwise, or half as many if ``depth`` is 128:

======  ==========================================  ===========================================  =======================
buffer  shape                                       bytes                                        largest (256 columns)
======  ==========================================  ===========================================  =======================
xs      [stages, 128, depth] of 16-bit numbers      256 stages depth                             64 KiB
ws      [stages, columns, depth], or the last two   2 stages columns depth                       128 KiB
        the other way round with ``transpose``
ys      [2, 64, stored columns]                     256 stored columns (64 or 128 at a time)     32 KiB
loaded  [stages] barriers: two copies arrive        8 stages                                     32 B
used    [stages] barriers: two warpgroups arrive    8 stages                                     32 B
======  ==========================================  ===========================================  =======================
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array

from moejax.ops.experts.dispatch.rank_slots import ALIGNMENT
from moejax.ops.experts.matmul.hopper import HopperTiling
from moejax.ops.experts.matmul.tile_table import stable_kernel_name


class HopperRefs(NamedTuple):
    """The kernel's references: operands and result in global memory, then the buffers of the table above."""

    x: Any
    weight: Any
    table: Any
    y: Any
    xs: Any
    ws: Any
    ys: Any
    loaded: Any
    used: Any


class HopperPlan(NamedTuple):
    """Sizes and switches that are known when the kernel is traced.

    Attributes:
        tiling: sizes of tiles and stages.
        steps: steps over the contracted axis for one tile.
        across: tiles beside each other that cover the columns.
        stages: steps that are copied ahead, at most ``steps``.
        transpose: multiply by the transposed matrices.
        stored: columns that are stored at a time.
    """

    tiling: HopperTiling
    steps: int
    across: int
    stages: int
    transpose: bool
    stored: int

    @property
    def half(self) -> int:
        """Rows of a tile that one warpgroup multiplies."""
        return self.tiling.rows // 2


# jitted, so that layers of equal shapes share one lowering, which takes a fifth of a second
@partial(jax.jit, static_argnames=("t", "transpose", "interpret"))
def kernel(x: Array, weight: Array, table: Array, t: HopperTiling, transpose: bool, interpret: Any) -> Array:
    (rows, depth), columns = x.shape, weight.shape[2 if transpose else 1]
    steps, across = depth // t.depth, columns // t.columns
    stored = 128 if t.columns % 128 == 0 else 64
    plan = HopperPlan(t, steps, across, min(t.stages, steps), transpose, stored)

    def body(*refs):
        if interpret is None:
            gpu.inline_mgpu()(stable_kernel_name)()
        _run(HopperRefs(*refs), plan)

    # the name of the kernel in a profile
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
            gpu.SMEM((plan.stages, t.rows, t.depth), x.dtype, transforms=layout),
            gpu.SMEM((plan.stages, *block), x.dtype, transforms=layout),
            gpu.SMEM((2, plan.half, stored), x.dtype, transforms=layout),
            gpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            gpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        ],
        interpret=interpret,
    )
    # with 64-bit numbers enabled, constants in the kernel would have another type than the table
    with jax.enable_x64(False):
        return run(x, weight, table)


def _run(refs: HopperRefs, plan: HopperPlan) -> None:
    """The kernel's body: the third warpgroup copies, the first two multiply and store."""
    t = plan.tiling
    group, processor = lax.axis_index("group"), lax.axis_index("processor")
    num_tiles = lax.div(refs.table[3, 0] * plan.across - processor + (t.processors - 1), t.processors)

    def tile_at(i: Array) -> tuple[Array, ...]:
        """Expert, first row, number of rows and first column of this program's tile ``i``."""
        index = processor + i * t.processors
        m = lax.div(index, plan.across)
        expert, start = refs.table[0, m], pl.multiple_of(refs.table[1, m], ALIGNMENT)
        return expert, start, refs.table[2, m], lax.rem(index, plan.across) * t.columns

    @pl.when(group == 2)
    def _copy():
        gpu.set_max_registers(40, action="decrease")

        @pl.loop(0, num_tiles)
        def _tile(i):
            _copy_tile(refs, plan, i, *tile_at(i))

        # wait until both warpgroups have used the last stages: a barrier must not be left before all have arrived
        @pl.loop(jnp.maximum(num_tiles * plan.steps - plan.stages, 0), num_tiles * plan.steps)
        def _rest(n):
            gpu.barrier_wait(refs.used.at[lax.rem(n, plan.stages)])

    @pl.when(group < 2)
    def _multiply():
        gpu.set_max_registers(232, action="increase")

        @pl.loop(0, num_tiles)
        def _tile(i):
            _, start, tile_rows, column = tile_at(i)
            accumulator = gpu.WGMMAAccumulatorRef((plan.half, t.columns), jnp.float32)
            product = pl.run_scoped(partial(_multiply_tile, refs, plan, i, group), accumulator)
            _store_tile(refs, plan, product.astype(refs.y.dtype), group, start, tile_rows, column)

        gpu.wait_smem_to_gmem(0)


def _copy_tile(
    refs: HopperRefs, plan: HopperPlan, i: Any, expert: Any, start: Any, tile_rows: Any, column: Any
) -> None:
    """Copy rows and weights of all steps of tile ``i`` to shared memory, each as soon as a stage is free."""
    t, half = plan.tiling, plan.half

    @pl.loop(0, plan.steps)
    def _step(k):
        n = i * plan.steps + k
        stage, depth = lax.rem(n, plan.stages), pl.ds(k * t.depth, t.depth)
        columns = pl.ds(column, t.columns)
        pl.when(n >= plan.stages)(lambda: gpu.barrier_wait(refs.used.at[stage]))

        # with few rows, most of the time goes into many tiles of weights, each of which reads the same rows again
        def copy_rows(count):
            part = refs.xs.at[stage, pl.ds(0, count)]
            gpu.copy_gmem_to_smem(refs.x.at[pl.ds(start, count), depth], part, refs.loaded.at[stage])

        pl.when(tile_rows > half)(lambda: copy_rows(t.rows))
        pl.when(tile_rows <= half)(lambda: copy_rows(half))
        weight = refs.weight
        block = weight.at[expert, depth, columns] if plan.transpose else weight.at[expert, columns, depth]
        gpu.copy_gmem_to_smem(block, refs.ws.at[stage], refs.loaded.at[stage])


def _multiply_tile(refs: HopperRefs, plan: HopperPlan, i: Any, group: Any, accumulator: Any) -> Array:
    """Multiply the half of tile ``i`` that belongs to this warpgroup, step after step as they arrive."""

    @pl.loop(0, plan.steps)
    def _step(k):
        n = i * plan.steps + k
        stage = lax.rem(n, plan.stages)
        gpu.barrier_wait(refs.loaded.at[stage])
        block = refs.ws.at[stage] if plan.transpose else refs.ws.at[stage].transpose((1, 0))
        gpu.wgmma(accumulator, refs.xs.at[stage, pl.ds(group * plan.half, plan.half)], block)
        # now the product of the step before has ended, and its stage may be overwritten
        gpu.wgmma_wait(1)
        pl.when(k > 0)(lambda: gpu.barrier_arrive(refs.used.at[lax.rem(n - 1, plan.stages)]))

    product = accumulator[...]
    gpu.barrier_arrive(refs.used.at[lax.rem(i * plan.steps + plan.steps - 1, plan.stages)])
    return product


def _store_tile(
    refs: HopperRefs, plan: HopperPlan, product: Any, group: Any, start: Any, tile_rows: Any, column: Any
) -> None:
    """Write this warpgroup's half of a tile to global memory, through shared memory."""
    half = plan.half
    group_rows = jnp.clip(tile_rows - group * half, 0, half)
    for c in range(0, plan.tiling.columns, plan.stored):
        gpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.ys[group] = product[:, c : c + plan.stored]
        gpu.commit_smem()
        # a copy has a fixed size, and rows of the next group must not be touched: store powers of two of rows
        size = half
        while size >= ALIGNMENT:

            @pl.when((group_rows & size) != 0)
            def _store(size=size, c=c):
                done = pl.multiple_of(group_rows & ~(2 * size - 1), ALIGNMENT)
                rows = pl.ds(pl.multiple_of(start + group * half + done, ALIGNMENT), size)
                part = refs.ys.at[group, pl.ds(done, size)]
                gpu.copy_smem_to_gmem(part, refs.y.at[rows, pl.ds(column + c, plan.stored)])

            size //= 2
