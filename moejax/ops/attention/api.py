"""The attention of every layer: which implementation computes it."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.ops.attention.blocks import in_blocks
from moejax.ops.attention.cudnn import AVAILABLE, CUDNN
from moejax.ops.attention.fused import fits, fused, in_sight
from moejax.ops.attention.plain import plain

Implementation = Literal["plain", "blocks", "fused"]

_BLOCK_BYTES = 1 << 27
"""Of the float32 scores of one block of queries."""


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G C"],
    mask: Bool[Array, "B T S"] | None,
    *,
    scale: float,
    sinks: Float[Array, " H"] | None = None,
    edges: Float[Array, "B H T S"] | None = None,
    causal: bool = False,
    window: int | None = None,
    implementation: Implementation | None = None,
    block: int | None = None,
) -> Float[Array, "B T H C"]:
    """``softmax(q k^T * scale) v`` for each head; query head ``h`` reads key/value head ``h // (H // G)``.

    A sink is one more logit of each head, whose value is zero: it takes part in the softmax and adds nothing. Scores
    and softmax are in float32 whatever the inputs' dtype. A query that may see no key (padding) yields zeros.

    Args:
        mask: the keys that each query may see; what follows only promises something about it. ``None`` for all that
            ``causal`` and ``window`` leave.
        edges: multiplies the pattern; its cotangent is the relevance of every edge.
        causal: queries and keys are the same tokens in order, and no query sees a later one.
        window: of ``causal`` keys, each query sees none but the last ``window``.
        implementation: ``"plain"`` holds all scores, the reference; ``"blocks"`` those of one block of queries,
            computes them again on the way back, and skips keys that no query of a block may see; ``"fused"`` is
            cuDNN's kernel, for ``causal`` attention in 16 bits on a GPU from compute capability 8. By default fused
            where that can be, else blocks, but plain where ``edges`` are read.
        block: queries of a block; by default all where their scores fit 128 MiB, else as many as fit, but 128.

    Raises:
        ValueError: unknown implementation, or edges with one that does not read them.
    """
    if implementation is None:
        implementation = "plain" if edges is not None else "fused" if AVAILABLE and fits(q, k, causal) else "blocks"
    if implementation not in get_args(Implementation):
        known = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation={implementation!r} is unknown; choose from {known}.")
    if edges is not None and implementation != "plain":
        raise ValueError(f"implementation={implementation!r} does not read edges; leave it out.")
    if mask is None and not causal:
        raise ValueError("without a mask attention is causal: give causal=True.")
    size = block or block_size(q.shape[1], k.shape[1] * q.shape[0] * q.shape[2])
    if implementation == "fused":
        if not causal or not AVAILABLE:
            why = "is not in this version of JAX" if causal else "is for causal attention"
            raise ValueError(f"implementation='fused' {why}; leave it out.")
        return fused(q, k, v, mask, sinks, scale=scale, window=window, block=size, kernel=CUDNN)
    if mask is None:
        mask = jnp.broadcast_to(in_sight(q.shape[1], window), (q.shape[0], q.shape[1], k.shape[1]))
    if implementation == "plain":
        return plain(q, k, v, mask, scale=scale, sinks=sinks, edges=edges)
    return in_blocks(q, k, v, mask, sinks, scale=scale, causal=causal, window=window, block=size)


def block_size(queries: int, scores: int) -> int:
    """How many queries to take at a time, each with that many ``scores``: a power of two, 128 or more, or all."""
    if 4 * scores * queries <= _BLOCK_BYTES:
        return queries
    return max(128, 1 << max(1, _BLOCK_BYTES // (4 * scores)).bit_length() - 1)
