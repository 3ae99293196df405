"""Copy routed slots ``[T, K]`` to the experts' rows ``[P]`` and back: two gathers, each the gradient of the other."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.ops.device import in_shard_map, takes_triton
from moejax.ops.experts.dispatch.assignment import Assignment, take
from moejax.ops.experts.dispatch.gather_rows import gather_rows


def permute(x: Float[Array, "T KorOne *D"], assignment: Assignment, *, copied: bool = False) -> Float[Array, "P *D"]:
    """Dispatch: the entry of ``x`` for the slot of each row.

    Rows without a slot hold a copy of some slot's entry. Nothing that is computed from them reaches a slot.

    Args:
        x: one entry for each slot, or one entry for each token that all its slots share (second axis 1).
        copied: True if the rows are used as they are, in a kernel that XLA cannot fuse the copy into. Then a GPU kernel
            may do the copy (:mod:`moejax.ops.experts.dispatch.gather_rows`).
    """
    rows: Array = _permute(copied, x, assignment)
    return rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.named_scope("dispatch")
def _permute(copied: bool, x: Array, assignment: Assignment) -> Array:
    tokens, slots = assignment.ids.shape
    if not assignment.by_expert:
        return jnp.broadcast_to(x, (tokens, slots, *x.shape[2:])).reshape(-1, *x.shape[2:])
    slots_per_row = slots // x.shape[1]
    rows, plain = x.reshape(-1, *x.shape[2:]), lambda rows, slot: take(rows, slot // slots_per_row)
    suits_kernel = copied and slots_per_row > 1 and rows.ndim == 2 and rows.size
    if suits_kernel and takes_triton(assignment.mesh) and not in_shard_map():
        kernel = partial(gather_rows, slots_per_row=slots_per_row)
        # a program for the CPU may be traced on a machine with a GPU
        return jax.lax.platform_dependent(rows, assignment.row_to_slot, cuda=kernel, default=plain)
    return plain(rows, assignment.row_to_slot)


def _permute_forward(copied, x, assignment):
    return _permute(copied, x, assignment), (x.shape[1], assignment)


def _permute_backward(_, saved, cotangent):
    width, assignment = saved
    dx = unpermute(cotangent, assignment)
    return dx.sum(1, keepdims=True) if width == 1 else dx, None


_permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
@jax.named_scope("combine")
def unpermute(rows: Float[Array, "P *D"], assignment: Assignment) -> Float[Array, "T K *D"]:
    """The row of each slot; zero for unassigned slots."""
    tokens, slots = assignment.ids.shape
    if not assignment.by_expert:
        return _zero_unassigned(rows.reshape(tokens, slots, *rows.shape[1:]), assignment)
    return _zero_unassigned(take(rows, assignment.slot_to_row), assignment)


def _unpermute_forward(rows, assignment):
    return unpermute(rows, assignment), assignment


def _unpermute_backward(assignment, cotangent):
    # outside of jit a cotangent may be a numpy array, which has no `.at`
    return permute(_zero_unassigned(jnp.asarray(cotangent), assignment), assignment), None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _zero_unassigned(x: Float[Array, "T K *D"], assignment: Assignment) -> Float[Array, "T K *D"]:
    if assignment.complete:
        return x
    assigned = assignment.rank_in_expert >= 0
    return jnp.where(assigned.reshape(*assigned.shape, *[1] * (x.ndim - 2)), x, 0)
