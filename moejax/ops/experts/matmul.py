"""``y[p] = W[expert[p]] @ x[p]``: implementations, their choice, and the gradient as the transposed product."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moejax.ops.experts import hopper, packed
from moejax.ops.experts.assignment import Assignment, take
from moejax.ops.mxfp4 import MXFP4, unpacked_in_turn

Implementation = Literal["gather", "padded", "hopper", "packed"]


def grouped_matmul(
    x: Float[Array, "P D"],
    weight: Float[Array, "E *M D"] | MXFP4,
    assignment: Assignment,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "P *M"]:
    """Multiply each row by its expert's matrix; no row is dropped here. Rows without a slot yield anything.

    Differentiable in ``x`` (the transposed grouped product) and ``weight``; ``vmap`` over cotangents reads the weights
    once.

    Args:
        x: rows in the order of ``assignment``.
        weight: one matrix for each expert, ``[out, in]``. The outputs may have several axes; merging them beforehand
            would make XLA move weights of which one of them is split over devices. All but ``"packed"`` unpack
            packed matrices first: those of one layer at a time, or, where rows copy their matrices, of the rows'
            experts alone.
        assignment: the expert of each row.
        implementation: ``"gather"`` copies each row's matrix, the plain reference and right for decoding, for rows
            ordered as the slots are; the next are for rows by expert: ``"padded"`` multiplies equal buffers of rows
            in one batched product, ``"hopper"`` is a kernel for the GPUs of that name, whose time does not depend on
            how uneven the loads are. ``"packed"``, for rows in either order, is a kernel for NVIDIA GPUs that unpacks
            as it multiplies. By default what fits.

    Raises:
        ValueError: unknown implementation, or one for rows in another order or for other matrices.
    """
    if implementation is None:
        implementation = _fitting(x, weight, assignment)
    if implementation not in get_args(Implementation):
        known = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation={implementation!r} is unknown; choose from {known}.")
    if implementation == "packed" and not isinstance(weight, MXFP4):
        raise ValueError(f"implementation='packed' is for matrices kept in MXFP4, not in {weight.dtype}.")
    if implementation != "packed" and (implementation == "gather") == assignment.by_expert:
        raise ValueError(f"implementation={implementation!r} is not for rows with by_expert={assignment.by_expert}.")
    return _grouped_matmul(implementation, False, x, weight, assignment)


def _fitting(x: Array, weight: Array | MXFP4, assignment: Assignment) -> Implementation:
    if packed.fits(x, weight, assignment):
        return "packed"
    if not assignment.by_expert:
        return "gather"
    return "hopper" if hopper.fits(x, weight, assignment) else "padded"


def capacities(tokens: int, slots: int, experts: int) -> list[int]:
    """Buffer rows per expert to choose from at run time: up to all tokens (no load is larger) or 8 times the mean."""
    mean = tokens * slots / experts
    return sorted({min(tokens, math.ceil(factor * mean / 16) * 16) for factor in (1.5, 2.5, 8)})


def _gather(x: Array, weight: Array | MXFP4, assignment: Assignment, transpose: bool) -> Array:
    # products and their sum, which XLA reads the matrices for where they are; as a matmul it copies them first
    x, weight = unpacked_in_turn(x, weight[assignment.ids.ravel()])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    outputs = tuple(range(1, weight.ndim - 1))
    terms = jnp.expand_dims(x, -1 if transpose else outputs).astype(wide) * weight.astype(wide)
    return terms.sum(outputs if transpose else -1).astype(x.dtype)


def _hopper(x: Array, weight: Array | MXFP4, assignment: Assignment, transpose: bool) -> Array:
    x, weight = unpacked_in_turn(x, weight)
    width, flat = weight.shape[1:-1], weight.reshape(len(weight), -1, weight.shape[-1])
    rows = x.reshape(len(x), -1)
    y = hopper.matmul(rows, flat, assignment.first, assignment.load, transpose, mesh=assignment.mesh)
    return y if transpose else y.reshape(len(x), *width)


def _packed(x: Array, weight: Array | MXFP4, assignment: Assignment, transpose: bool) -> Array:
    assert isinstance(weight, MXFP4)
    width, flat, mesh = weight.shape[1:-1], weight.flat(), assignment.mesh
    rows = x.reshape(len(x), -1)
    if assignment.by_expert:
        y = packed.matmul(rows, flat, None, assignment.first, assignment.load, transpose, mesh=mesh)
    else:
        # every slot is a group, empty if it goes nowhere
        held = jnp.ones(len(x), bool) if assignment.complete else assignment.rank.ravel() >= 0
        place = jnp.arange(len(x), dtype=jnp.int32)
        y = packed.matmul(rows, flat, assignment.ids.ravel(), place, held.astype(jnp.int32), transpose, mesh=mesh)
    return y if transpose else y.reshape(len(x), *width)


def _padded(x: Array, weight: Array | MXFP4, assignment: Assignment, transpose: bool) -> Array:
    x, weight = unpacked_in_turn(x, weight)
    m, expert = _outputs(weight), jnp.minimum(assignment.expert, len(weight) - 1)
    spec = f"ec{m},e{m}d->ecd" if transpose else f"ecd,e{m}d->ec{m}"
    width = weight.shape[-1:] if transpose else weight.shape[1:-1]
    rank = jnp.arange(len(x), dtype=jnp.int32) - take(assignment.first, expert)

    def one_pass(capacity: int, x: Array, weight: Array, start: Array | int) -> Array:
        # what stands in places beyond an expert's load is multiplied too, and never read
        product = jnp.einsum(spec, take(x, _places(assignment, capacity, start)), weight).reshape(-1, *width)
        return take(product.astype(x.dtype), expert * capacity + (rank - start).clip(0, capacity - 1))

    def passes(capacity: int, x: Array, weight: Array) -> Array:
        def add(i: Array, y: Array) -> Array:
            here = (rank >= i * capacity).reshape(-1, *[1] * len(width))
            return jnp.where(here, one_pass(capacity, x, weight, i * capacity), y)

        start = jnp.zeros((len(x), *width), x.dtype)
        return jax.lax.fori_loop(0, -(-assignment.load.max() // capacity), add, start)

    single = lambda capacity, x, weight: one_pass(capacity, x, weight, 0)
    return _by_capacity(single, passes, assignment, x, weight)


def _weight_gradient(transpose: bool, x: Array, cotangent: Array, weight: Array, assignment: Assignment) -> Array:
    """``sum over an expert's rows of cotangent x^T``. Dead code, and removed as such, when weights are not trained."""
    m = _outputs(weight)
    if not assignment.by_expert:
        spec = f"pe,p{m},pd->e{m}d" if transpose else f"pe,pd,p{m}->e{m}d"
        goes = (assignment.ids[..., None] == jnp.arange(len(weight))) & (assignment.rank >= 0)[..., None]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        operands = (a.astype(wide) for a in (goes.reshape(len(x), -1), x, cotangent))
        return jnp.einsum(spec, *operands).astype(weight.dtype)
    spec = f"ec{m},ecd->e{m}d" if transpose else f"ecd,ec{m}->e{m}d"

    def single(capacity: int, x: Array, cotangent: Array, start: Array | int = 0) -> Array:
        places = _places(assignment, capacity, start)
        held = start + jnp.arange(capacity) < assignment.load[:, None]
        fill = lambda rows: jnp.where(held.reshape(*held.shape, *[1] * (rows.ndim - 1)), take(rows, places), 0)
        return jnp.einsum(spec, fill(x), fill(cotangent))

    def passes(capacity: int, x: Array, cotangent: Array) -> Array:
        add = lambda i, total: total + single(capacity, x, cotangent, i * capacity)
        return jax.lax.fori_loop(0, -(-assignment.load.max() // capacity), add, jnp.zeros(weight.shape, x.dtype))

    return _by_capacity(single, passes, assignment, x, cotangent).astype(weight.dtype)


def _by_capacity(
    single: Callable[..., Array], passes: Callable[..., Array], assignment: Assignment, *operands: Array
) -> Array:
    """Run ``single`` with the smallest capacity that holds the largest load; several passes if none does."""
    tokens, slots = assignment.ids.shape
    steps = capacities(tokens, slots, len(assignment.load))
    branches = [partial(single, capacity) for capacity in steps]
    if steps[-1] < tokens:
        branches.append(partial(passes, steps[-1]))
    if len(branches) == 1:
        return branches[0](*operands)
    branch = (assignment.load.max() > jnp.array(steps[: len(branches) - 1])).sum()
    return jax.lax.switch(branch, branches, *operands)


def _places(assignment: Assignment, capacity: int, start: Array | int) -> Int[Array, "E C"]:
    """The row at each place of the experts' buffers, each expert's from its row ``start`` on."""
    rows = assignment.first[:, None] + start + jnp.arange(capacity, dtype=jnp.int32)
    return jnp.minimum(rows, len(assignment.slot) - 1)


def _outputs(weight: Float[Array, "E *M D"] | MXFP4) -> str:
    """A letter for each axis of an expert's outputs."""
    return "mno"[: weight.ndim - 2]


_IMPLEMENTATIONS = {"gather": _gather, "padded": _padded, "hopper": _hopper, "packed": _packed}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(
    name: Implementation, transpose: bool, x: ArrayLike, weight: Array | MXFP4, assignment: Assignment
) -> Array:
    return _IMPLEMENTATIONS[name](jnp.asarray(x), weight, assignment, transpose)


def _forward(name, transpose, *primals):
    trained = any(p.perturbed for p in jax.tree.leaves(primals[1]))
    x, weight, assignment = jax.tree.map(lambda p: p.value, primals)
    # packed weights cannot be trained
    kept = x if trained and not isinstance(weight, MXFP4) else None
    return _grouped_matmul(name, transpose, x, weight, assignment), (kept, weight, assignment)


def _backward(name, transpose, saved, cotangent):
    x, weight, assignment = saved
    dx: Array = _grouped_matmul(name, not transpose, cotangent, weight, assignment)
    if x is None:
        return dx, None, None
    return dx, _weight_gradient(transpose, x, jnp.asarray(cotangent), weight, assignment), None


_grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
