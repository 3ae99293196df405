"""The grouped matmul ``y[p] = W[expert of p] x[p]``: which implementation computes it, and its gradient.

A *slot* is one of the K choices of a token, a *row* is a line of the matrix ``x`` here, and a *group* is the range of
rows of one expert. With T = 3 tokens, K = 2 slots each, E = 4 experts and widths D and O::

    ids = [[2, 0], [2, 3], [0, 2]]                expert of each slot
    assignment = assign(ids, 4)                   groups: rows 0-1, none, rows 16-18, row 24
    x = permute(tokens[:, None], assignment)      [32, D]   dispatch: copy each token to the rows of its slots
    y = grouped_matmul(x, weight, assignment)     [32, O]   weight is [4, O, D]
    slots = unpermute(y, assignment)              [3, 2, O]
    output = (slots * routing_weights).sum(1)     [3, O]    combine

    x          weight       y
    rows 0-1   W[0]         rows 0-1   = x[0:2] W[0]^T
    -          W[1]         -            expert 1 has no rows
    rows 16-18 W[2]         rows 16-18 = x[16:19] W[2]^T
    row 24     W[3]         row 24     = x[24:25] W[3]^T

All other rows of ``y`` may hold anything (:mod:`moejax.ops.experts.dispatch.assignment` draws the rows one by one).
``jax.lax.ragged_dot`` computes the same from ``group_sizes`` for rows without gaps.

The gradient in ``x`` is the same product with transposed matrices, so each implementation computes both. The gradient
in the weights, needed in training alone, is computed by plain code beside ``gather`` and ``padded``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from moejax.ops.experts.dispatch.assignment import Assignment
from moejax.ops.experts.matmul import gather, padded
from moejax.ops.experts.matmul.registry import MATMULS, register_matmul
from moejax.ops.packed import Packed

__all__ = ["grouped_matmul", "register_matmul"]


def grouped_matmul(
    x: Float[Array, "P D"],
    weight: Float[Array, "E *O D"] | Packed,
    assignment: Assignment,
    *,
    implementation: str | None = None,
) -> Float[Array, "P *O"]:
    """Multiply each row by the matrix of its expert. Rows without a slot yield anything; no slot is dropped.

    Differentiable in ``x`` (by the transposed product) and in ``weight``. ``vmap`` over cotangents reads the weights
    once.

    Args:
        x: rows in the order of ``assignment``.
        weight: one matrix for each expert, ``[out, in]``. The outputs may have several axes: if they were merged
            beforehand and one of them is split over devices, XLA would move weights between devices. All
            implementations but ``"packed"`` unpack packed matrices first, one layer at a time (``"gather"``: the rows'
            experts alone).
        assignment: the expert of each row.
        implementation: ``"gather"`` copies the matrix of each row. It is the plain reference, best for decoding, and
            takes rows that are ordered as the slots are. ``"padded"`` takes rows by expert and multiplies equal buffers
            of rows in one batched product. ``"hopper"`` takes rows by expert and is a kernel for NVIDIA's Hopper GPUs,
            whose time does not depend on how uneven the groups are. ``"packed"`` takes rows in either order and
            matrices in MXFP4, which kernels for NVIDIA GPUs unpack while they multiply. Further names may be registered
            (:func:`register_matmul`). By default the implementation of highest priority that supports the operands.

    Raises:
        MoejaxError: no implementation has this name (a ``ValueError``).
        ValueError: the implementation is for rows in another order or for other matrices.
    """
    if implementation is None:
        implementation = _default_implementation(x, weight, assignment)
    entry = MATMULS.find(implementation)
    if (needed := entry.packed_format) is not None and not isinstance(weight, needed):
        have = type(weight).__name__ if isinstance(weight, Packed) else weight.dtype
        raise ValueError(f"implementation={implementation!r} is for matrices kept in {needed.__name__}, not in {have}.")
    if not entry.accepts(weight, assignment):
        raise ValueError(f"implementation={implementation!r} is not for rows with by_expert={assignment.by_expert}.")
    return _grouped_matmul(implementation, False, x, weight, assignment)


def _default_implementation(x: Array, weight: Array | Packed, assignment: Assignment) -> str:
    for name, entry in sorted(MATMULS.items(), key=lambda item: -item[1].priority):
        if entry.accepts(weight, assignment) and entry.supports(x, weight, assignment):
            return name
    raise AssertionError("`gather` and `padded` support everything")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@jax.named_scope("grouped_matmul")
def _grouped_matmul(name: str, transpose: bool, x: ArrayLike, weight: Array | Packed, assignment: Assignment) -> Array:
    return MATMULS[name].product(jnp.asarray(x), weight, assignment, transpose)


def _forward(name, transpose, *primals):
    trained = any(p.perturbed for p in jax.tree.leaves(primals[1]))
    x, weight, assignment = jax.tree.map(lambda p: p.value, primals)
    # packed weights cannot be trained
    saved_x = x if trained and not isinstance(weight, Packed) else None
    return _grouped_matmul(name, transpose, x, weight, assignment), (saved_x, weight, assignment)


def _backward(name, transpose, saved, cotangent):
    x, weight, assignment = saved
    dx: Array = _grouped_matmul(name, not transpose, cotangent, weight, assignment)
    if x is None:
        return dx, None, None
    return dx, _weight_gradient(transpose, x, jnp.asarray(cotangent), weight, assignment), None


_grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _weight_gradient(transpose: bool, x: Array, cotangent: Array, weight: Array, assignment: Assignment) -> Array:
    """The sum over an expert's rows of ``cotangent x^T``, whichever implementation computed the product."""
    module = padded if assignment.by_expert else gather
    return module.weight_gradient(transpose, x, cotangent, weight, assignment)
