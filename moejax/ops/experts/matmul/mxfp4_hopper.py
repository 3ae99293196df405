"""The grouped matmul with matrices in MXFP4 on NVIDIA's Hopper GPUs: what the kernel supports, and its operands.

The kernel itself, with a drawing of a tile and a table of its buffers, is in ``_mxfp4_hopper_kernel``, which is
imported when a program for such a GPU is traced.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Int

from moejax.ops.device import compute_capability, target
from moejax.ops.experts.dispatch.rank_slots import ALIGNMENT
from moejax.ops.experts.matmul.tile_table import tile_table
from moejax.ops.mxfp4 import MXFP4


class MXFP4HopperTiling(NamedTuple):
    """Sizes of the kernel.

    Attributes:
        heights: numbers of rows that a tile may have. Registers do not suffice for more than 96.
        x_stages: steps of rows that are copied ahead.
        w_stages: pairs of steps of weights that are copied ahead.
        processors: multiprocessors of the GPU.
    """

    heights: tuple[int, ...]
    x_stages: int
    w_stages: int
    processors: int


_HEIGHTS = (64, 80, 96)
"""Rows of a tile; its columns and depth are fixed, in :mod:`moejax.ops.experts.matmul._wgmma_fragments`."""

_X_STAGES, _W_STAGES = 4, 3
"""Steps by which rows, and pairs of steps by which weights, are copied ahead."""

_MAX_COPIED_TILES = 256
"""Tiles of the longest table that one copy can bring to shared memory. Longer tables are read from global memory."""


def supports_shapes(rows: int, m: int, d: int, mesh: Mesh | None = None) -> bool:
    """Return whether there is a Hopper GPU, and the kernel takes P rows and matrices ``[m, d]`` for both products."""
    # operands must not be smaller than one copy of them
    fit = rows >= _HEIGHTS[-1] and rows % ALIGNMENT == 0 and min(m, d) >= 256 and m % 64 == 0
    return fit and compute_capability(target(mesh)) == 9


def matmul(
    x: BFloat16[Array, "P A"],
    weight: MXFP4,
    group_offsets: Int[Array, " E"],
    group_sizes: Int[Array, " E"],
    transpose: bool,
    mesh: Mesh | None = None,
) -> BFloat16[Array, "P Z"]:
    """Multiply each group of rows by the matrix of its expert.

    Without ``transpose``, A is D and Z is O: ``y[p] = W[e] x[p]``. With it, A is O and Z is D: ``y[p] = W[e]^T x[p]``.
    Rows without a slot may hold anything. For batches use :func:`moejax.ops.experts.matmul.packed.matmul`.

    Weights below 2^-100 and products below 2^-94 lose bits or become zero. In a block whose scale is above 2^33, zeros
    become NaN and all other weights infinite.

    Args:
        x: rows by expert.
        weight: matrices of shape ``[E, O, D]``.
        group_offsets: the first row of each group, a multiple of 8.
        group_sizes: the number of rows of each group.
        transpose: multiply by the transposed matrices.
        mesh: devices that the program is for.
    """
    # imported late: the import takes a quarter of a second, and only a GPU that takes the kernel needs it
    from moejax.ops.experts.matmul._mxfp4_hopper_kernel import kernel

    t = MXFP4HopperTiling(_HEIGHTS, _X_STAGES, _W_STAGES, target(mesh).core_count)
    table = tile_table(group_offsets, group_sizes, len(x), t.heights[-1])
    copied_table = table.shape[1] <= _MAX_COPIED_TILES
    return kernel(x if transpose else rows_in_fragment_order(x), weight, table, t, transpose, copied_table)


def rows_in_fragment_order(x: Float[Array, "P D"]) -> Float[Array, "P D128"]:
    """Reorder the entries of rows, within blocks of 128, as threads contract them; zeros fill up the last block.

    128 weights are four blocks of 32 with a scale each. The thread at position q of its quad reads block q: four words
    of eight entries, in which the entries n and n + 4 are a pair. Of 16 entries that the matrix unit contracts, the
    thread holds the pairs 2q and 2q + 8. The reordering is a gather, which XLA fuses into what computes the rows.
    """
    width = -(-x.shape[1] // 128) * 128
    # quad position, word, entry of a pair, which of four pairs (two axes)
    # -> word, which of four pairs, quad position, entry of a pair
    block = np.arange(128).reshape(4, 4, 2, 2, 2).transpose(1, 3, 4, 0, 2).ravel()
    index = (np.arange(0, width, 128)[:, None] + block).ravel()
    inside = index < x.shape[1]
    reordered = x.at[:, np.where(inside, index, 0).astype(np.uint32)].get(mode="promise_in_bounds")
    return reordered if inside.all() else jnp.where(inside, reordered, 0)
