"""The grouped matmul with matrices in MXFP4, a quarter of the bytes of bfloat16: which of three ways multiplies them.

========================================  ============================================================================
rows                                      what multiplies
========================================  ============================================================================
by expert, 2048 or more a group on        :mod:`~moejax.ops.experts.matmul.hopper`, after matrices are unpacked once
average, on a Hopper GPU
by expert, 96 or more, on a Hopper GPU    :mod:`~moejax.ops.experts.matmul.mxfp4_hopper`, unpacks in registers
all others, from compute capability 8     :mod:`~moejax.ops.experts.matmul.mxfp4_triton`, unpacks in registers
========================================  ============================================================================

Sizes of tiles: ``_HEIGHTS`` in ``mxfp4_hopper``, ``tiling`` in the two others.

These are not implementations that a user chooses, because the number of rows is not known when one is chosen: ``vmap``
over cotangents multiplies it.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Int

from moejax.ops.device import only_experts_split, takes_triton
from moejax.ops.experts.dispatch.assignment import Assignment
from moejax.ops.experts.matmul import hopper, mxfp4_hopper, mxfp4_triton
from moejax.ops.experts.matmul.registry import register_matmul
from moejax.ops.experts.matmul.tile_table import batch_as_rows
from moejax.ops.mxfp4 import MXFP4
from moejax.ops.packed import Packed, unpack_in_turn

_MANY_ROWS = 2048
"""Mean rows of a group from which on unpacking the matrices once takes less time than unpacking them in every tile."""


def supports(x: Float[Array, "P D"], weight: Float[Array, "E *O D"] | Packed, assignment: Assignment) -> bool:
    """Return whether there is a GPU for one of the kernels, and it takes these operands for both products."""
    if not isinstance(weight, MXFP4) or x.dtype != jnp.bfloat16 or not only_experts_split(assignment.mesh):
        return False
    sizes = len(x), math.prod(weight.shape[1:-1]), weight.shape[-1]
    if assignment.by_expert and mxfp4_hopper.supports_shapes(*sizes, assignment.mesh):
        return True
    # the Triton kernel counts offsets in 32 bits
    small = math.prod(weight.shape) // 2 < 2**31
    return small and takes_triton(assignment.mesh)


@register_matmul("packed", priority=30, packed_format=MXFP4, supports=supports)
def product(
    x: Float[Array, "P *I"], weight: Float[Array, "E *O D"] | Packed, assignment: Assignment, transpose: bool
) -> Float[Array, "P *Z"]:
    """Each row times the matrix of its expert, or times the transposed matrix (``registry.Product``)."""
    assert isinstance(weight, MXFP4)
    width, flat, mesh = weight.shape[1:-1], weight.flat(), assignment.mesh
    rows = x.reshape(len(x), -1)
    if assignment.by_expert:
        y = matmul(rows, flat, None, assignment.group_offsets, assignment.group_sizes, transpose, mesh=mesh)
    else:
        # each slot is a group of its own, which is empty for unassigned slots
        assigned = jnp.ones(len(x), bool) if assignment.complete else assignment.rank_in_expert.ravel() >= 0
        row = jnp.arange(len(x), dtype=jnp.int32)
        y = matmul(rows, flat, assignment.ids.ravel(), row, assigned.astype(jnp.int32), transpose, mesh=mesh)
    return y if transpose else y.reshape(len(x), *width)


def matmul(
    x: BFloat16[Array, "P A"],
    weight: MXFP4,
    expert: Int[Array, " U"] | None,
    group_offsets: Int[Array, " U"],
    group_sizes: Int[Array, " U"],
    transpose: bool,
    interpret: bool = False,
    mesh: Mesh | None = None,
) -> BFloat16[Array, "P Z"]:
    """Multiply each of U groups of rows by the matrix of an expert; a batch of ``x`` (``vmap``) is one product.

    Without ``transpose``, A is D and Z is O: ``y[p] = W[e] x[p]``. With it, A is O and Z is D: ``y[p] = W[e]^T x[p]``.
    Rows without a group may hold anything.

    Args:
        x: rows, group by group.
        weight: matrices of shape ``[E, O, D]``.
        expert: the expert of each group; ``None`` if there is one group for each expert, in their order. Only then
            kernels for Hopper GPUs take the product.
        group_offsets: the first row of each group, a multiple of 8 if ``expert`` is ``None``.
        group_sizes: the number of rows of each group.
        transpose: multiply by the transposed matrices.
        interpret: use the Triton kernel and run it in Pallas's interpreter, for tests without a GPU.
        mesh: devices that the program is for.
    """
    run = partial(_fastest, transpose=transpose, interpret=interpret, mesh=mesh)
    return batch_as_rows(run)(x, (weight, expert), group_offsets, group_sizes)


def _fastest(
    x: Array,
    weights: tuple[MXFP4, Array | None],
    group_offsets: Array,
    group_sizes: Array,
    *,
    transpose: bool,
    interpret: bool,
    mesh: Mesh | None,
) -> Array:
    weight, expert = weights
    groups, (_, m, d) = (group_offsets, group_sizes), weight.shape
    many = expert is None and len(x) >= _MANY_ROWS * len(group_sizes)
    if many and hopper.supports_shapes(x.dtype.itemsize, m, d, mesh=mesh):
        x, unpacked = unpack_in_turn(x, weight)
        return hopper.matmul(x, unpacked, *groups, transpose, mesh=mesh)
    if expert is None and not interpret and mxfp4_hopper.supports_shapes(len(x), m, d, mesh):
        return mxfp4_hopper.matmul(x, weight, *groups, transpose, mesh)
    return mxfp4_triton.matmul(x, weight, expert, *groups, transpose, interpret)
