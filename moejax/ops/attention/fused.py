"""Attention by a kernel that never writes the scores, for what it computes exactly: whole causal or windowed rows.

The kernel's forward pass returns the softmax's statistics, the logarithm of each row's sum of exponentials, and its
backward pass makes the pattern from them again, ``exp(scores - statistics)``. A sink enters there: one more term of the
sum makes every weight of the row smaller by one factor, so that outputs are scaled by it, and the backward pass is that
of the same kernel with the larger statistics.

Padding is only known at run time; where there is any, attention by blocks takes over.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from moejax.ops.attention.blocks import in_blocks
from moejax.ops.device import generation, target


class Kernel(NamedTuple):
    """Causal attention without sinks, both ways; :data:`moejax.ops.attention.cudnn.CUDNN` outside of tests.

    Attributes:
        forward: of ``q, k, v, scale, window`` the output and the statistics [B H T].
        backward: of the output's cotangent, ``q, k, v``, output, statistics, ``scale`` and ``window`` the cotangents of
            ``q``, ``k`` and ``v``.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


class _Settings(NamedTuple):
    scale: float
    window: int | None
    block: int
    kernel: Kernel


def fits(q: Float[Array, "B T H C"], k: Float[Array, "B S G C"], causal: bool) -> bool:
    """Whether there is a GPU for which cuDNN has a kernel that takes these operands, both ways."""
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    whole = causal and q.shape[1] == k.shape[1] and q.shape[1] % 2 == 0
    shaped = q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    return narrow and whole and shaped and generation(target()) >= 8


def fused(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G C"],
    mask: Bool[Array, "B T T"] | None,
    sinks: Float[Array, " H"] | None,
    *,
    scale: float,
    window: int | None,
    block: int,
    kernel: Kernel,
) -> Float[Array, "B T H C"]:
    """Attention, arguments as in :func:`attention`. Scores are in float32 here too, but never reach memory."""
    whole = None if mask is None else (mask == in_sight(q.shape[1], window)).all()
    sinks = sinks if sinks is None else sinks.astype(jnp.float32)
    return _attend(_Settings(scale, window, block, kernel), q, k, v, sinks, mask, whole)


def in_sight(tokens: int, window: int | None) -> Bool[Array, "T T"]:
    """The keys that each query sees of the same tokens: none later, none but the last ``window``."""
    back = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    return (back >= 0) & (back < (window or tokens))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _Settings,
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    mask: Array | None,
    whole: Array | None,
) -> Array:
    return _forward(settings, q, k, v, sinks, mask, whole)[0]


def _forward(settings, q, k, v, sinks, mask, whole):
    run = partial(_sunk, settings)
    if mask is None:
        out, statistics = run(q, k, v, sinks)
    else:
        blocks = _blocks(settings, mask)
        unused = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
        out, statistics = jax.lax.cond(whole, run, lambda *x: (blocks(*x), unused), q, k, v, sinks)
    return out, (q, k, v, sinks, out, statistics, mask, whole)


def _backward(settings, saved, cotangent):
    *operands, mask, whole = saved
    pulled = partial(_pulled, settings)
    if mask is None:
        return *pulled(cotangent, *operands), None, None

    def of_blocks(cotangent: Array, q: Array, k: Array, v: Array, sinks: Array | None, *_: Array) -> tuple:
        return jax.vjp(_blocks(settings, mask), q, k, v, sinks)[1](cotangent)

    return *jax.lax.cond(whole, pulled, of_blocks, cotangent, *operands), None, None


_attend.defvjp(_forward, _backward)


def _sunk(settings: _Settings, q: Array, k: Array, v: Array, sinks: Array | None) -> tuple[Array, Array]:
    """Output and statistics, the sinks' part in them."""
    forward = _together(lambda *x: settings.kernel.forward(*x, settings.scale, settings.window))
    out, statistics = forward(q, k, v)
    if sinks is None:
        return out, statistics
    sunk = jnp.logaddexp(statistics, sinks[:, None])
    share = jnp.exp(statistics - sunk).swapaxes(1, 2)[..., None]
    return (out * share).astype(out.dtype), sunk


def _pulled(
    settings: _Settings, cotangent: Array, q: Array, k: Array, v: Array, sinks: Array | None, out: Array, sunk: Array
) -> tuple[Array, Array, Array, Array | None]:
    backward = _together(lambda *x: settings.kernel.backward(*x, settings.scale, settings.window))
    dq, dk, dv = backward(cotangent, q, k, v, out, sunk)
    if sinks is None:
        return dq, dk, dv, None
    # the softmax's derivative at a term whose value is zero
    received = (out.astype(sunk.dtype) * cotangent.astype(sunk.dtype)).sum(-1).swapaxes(1, 2)
    return dq, dk, dv, -(jnp.exp(sinks[:, None] - sunk) * received).sum((0, 2))


def _blocks(settings: _Settings, mask: Array):
    s = settings
    return lambda q, k, v, sinks: in_blocks(
        q, k, v, mask, sinks, scale=s.scale, causal=True, window=s.window, block=s.block
    )


def _together(function):
    """``function`` of arrays with a batch axis. The kernel batches its operands all or not at all: ``vmap`` copies."""
    batching = custom_vmap(function)

    @batching.def_vmap
    def batched(size: int, in_batched: list[bool], *operands: Array) -> tuple:
        each = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(operands, in_batched, strict=True)
        ]
        found = batching(*(x.reshape(-1, *x.shape[2:]) for x in each))
        parted = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), found)
        return parted, jax.tree.map(lambda _: True, parted)

    return batching
