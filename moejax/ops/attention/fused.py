"""cuDNN's fused attention, for the part that it computes exactly: whole causal or windowed rows, no sinks, no edges.

Padding is only known at run time; where there is any, attention by blocks takes over.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from moejax.ops.attention.blocks import in_blocks
from moejax.ops.target import target

Kernel = Literal["cudnn", "xla"]
"""Who computes ``jax.nn.dot_product_attention``; ``"xla"`` only to test what is written here without a GPU."""


def fits(q: Float[Array, "B T H C"], k: Float[Array, "B S G C"], causal: bool, sinks: Array | None) -> bool:
    """Whether there is a GPU and the kernel takes these operands, both ways."""
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    whole = causal and q.shape[1] == k.shape[1] and q.shape[1] % 2 == 0
    shaped = q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    return sinks is None and narrow and whole and shaped and target().platform == "gpu"


def fused(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G C"],
    mask: Bool[Array, "B T T"] | None,
    *,
    scale: float,
    window: int | None,
    block: int,
    kernel: Kernel = "cudnn",
) -> Float[Array, "B T H C"]:
    """Attention, arguments as in :func:`attention`. Scores are in float32 here too, but never reach memory."""
    whole = None if mask is None else (mask == in_sight(q.shape[1], window)).all()
    return _attend((scale, window, block, kernel), q, k, v, mask, whole)


def in_sight(tokens: int, window: int | None) -> Bool[Array, "T T"]:
    """The keys that each query sees of the same tokens: none later, none but the last ``window``."""
    back = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    return (back >= 0) & (back < (window or tokens))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: tuple, q: Array, k: Array, v: Array, mask: Array | None, whole: Array | None) -> Array:
    if mask is None:
        return _together(partial(_kernel, settings))(q, k, v)
    return jax.lax.cond(whole, _together(partial(_kernel, settings)), _blocks(settings, mask), q, k, v)


def _forward(settings, q, k, v, mask, whole):
    return _attend(settings, q, k, v, mask, whole), (q, k, v, mask, whole)


def _backward(settings, saved, cotangent):
    q, k, v, mask, whole = saved
    if mask is None:
        return *_pulled(settings)(cotangent, q, k, v), None, None
    of_blocks = lambda c, *x: jax.vjp(_blocks(settings, mask), *x)[1](c)  # noqa: E731
    dq, dk, dv = jax.lax.cond(whole, _pulled(settings), of_blocks, cotangent, q, k, v)
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _kernel(settings: tuple, q: Array, k: Array, v: Array) -> Array:
    scale, window, _, kernel = settings
    sight = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=sight, implementation=kernel
    )


def _blocks(settings: tuple, mask: Array):
    scale, window, block, _ = settings
    return lambda q, k, v: in_blocks(q, k, v, mask, None, scale=scale, causal=True, window=window, block=block)


def _pulled(settings: tuple):
    return _together(lambda c, *operands: jax.vjp(partial(_kernel, settings), *operands)[1](c))


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
