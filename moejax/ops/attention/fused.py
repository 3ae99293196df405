"""Attention by a kernel that never writes scores to memory, for causal masks with or without a window.

The forward pass of the kernel returns the statistics of the softmax, the logarithm of the sum of exponentials of each
row. Its backward pass computes the pattern from them again, ``exp(scores - statistics)``. Sinks are added to the
statistics: one more term of the sum makes all weights of a row smaller by the same factor, so the output is scaled by
this factor, and the backward pass is the kernel's with the larger statistics.

The kernel does not support padding, and whether there is any is known at run time only. Then attention by blocks takes
over.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from moejax.ops.attention.blocks import in_blocks
from moejax.ops.attention.registry import Options
from moejax.ops.device import compute_capability, target


class Kernel(NamedTuple):
    """Both passes of causal attention without sinks; :data:`moejax.ops.attention.cudnn.CUDNN` outside of tests.

    Attributes:
        forward: ``forward(q, k, v, scale, window)`` returns the output and the statistics [B, H, T].
        backward: ``backward(cotangent, q, k, v, out, statistics, scale, window)`` returns the cotangents of ``q``,
            ``k`` and ``v``, given the output's ``cotangent``.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


class _FusedSettings(NamedTuple):
    scale: float
    window: int | None
    block: int
    kernel: Kernel


def supports(q: Float[Array, "B T H C"], k: Float[Array, "B S G C"], causal: bool) -> bool:
    """Return whether there is a GPU for which cuDNN has a kernel that takes these operands, in both passes."""
    sixteen_bits = q.dtype in (jnp.bfloat16, jnp.float16)
    same_tokens = causal and q.shape[1] == k.shape[1] and q.shape[1] % 2 == 0
    head_fits = q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    return sixteen_bits and same_tokens and head_fits and compute_capability(target()) >= 8


def fused(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G C"],
    mask: Bool[Array, "B T T"] | None,
    sinks: Float[Array, " H"] | None,
    options: Options,
    *,
    kernel: Kernel,
) -> Float[Array, "B T H C"]:
    """Attention by ``kernel``, arguments as in :func:`attention`. Scores are in float32, but never reach memory."""
    unpadded = None if mask is None else (mask == causal_mask(q.shape[1], options.window)).all()
    sinks = sinks if sinks is None else sinks.astype(jnp.float32)
    return _attend(_FusedSettings(options.scale, options.window, options.block, kernel), q, k, v, sinks, mask, unpadded)


def causal_mask(tokens: int, window: int | None) -> Bool[Array, "T T"]:
    """True for the keys that each query sees among the same tokens: the last ``window`` keys up to itself."""
    distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    return (distance >= 0) & (distance < (window or tokens))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _FusedSettings,
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    mask: Array | None,
    unpadded: Array | None,
) -> Array:
    return _forward(settings, q, k, v, sinks, mask, unpadded)[0]


def _forward(settings, q, k, v, sinks, mask, unpadded):
    run = partial(_forward_with_sinks, settings)
    if mask is None:
        out, statistics = run(q, k, v, sinks)
    else:
        blocks = _blocks(settings, mask)
        unused = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
        out, statistics = jax.lax.cond(unpadded, run, lambda *x: (blocks(*x), unused), q, k, v, sinks)
    return out, (q, k, v, sinks, out, statistics, mask, unpadded)


def _backward(settings, saved, cotangent):
    *operands, mask, unpadded = saved
    pull = partial(_backward_with_sinks, settings)
    if mask is None:
        return *pull(cotangent, *operands), None, None

    def pull_blocks(cotangent: Array, q: Array, k: Array, v: Array, sinks: Array | None, *_: Array) -> tuple:
        return jax.vjp(_blocks(settings, mask), q, k, v, sinks)[1](cotangent)

    return *jax.lax.cond(unpadded, pull, pull_blocks, cotangent, *operands), None, None


_attend.defvjp(_forward, _backward)


def _forward_with_sinks(
    settings: _FusedSettings, q: Array, k: Array, v: Array, sinks: Array | None
) -> tuple[Array, Array]:
    """The output, and the statistics with the sinks added."""
    forward = _batched(lambda *x: settings.kernel.forward(*x, settings.scale, settings.window))
    out, statistics = forward(q, k, v)
    if sinks is None:
        return out, statistics
    with_sinks = jnp.logaddexp(statistics, sinks[:, None])
    factor = jnp.exp(statistics - with_sinks).swapaxes(1, 2)[..., None]
    return (out * factor).astype(out.dtype), with_sinks


def _backward_with_sinks(
    settings: _FusedSettings,
    cotangent: Array,
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    out: Array,
    statistics: Array,
) -> tuple[Array, Array, Array, Array | None]:
    backward = _batched(lambda *x: settings.kernel.backward(*x, settings.scale, settings.window))
    dq, dk, dv = backward(cotangent, q, k, v, out, statistics)
    if sinks is None:
        return dq, dk, dv, None
    # the derivative of the softmax for a term whose value is zero
    received = (out.astype(statistics.dtype) * cotangent.astype(statistics.dtype)).sum(-1).swapaxes(1, 2)
    return dq, dk, dv, -(jnp.exp(sinks[:, None] - statistics) * received).sum((0, 2))


def _blocks(settings: _FusedSettings, mask: Array):
    """Attention by blocks as a function of ``q``, ``k``, ``v`` and sinks."""
    options = Options(settings.scale, True, settings.window, settings.block)
    return lambda q, k, v, sinks: in_blocks(q, k, v, mask, sinks, options)


def _batched(function):
    """Let ``vmap`` merge its axis with the batch. The kernel batches all operands or none: shared ones are copied."""
    batching = custom_vmap(function)

    @batching.def_vmap
    def batched(size: int, in_batched: list[bool], *operands: Array) -> tuple:
        each = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(operands, in_batched, strict=True)
        ]
        merged = batching(*(x.reshape(-1, *x.shape[2:]) for x in each))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), merged)
        return results, jax.tree.map(lambda _: True, results)

    return batching
