"""Between routed slots ``[T K]`` and the experts' rows: two copies, each the other's gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.ops.experts.assignment import Assignment, take
from moejax.ops.experts.copies import copies
from moejax.ops.target import in_shard_map, takes_triton


def spread(x: Float[Array, "T KorOne *D"], assignment: Assignment, *, copied: bool = False) -> Float[Array, "P *D"]:
    """A row for each slot; ``x`` has one for each, or one that all slots of a token share (second axis 1).

    ``copied`` rows are used as they are: XLA could not make the copy a part of anything, so that a kernel may do it.
    """
    rows: Array = _spread(copied, x, assignment)
    return rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(copied: bool, x: Array, assignment: Assignment) -> Array:
    tokens, slots = assignment.ids.shape
    if not assignment.by_expert:
        return jnp.broadcast_to(x, (tokens, slots, *x.shape[2:])).reshape(-1, *x.shape[2:])
    share = slots // x.shape[1]
    rows, plain = x.reshape(-1, *x.shape[2:]), lambda rows, slot: take(rows, slot // share)
    if copied and share > 1 and rows.ndim == 2 and rows.size and takes_triton(assignment.mesh) and not in_shard_map():
        # a program for the CPU may be traced where there is a GPU
        return jax.lax.platform_dependent(rows, assignment.slot, cuda=partial(copies, share=share), default=plain)
    return plain(rows, assignment.slot)


def _spread_forward(copied, x, assignment):
    return _spread(copied, x, assignment), (x.shape[1], assignment)


def _spread_backward(_, saved, cotangent):
    width, assignment = saved
    dx = collect(cotangent, assignment)
    return dx.sum(1, keepdims=True) if width == 1 else dx, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def collect(rows: Float[Array, "P *D"], assignment: Assignment) -> Float[Array, "T K *D"]:
    """The row of each slot; zero for slots that go nowhere."""
    tokens, slots = assignment.ids.shape
    if not assignment.by_expert:
        return _somewhere(rows.reshape(tokens, slots, *rows.shape[1:]), assignment)
    return _somewhere(take(rows, assignment.place), assignment)


def _collect_forward(rows, assignment):
    return collect(rows, assignment), assignment


def _collect_backward(assignment, cotangent):
    # outside jit a cotangent may be a numpy array, which cannot be indexed as rows are
    return spread(_somewhere(jnp.asarray(cotangent), assignment), assignment), None


collect.defvjp(_collect_forward, _collect_backward)


def _somewhere(x: Float[Array, "T K *D"], assignment: Assignment) -> Float[Array, "T K *D"]:
    if assignment.complete:
        return x
    goes = assignment.rank >= 0
    return jnp.where(goes.reshape(*goes.shape, *[1] * (x.ndim - 2)), x, 0)
