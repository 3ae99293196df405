"""Between routed slots ``[T K]`` and the experts' rows: two copies, each the other's gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.ops.device import in_shard_map, takes_triton
from moejax.ops.experts.assignment import Assignment, take
from moejax.ops.experts.copies import copies


def permute(x: Float[Array, "T KorOne *D"], assignment: Assignment, *, copied: bool = False) -> Float[Array, "P *D"]:
    """A row for each slot; ``x`` has one for each, or one that all slots of a token share (second axis 1).

    ``copied`` rows are used as they are: XLA could not make the copy a part of anything, so that a kernel may do it.
    """
    rows: Array = _permute(copied, x, assignment)
    return rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _permute(copied: bool, x: Array, assignment: Assignment) -> Array:
    tokens, slots = assignment.ids.shape
    if not assignment.by_expert:
        return jnp.broadcast_to(x, (tokens, slots, *x.shape[2:])).reshape(-1, *x.shape[2:])
    share = slots // x.shape[1]
    rows, plain = x.reshape(-1, *x.shape[2:]), lambda rows, slot: take(rows, slot // share)
    if copied and share > 1 and rows.ndim == 2 and rows.size and takes_triton(assignment.mesh) and not in_shard_map():
        # a program for the CPU may be traced where there is a GPU
        return jax.lax.platform_dependent(rows, assignment.slot, cuda=partial(copies, share=share), default=plain)
    return plain(rows, assignment.slot)


def _permute_forward(copied, x, assignment):
    return _permute(copied, x, assignment), (x.shape[1], assignment)


def _permute_backward(_, saved, cotangent):
    width, assignment = saved
    dx = unpermute(cotangent, assignment)
    return dx.sum(1, keepdims=True) if width == 1 else dx, None


_permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def unpermute(rows: Float[Array, "P *D"], assignment: Assignment) -> Float[Array, "T K *D"]:
    """The row of each slot; zero for slots that go nowhere."""
    tokens, slots = assignment.ids.shape
    if not assignment.by_expert:
        return _somewhere(rows.reshape(tokens, slots, *rows.shape[1:]), assignment)
    return _somewhere(take(rows, assignment.place), assignment)


def _unpermute_forward(rows, assignment):
    return unpermute(rows, assignment), assignment


def _unpermute_backward(assignment, cotangent):
    # outside jit a cotangent may be a numpy array, which cannot be indexed as rows are
    return permute(_somewhere(jnp.asarray(cotangent), assignment), assignment), None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _somewhere(x: Float[Array, "T K *D"], assignment: Assignment) -> Float[Array, "T K *D"]:
    if assignment.complete:
        return x
    goes = assignment.rank >= 0
    return jnp.where(goes.reshape(*goes.shape, *[1] * (x.ndim - 2)), x, 0)
