"""The grouped matmul with matrices in MXFP4 as one kernel for NVIDIA's Hopper GPUs (compute capability 9.0).

Written in Pallas (Mosaic GPU). As in :mod:`moejax.ops.experts.matmul._hopper_kernel`, groups are cut into tiles of
rows, and there is one program for each multiprocessor, which computes one tile after another. Of its three warpgroups,
one copies packed weights and rows to shared memory, some steps ahead, together with the scales as powers of two. The
two others unpack weights in registers and multiply them from there (:mod:`moejax.ops.experts.matmul._wgmma_fragments`).

The kernel computes the transposed product, because the matrix unit takes a matrix of 64 rows from registers, which are
the weights here, and reads the other matrix from shared memory, which are the rows. A tile of the output has 256
columns and 64, 80 or 96 rows; a step contracts 128 entries::

                          128
                     +-----------+
        warpgroup 0  | weights   |  64 columns                64, 80 or 96 rows
                     | in        |                            +-------------+
                     | registers |  64 columns     @      128 |     x^T     |
                     +-----------+                            | from shared |
        warpgroup 1  |           |  64 columns                | memory      |
                     |           |                            +-------------+
                     |           |  64 columns
                     +-----------+

Packed weights are copied for two steps at a time, a *pair*: 128 bytes of a row of the matrix are 256 entries. If ``m``
is contracted (``transpose``), a pair is 256 rows of the matrix with 256 columns.

Shared memory, in bytes, with ``x_stages`` = 4 and ``w_stages`` = 3:

============  ================================================  ==============================================
buffer        shape                                             bytes
============  ================================================  ==============================================
near_table    [4, tiles] of int32 if there are 256 at most      4 KiB at most
xs            [x_stages, 96, 128] of bfloat16                   96 KiB
ws            [w_stages, 256, 128] bytes                        96 KiB
powers        [w_stages, 2080] of int32; 1040 if transposed     24.4 KiB; 12.2 KiB
table_loaded  one barrier: one copy arrives                     8 B
x_loaded      [x_stages] barriers: one copy arrives             32 B
x_used        [x_stages] barriers: two warpgroups arrive        32 B
w_loaded      [w_stages] barriers: a copy and the scales        24 B
w_used        [w_stages] barriers: two warpgroups arrive        24 B
============  ================================================  ==============================================
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array

from moejax.ops.experts.dispatch.rank_slots import ALIGNMENT
from moejax.ops.experts.matmul import _wgmma_fragments as fragments
from moejax.ops.experts.matmul.mxfp4_hopper import MXFP4HopperTiling
from moejax.ops.experts.matmul.tile_table import stable_kernel_name
from moejax.ops.mxfp4 import BLOCK, MXFP4


class MXFP4HopperRefs(NamedTuple):
    """The kernel's references: operands and result in global memory, then the buffers of the table above."""

    x: Any
    blocks: Any
    scales: Any
    table: Any
    y: Any
    near_table: Any
    xs: Any
    ws: Any
    powers: Any
    table_loaded: Any
    x_loaded: Any
    x_used: Any
    w_loaded: Any
    w_used: Any


class MXFP4HopperPlan(NamedTuple):
    """Sizes and switches that are known when the kernel is traced.

    Attributes:
        tiling: sizes of tiles and stages.
        m: rows of a matrix.
        d: columns of a matrix.
        transpose: contract ``m`` instead of ``d``.
        copied_table: the table of tiles is copied to shared memory.
    """

    tiling: MXFP4HopperTiling
    m: int
    d: int
    transpose: bool
    copied_table: bool

    @property
    def depth(self) -> int:
        """Length of the contracted axis."""
        return self.m if self.transpose else self.d

    @property
    def width(self) -> int:
        """Columns of the product."""
        return self.d if self.transpose else self.m

    @property
    def steps(self) -> int:
        """Steps over the contracted axis for one tile."""
        return -(-self.depth // fragments.DEPTH)

    @property
    def pairs(self) -> int:
        """Pairs of steps for one tile, rounded up: packed weights are copied for two steps at a time."""
        return -(-self.steps // 2)

    @property
    def across(self) -> int:
        """Tiles beside each other that cover the columns."""
        return -(-self.width // fragments.COLUMNS)


class Tile(NamedTuple):
    """A tile of the output: expert, first row, number of rows, first column."""

    expert: Any
    start: Any
    rows: Any
    column: Any


class Tiles(NamedTuple):
    """The tiles of one program: entries of ``table`` from number ``processor`` on, every so many processors."""

    table: Any
    processor: Any
    count: Any
    plan: MXFP4HopperPlan

    def at(self, i: Any) -> Tile:
        """Tile ``i``; after the last one, the last one again."""
        index = self.processor + jnp.minimum(i, self.count - 1) * self.plan.tiling.processors
        n = lax.div(index, self.plan.across)
        column = lax.rem(index, self.plan.across) * fragments.COLUMNS
        return Tile(self.table[0, n], pl.multiple_of(self.table[1, n], ALIGNMENT), self.table[2, n], column)


# jitted, so that layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("t", "transpose", "copied_table"))
def kernel(x: Array, weight: MXFP4, table: Array, t: MXFP4HopperTiling, transpose: bool, copied_table: bool) -> Array:
    """The product ``[P, Z]`` of rows ``[P, A]`` that are in fragment order, or not if ``transpose``."""
    _, m, d = weight.shape
    plan = MXFP4HopperPlan(t, m, d, transpose, copied_table)

    def body(*refs):
        _run(MXFP4HopperRefs(*refs), plan)

    # the name of the kernel in a profile
    body.__name__ = f"packed_matmul_hopper_{len(x)}x{plan.depth}x{plan.width}"
    swizzled = (gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128))
    run = gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(x), plan.width), x.dtype),
        grid=(t.processors,),
        grid_names=("processor",),
        num_threads=3,
        thread_name="group",
        scratch_types=[
            gpu.SMEM((4, table.shape[1] if copied_table else 8), table.dtype),
            gpu.SMEM((t.x_stages, t.heights[-1], fragments.DEPTH), x.dtype, transforms=swizzled),
            gpu.SMEM((t.w_stages, 256, 128), jnp.uint8, transforms=fragments.SWIZZLE),
            gpu.SMEM((t.w_stages, fragments.POWERS[transpose]), jnp.int32),
            gpu.Barrier(num_arrivals=1),
            gpu.Barrier(num_arrivals=1, num_barriers=t.x_stages),
            gpu.Barrier(num_arrivals=2, num_barriers=t.x_stages),
            gpu.Barrier(num_arrivals=2, num_barriers=t.w_stages),
            gpu.Barrier(num_arrivals=2, num_barriers=t.w_stages),
        ],
        # `_wgmma_fragments` addresses single threads; the barriers here guard what they read and others write
        compiler_params=gpu.CompilerParams(
            lowering_semantics=mosaic.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    # with 64-bit numbers enabled, constants in the kernel would have another type than the table
    with jax.enable_x64(False):
        return run(x, weight.blocks.reshape(len(weight.blocks), m, d // 2), weight.scales, table)


def _run(refs: MXFP4HopperRefs, plan: MXFP4HopperPlan) -> None:
    """The kernel's body: the third warpgroup copies, the first two unpack, multiply and store."""
    gpu.inline_mgpu()(stable_kernel_name)()
    group, processor = lax.axis_index("group"), lax.axis_index("processor")
    if plan.copied_table:
        _when(group == 2)(lambda: gpu.copy_gmem_to_smem(refs.table, refs.near_table, refs.table_loaded))
        gpu.barrier_wait(refs.table_loaded)
    table, processors = refs.near_table if plan.copied_table else refs.table, plan.tiling.processors
    count = lax.div(table[3, 0] * plan.across - processor + (processors - 1), processors)
    tiles = Tiles(table, processor, count, plan)

    @_when((group == 2) & (count > 0))
    def _copy():
        # at most what the two others leave of the registers that three equal warpgroups get, or they wait forever
        gpu.set_max_registers(40, action="decrease")
        _copy_tiles(refs, plan, tiles)

    @_when((group < 2) & (count > 0))
    def _multiply():
        gpu.set_max_registers(232, action="increase")

        @pl.loop(0, count)
        def _tile(i):
            tile = tiles.at(i)
            heights = plan.tiling.heights
            lax.switch(
                _height_index(plan, tile), [partial(_compute_tile, refs, plan, i, tile, group, h) for h in heights]
            )


# ---- the warpgroup that copies -------------------------------------------------------------------------------------


def _copy_tiles(refs: MXFP4HopperRefs, plan: MXFP4HopperPlan, tiles: Tiles) -> None:
    """Copy rows, weights and scales of all tiles, each as soon as a stage is free."""
    first = tiles.at(jnp.int32(0))
    scales = _load_scales(refs, plan, jnp.int32(0), first.expert, first.column)
    _copy_weights(refs, plan, jnp.int32(0), jnp.int32(0), first.expert, first.column)
    _store_exponents(refs, plan, jnp.int32(0), jnp.int32(0), scales)

    @pl.loop(0, tiles.count)
    def _tile(i):
        tile, next_tile = tiles.at(i), tiles.at(i + 1)

        @pl.loop(0, plan.pairs)
        def _pair(k):
            last = k == plan.pairs - 1
            next_i, next_k = jnp.where(last, i + 1, i), jnp.where(last, 0, k + 1)
            expert = jnp.where(last, next_tile.expert, tile.expert)
            column = jnp.where(last, next_tile.column, tile.column)
            more = (i < tiles.count - 1) | jnp.logical_not(last)
            # weights of the next pair come from global memory: request them before the rows, which are in the cache
            scales = _load_scales(refs, plan, next_k, expert, column)
            _when(more)(lambda: _copy_weights(refs, plan, next_i, next_k, expert, column))
            _copy_rows(refs, plan, i, 2 * k, tile)
            _when(2 * k + 1 < plan.steps)(lambda: _copy_rows(refs, plan, i, 2 * k + 1, tile))
            _when(more)(lambda: _store_exponents(refs, plan, next_i, next_k, scales))

    # wait until both warpgroups have used the last stages: a barrier must not be left before all have arrived
    for total, used in ((tiles.count * plan.steps, refs.x_used), (tiles.count * plan.pairs, refs.w_used)):
        stages = used.shape[0]

        @pl.loop(jnp.maximum(total - stages, 0), total)
        def _rest(n, used=used, stages=stages):
            gpu.barrier_wait(used.at[lax.rem(n, stages)])


def _copy_weights(refs: MXFP4HopperRefs, plan: MXFP4HopperPlan, i: Any, pair: Any, expert: Any, column: Any) -> None:
    """Copy the packed weights of a pair of steps of tile ``i``."""
    n = i * plan.pairs + pair
    stage = lax.rem(n, plan.tiling.w_stages)
    _when(n >= plan.tiling.w_stages)(lambda: gpu.barrier_wait(refs.w_used.at[stage]))
    if plan.transpose:
        block = refs.blocks.at[expert, pl.ds(pair * 256, 256), pl.ds(lax.div(column, 2), 128)]
    else:
        block = refs.blocks.at[expert, pl.ds(column, 256), pl.ds(pair * 128, 128)]
    gpu.copy_gmem_to_smem(block, refs.ws.at[stage], refs.w_loaded.at[stage])


def _load_scales(refs: MXFP4HopperRefs, plan: MXFP4HopperPlan, pair: Any, expert: Any, column: Any) -> Any:
    """Load the scales of a pair of steps to registers."""
    row, block = (pair * 256, lax.div(column, BLOCK)) if plan.transpose else (column, pair * 8)
    return fragments.load_scales(plan.m, plan.d)(refs.scales, expert, row, block)


def _store_exponents(refs: MXFP4HopperRefs, plan: MXFP4HopperPlan, i: Any, pair: Any, scales: Any) -> None:
    """Store scales to shared memory as powers of two, and arrive at the barrier of their weights."""
    stage = lax.rem(i * plan.pairs + pair, plan.tiling.w_stages)
    fragments.store_exponents(plan.transpose)(scales, refs.powers.at[stage])
    gpu.barrier_arrive(refs.w_loaded.at[stage])


def _copy_rows(refs: MXFP4HopperRefs, plan: MXFP4HopperPlan, i: Any, step: Any, tile: Tile) -> None:
    """Copy the rows of a step of tile ``i``, as many as the smallest height that holds the tile."""
    n = i * plan.steps + step
    stage = lax.rem(n, plan.tiling.x_stages)
    _when(n >= plan.tiling.x_stages)(lambda: gpu.barrier_wait(refs.x_used.at[stage]))
    depth = pl.ds(pl.multiple_of(step * fragments.DEPTH, fragments.DEPTH), fragments.DEPTH)
    for index, height in enumerate(plan.tiling.heights):

        @_when(_height_index(plan, tile) == index)
        def _(height=height):
            block = refs.x.at[pl.ds(tile.start, height), depth]
            gpu.copy_gmem_to_smem(block, refs.xs.at[stage, pl.ds(0, height)], refs.x_loaded.at[stage])


# ---- the warpgroups that multiply ----------------------------------------------------------------------------------


def _compute_tile(refs: MXFP4HopperRefs, plan: MXFP4HopperPlan, i: Any, tile: Tile, group: Any, height: int) -> None:
    """Compute and store this warpgroup's 128 columns of tile ``i``, as two products of 64 columns."""
    accumulators = [gpu.WGMMAAccumulatorRef((64, height), jnp.float32)] * 2
    sums = pl.run_scoped(partial(_multiply_tile, refs, plan, i, tile, group, height), *accumulators)
    fragments.store_tile(plan.width)(refs.y, *sums, tile.start, tile.rows, tile.column, group)


def _multiply_tile(
    refs: MXFP4HopperRefs, plan: MXFP4HopperPlan, i: Any, tile: Tile, group: Any, height: int, *sums: Any
) -> list[Array]:
    """Multiply step after step as they arrive; weights are unpacked while the matrix unit multiplies earlier ones."""
    t, steps = plan.tiling, plan.steps

    def step(k: Array, previous: fragments.Weights) -> fragments.Weights:
        n, odd, last = i * steps + k, lax.rem(k, 2), k == steps - 1
        stage, w_stage = lax.rem(n, t.x_stages), lax.rem(i * plan.pairs + lax.div(k, 2), t.w_stages)
        _when(odd == 0)(lambda: gpu.barrier_wait(refs.w_loaded.at[w_stage]))
        packed, powers = _load_packed(refs, plan, w_stage, group, odd)
        gpu.barrier_wait(refs.x_loaded.at[stage])
        for half in range(2):
            weights = fragments.unpack_weights(half, plan.transpose)(packed, powers, group, odd)
            block = refs.xs.at[stage, pl.ds(0, height), pl.ds(64 * half, 64)].transpose((1, 0))
            for total, part in zip(sums, weights, strict=True):
                gpu.wgmma(total, part, block)
            gpu.wgmma_wait(2)
            fragments.hold_registers(*previous, tile.rows)
            previous = weights
            if half == 0:
                _when(k > 0)(lambda: gpu.barrier_arrive(refs.x_used.at[lax.rem(n - 1, t.x_stages)]))
        _when((odd == 1) | last)(lambda: gpu.barrier_arrive(refs.w_used.at[w_stage]))
        return previous

    previous = lax.fori_loop(0, steps, step, fragments.zeros())
    products = [total[...] for total in sums]
    fragments.hold_registers(*previous, tile.rows)
    gpu.barrier_arrive(refs.x_used.at[lax.rem(i * steps + steps - 1, t.x_stages)])
    return products


def _load_packed(refs: MXFP4HopperRefs, plan: MXFP4HopperPlan, w_stage: Any, group: Any, odd: Any) -> tuple[Any, Any]:
    """Packed weights and powers of a step: in registers, or in shared memory if ``m`` is contracted."""
    packed, powers = refs.ws.at[w_stage], refs.powers.at[w_stage]
    if plan.transpose:
        return packed, powers
    return fragments.load_packed(packed, group, odd), fragments.load_powers(powers, group, odd)


def _height_index(plan: MXFP4HopperPlan, tile: Tile) -> Any:
    """The index of the smallest height that holds the tile's rows."""
    return sum((jnp.where(tile.rows > height, 1, 0) for height in plan.tiling.heights[:-1]), jnp.int32(0))


def _when(condition: Any) -> Callable[[Callable[[], Any]], Any]:
    """``pl.when``, which would convert the condition in a way that makes JAX ask for PTX's version: 5 ms each time."""
    return lambda run: lax.switch(jnp.where(condition, 1, 0), [lambda: None, run])
