"""The grouped matmul on NVIDIA's Hopper GPUs: what the kernel supports, and the sizes of its tiles.

The kernel itself, with a drawing of a tile and a table of its buffers, is in ``_hopper_kernel``, which is imported when
a program for such a GPU is traced.
"""

import math
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moejax.ops.device import compute_capability, only_experts_split, target
from moejax.ops.experts.dispatch.assignment import Assignment
from moejax.ops.experts.dispatch.rank_slots import ALIGNMENT
from moejax.ops.experts.matmul.registry import register_matmul
from moejax.ops.experts.matmul.tile_table import batch_as_rows, tile_table
from moejax.ops.packed import Packed, unpack_in_turn

_SWIZZLED_NUMBERS = 64
"""Widths must be multiples of this: so many 16-bit numbers are 128 bytes, a line that the copy engine swizzles."""

_MANY_ROWS = 128
"""Mean rows of a group from which on multiplying takes longer than reading the weights. Then tiles are wide."""


class HopperTiling(NamedTuple):
    """Sizes of the kernel.

    Attributes:
        rows: rows of a tile.
        columns: columns of a tile.
        depth: how much of the contracted axis one step multiplies.
        stages: steps that may be copied ahead.
        processors: multiprocessors of the GPU.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    processors: int


def supports_shapes(itemsize: int, *widths: int, mesh: Mesh | None = None) -> bool:
    """Return whether there is a Hopper GPU, and the kernel multiplies numbers of ``itemsize`` bytes between ``widths``.

    False if XLA splits arrays over further axes of ``mesh``: it cannot split them inside of a kernel.
    """
    fit = itemsize == 2 and not any(width % _SWIZZLED_NUMBERS for width in widths)
    return fit and only_experts_split(mesh) and compute_capability(target(mesh)) == 9


def supports(x: Float[Array, "P D"], weight: Float[Array, "E *O D"] | Packed, assignment: Assignment) -> bool:
    """Return whether the kernel takes these operands, for the product and the transposed product."""
    same_dtype = isinstance(weight, Packed) or weight.dtype == x.dtype
    widths = weight.shape[-1], math.prod(weight.shape[1:-1])
    fits = supports_shapes(x.dtype.itemsize, *widths, mesh=assignment.mesh)
    return assignment.by_expert and same_dtype and fits


@register_matmul("hopper", priority=20, by_expert=True, supports=supports)
def product(
    x: Float[Array, "P *I"], weight: Float[Array, "E *O D"] | Packed, assignment: Assignment, transpose: bool
) -> Float[Array, "P *Z"]:
    """Each row times the matrix of its expert, or times the transposed matrix (``registry.Product``)."""
    x, weight = unpack_in_turn(x, weight)
    width, flat = weight.shape[1:-1], weight.reshape(len(weight), -1, weight.shape[-1])
    rows = x.reshape(len(x), -1)
    y = matmul(rows, flat, assignment.group_offsets, assignment.group_sizes, transpose, mesh=assignment.mesh)
    return y if transpose else y.reshape(len(x), *width)


def tiling(rows: int, experts: int, depth: int, columns: int, mesh: Mesh | None = None) -> HopperTiling:
    """Sizes for P rows in all, contracted over ``depth``, and a product with ``columns`` columns; multiples of 64."""
    widths = (256, 192, 128, 64) if rows >= _MANY_ROWS * experts else (128, 192, 64)
    width = next(w for w in widths if columns % w == 0)
    stages = {256: 4, 192: 4, 128: 6, 64: 8}[width]
    # where reading takes longer than multiplying: reading 256 bytes of a row at a time is faster than reading 128 bytes
    # of twice as many rows
    double = width <= 128 and depth % (2 * _SWIZZLED_NUMBERS) == 0
    return HopperTiling(128, width, _SWIZZLED_NUMBERS << double, stages >> double, target(mesh).core_count)


def matmul(
    x: Float[Array, "P A"],
    weight: Float[Array, "E O D"],
    group_offsets: Int[Array, " E"],
    group_sizes: Int[Array, " E"],
    transpose: bool,
    interpret: Any = None,
    mesh: Mesh | None = None,
) -> Float[Array, "P Z"]:
    """Multiply each group of rows by the matrix of its expert.

    Without ``transpose``, A is D and Z is O: ``y[p] = W[e] x[p]``. With it, A is O and Z is D: ``y[p] = W[e]^T x[p]``.
    A batch of ``x`` (``vmap``) is one product, which reads the weights once. Rows without a slot may hold anything.

    Args:
        x: rows by expert.
        weight: the matrices.
        group_offsets: the first row of each group, a multiple of 8.
        group_sizes: the number of rows of each group.
        transpose: multiply by the transposed matrices.
        interpret: parameters of Pallas's interpreter, for tests without a GPU.
        mesh: devices that the program is for.
    """

    # imported late: the import takes a quarter of a second, and only a GPU that takes the kernel needs it
    from moejax.ops.experts.matmul._hopper_kernel import kernel

    def run(x: Array, weight: Array, group_offsets: Array, group_sizes: Array) -> Array:
        depth, columns = weight.shape[1:] if transpose else weight.shape[:0:-1]
        t = tiling(len(x), len(weight), depth, columns, mesh)
        aligned_sizes = -(-group_sizes // ALIGNMENT) * ALIGNMENT
        return kernel(x, weight, tile_table(group_offsets, aligned_sizes, len(x), t.rows), t, transpose, interpret)

    return batch_as_rows(run)(x, weight, group_offsets, group_sizes)
