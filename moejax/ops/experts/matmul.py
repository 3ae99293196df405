"""``y[t, k] = W[ids[t, k]] @ x[t, k]``: implementations, their choice, and the gradient as the transposed product."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moejax.ops.experts.assignment import Assignment
from moejax.ops.experts.exchange import over_devices
from moejax.ops.mxfp4 import MXFP4

Implementation = Literal["gather", "padded"]


def expert_matmul(
    x: Float[Array, "T KorOne D"],
    weight: Float[Array, "E *M D"] | MXFP4,
    assignment: Assignment,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "T K *M"]:
    """Multiply each routed slot by its expert's matrix; no slot is dropped here, zero for slots that go nowhere.

    Differentiable in ``x`` (the transposed grouped product) and ``weight``; ``vmap`` over cotangents reads the weights
    once.

    Args:
        x: a row for each slot, or one row that all slots of a token share (second axis 1).
        weight: one matrix for each expert, ``[out, in]``. The outputs may have several axes; merging them beforehand
            would make XLA move weights of which one of them is split over devices. Packed matrices are unpacked
            here: those of one layer at a time, or, where slots copy their matrices, of the slots' experts alone.
        assignment: the expert of each slot.
        implementation: ``"gather"`` copies each slot's matrix, the plain reference and right for decoding;
            ``"padded"`` multiplies equal buffers of rows in one batched product. Chosen from the shapes by default.

    Raises:
        ValueError: unknown implementation.
    """
    tokens, slots = assignment.ids.shape
    if implementation is None:
        implementation = "gather" if tokens * slots <= weight.shape[0] // 2 else "padded"
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; choose from {sorted(_IMPLEMENTATIONS)}.")
    return _expert_matmul(implementation, False, x, weight, assignment)


def capacities(tokens: int, slots: int, experts: int) -> list[int]:
    """Buffer rows per expert to choose from at run time: up to all tokens (no load is larger) or 8 times the mean."""
    mean = tokens * slots / experts
    return sorted({min(tokens, math.ceil(factor * mean / 16) * 16) for factor in (1.5, 2.5, 8)})


def _gather(x: Array, weight: Array | MXFP4, assignment: Assignment, transpose: bool) -> Array:
    m = _outputs(weight)
    spec = f"tk{m},tk{m}d->tkd" if transpose else f"tkd,tk{m}d->tk{m}"
    rows = jnp.broadcast_to(x, (*assignment.ids.shape, *x.shape[2:]))
    return jnp.einsum(spec, *_unpacked_in_turn(rows, weight[assignment.ids]))


def _padded(x: Array, packed: Array | MXFP4, assignment: Assignment, transpose: bool) -> Array:
    x, weight = _unpacked_in_turn(x, packed)
    m, slots = _outputs(weight), assignment.ids.shape[1]
    spec = f"ec{m},e{m}d->ecd" if transpose else f"ecd,e{m}d->ec{m}"
    width = weight.shape[-1:] if transpose else weight.shape[1:-1]

    def one_pass(capacity: int, x: Array, weight: Array, rows: Array, rank: Array) -> Array:
        # rows of empty places are zero, not masked: their products are computed and never read
        product = jnp.einsum(spec, _fill(x, rows, slots), weight).reshape(-1, *width)
        return _take(product, assignment.ids * capacity + rank)

    def passes(capacity: int, x: Array, weight: Array) -> Array:
        def add(i: Array, y: Array) -> Array:
            rank = assignment.rank - i * capacity
            inside = (rank >= 0) & (rank < capacity)
            part = one_pass(
                capacity, x, weight, _places(assignment, rank, capacity, empty=0), rank.clip(0, capacity - 1)
            )
            return jnp.where(inside.reshape(*inside.shape, *[1] * len(width)), part, y)

        start = jnp.zeros((*assignment.ids.shape, *width), x.dtype)
        return jax.lax.fori_loop(0, -(-assignment.load.max() // capacity), add, start)

    def single(capacity: int, x: Array, weight: Array) -> Array:
        rows = _places(assignment, assignment.rank, capacity, empty=0)
        return one_pass(capacity, x, weight, rows, jnp.maximum(assignment.rank, 0))

    return _by_capacity(single, passes, assignment, x, weight)


def _unpacked_in_turn(x: Array, weight: Array | MXFP4) -> tuple[Array, Array]:
    """``x``, and the matrices in its dtype, unpacked no earlier than ``x`` is there and for this product alone.

    Otherwise XLA unpacks all layers at once, or keeps what the forward pass unpacked for the backward pass.
    """
    if not isinstance(weight, MXFP4):
        return x, weight
    x, packed = jax.lax.optimization_barrier((x, weight))
    return x, packed.unpack(x.dtype)


def _weight_gradient(transpose: bool, x: Array, cotangent: Array, weight: Array, assignment: Assignment) -> Array:
    """``sum over an expert's slots of cotangent x^T``. Dead code, and removed as such, when weights are not trained."""
    m, (tokens, slots) = _outputs(weight), assignment.ids.shape
    spec = f"ec{m},ecd->e{m}d" if transpose else f"ecd,ec{m}->e{m}d"

    def single(capacity: int, x: Array, cotangent: Array, rank: Array = assignment.rank) -> Array:
        rows = _places(assignment, rank, capacity, empty=tokens * slots)
        return jnp.einsum(spec, _fill(x, rows, slots, zeros=True), _fill(cotangent, rows, slots, zeros=True))

    def passes(capacity: int, x: Array, cotangent: Array) -> Array:
        add = lambda i, total: total + single(capacity, x, cotangent, assignment.rank - i * capacity)  # noqa: E731
        return jax.lax.fori_loop(0, -(-assignment.load.max() // capacity), add, jnp.zeros(weight.shape, x.dtype))

    return _by_capacity(single, passes, assignment, x, cotangent).astype(weight.dtype)


def _by_capacity(
    single: Callable[..., Array], passes: Callable[..., Array], assignment: Assignment, *operands: Array
) -> Array:
    """Run ``single`` with the smallest capacity that holds the largest load; several passes if none does."""
    tokens, slots = assignment.ids.shape
    steps = capacities(tokens, slots, assignment.load.shape[0])
    branches = [partial(single, capacity) for capacity in steps]
    if steps[-1] < tokens:
        branches.append(partial(passes, steps[-1]))
    if len(branches) == 1:
        return branches[0](*operands)
    branch = (assignment.load.max() > jnp.array(steps[: len(branches) - 1])).sum()
    return jax.lax.switch(branch, branches, *operands)


def _places(assignment: Assignment, rank: Array, capacity: int, empty: int) -> Int[Array, "E C"]:
    """The slot (row of flattened ``[T K]``) at each place of the experts' buffers; ``empty`` where there is none."""
    tokens, slots = assignment.ids.shape
    rows = jnp.arange(tokens * slots, dtype=jnp.int32).reshape(tokens, slots)
    buffers = jnp.full((assignment.load.shape[0], capacity), empty, jnp.int32)
    # a negative rank would wrap around
    rank = jnp.where(rank < 0, capacity, rank)
    return buffers.at[assignment.ids, rank].set(rows, mode="drop", unique_indices=True)


def _fill(x: Float[Array, "T KorOne *D"], rows: Int[Array, "E C"], slots: int, zeros: bool = False) -> Array:
    """The rows of ``x`` at the places of the buffers, ``[E C *D]``; with ``zeros``, zero at empty places."""
    index = rows // (slots // x.shape[1])
    flat = x.reshape(-1, *x.shape[2:])
    return flat.at[index].get(mode="fill", fill_value=0) if zeros else _take(flat, index)


def _take(x: Float[Array, "N *D"], index: Int[Array, "*s"]) -> Array:
    # unsigned and promised: no wrapping, no clamping, no masking around a plain row copy
    return x.at[index.astype(jnp.uint32)].get(mode="promise_in_bounds")


def _outputs(weight: Float[Array, "E *M D"] | MXFP4) -> str:
    """A letter for each axis of an expert's outputs."""
    return "mno"[: weight.ndim - 2]


_IMPLEMENTATIONS = {"gather": _gather, "padded": _padded}


def _multiply(name: Implementation, transpose: bool, x: Array, weight: Array | MXFP4, assignment: Assignment) -> Array:
    y = _IMPLEMENTATIONS[name](x, weight, assignment, transpose)
    if assignment.complete:
        return y
    return jnp.where((assignment.rank >= 0).reshape(*assignment.rank.shape, *[1] * (y.ndim - 2)), y, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_matmul(
    name: Implementation, transpose: bool, x: ArrayLike, weight: Array | MXFP4, assignment: Assignment
) -> Array:
    run = partial(_multiply, name, transpose)
    x = jnp.asarray(x)
    return run(x, weight, assignment) if assignment.mesh is None else over_devices(run, (x,), assignment, weight)


def _forward(name, transpose, x, weight, assignment):
    return _expert_matmul(name, transpose, x, weight, assignment), (x, weight, assignment)


def _backward(name, transpose, saved, cotangent):
    x, weight, assignment = saved
    # outside jit a cotangent may be a numpy array, which cannot be indexed as the products do
    cotangent = jnp.asarray(cotangent)
    dx: Array = _expert_matmul(name, not transpose, cotangent, weight, assignment)
    if x.shape[1] == 1:
        dx = dx.sum(1, keepdims=True)
    packed = isinstance(weight, MXFP4)  # cannot be trained
    if packed:
        return dx, None, None
    gradient = partial(_weight_gradient, transpose)
    if assignment.mesh is None:
        return dx, gradient(x, cotangent, weight, assignment), None
    return dx, over_devices(gradient, (x, cotangent), assignment, weight, split=True), None


_expert_matmul.defvjp(_forward, _backward)
