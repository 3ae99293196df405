"""The attention of every layer: which implementation computes it."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.ops.attention.fused import causal_mask
from moejax.ops.attention.registry import ATTENTIONS, Edges, Options, register_attention

__all__ = ["attention", "block_size", "register_attention"]

_BLOCK_BYTES = 1 << 27
"""Bytes of the float32 scores of one block of queries (128 MiB)."""


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G Cv"],
    mask: Bool[Array, "B T S"] | None,
    *,
    scale: float,
    sinks: Float[Array, " H"] | None = None,
    edges: Edges | None = None,
    causal: bool = False,
    window: int | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> Float[Array, "B T H Cv"]:
    """``softmax(q k^T * scale) v`` for each head; query head ``h`` reads key/value head ``h // (H // G)``.

    Scores and softmax are in float32 whatever the dtype of the inputs. A query that sees no key (padding) yields zeros.

    Args:
        q: queries.
        k: keys.
        v: values, which may have another width than queries and keys.
        mask: True for the keys that each query sees. ``causal`` and ``window`` do not restrict the mask further; they
            only promise something about it. ``None`` for all keys that ``causal`` and ``window`` leave.
        scale: multiplies the scores.
        sinks: one more logit for each head, whose value is zero: it takes part in the softmax and adds nothing.
        edges: multiplies the pattern (the softmax); its cotangent is the relevance of every edge. Or a function that
            returns another pattern.
        causal: queries and keys are the same tokens in order, and no query sees a later one.
        window: with ``causal``, each query sees only the last ``window`` keys up to itself.
        implementation: ``"plain"`` holds all scores in memory and is the reference. ``"blocks"`` holds the scores of
            one block of queries, computes them again in the backward pass, and skips keys that no query of a block
            sees. ``"fused"`` is cuDNN's kernel, for ``causal`` attention in 16 bits on a GPU of compute capability 8.0
            or later. Further names may be registered (:func:`register_attention`). By default ``"plain"`` if there are
            ``edges``, otherwise ``"fused"`` if it supports the operands, otherwise ``"blocks"``.
        block: number of queries of a block. By default all of them if their scores fit 128 MiB; otherwise as many as
            fit, but at least 128.

    Raises:
        MoejaxError: no implementation has this name (a ``ValueError``).
        ValueError: the implementation does not read edges or does not support the operands, or there is no mask without
            ``causal``.
    """
    if implementation is None:
        implementation = _default_implementation(q, k, v, causal, edges is not None)
    entry = ATTENTIONS.find(implementation)
    if edges is not None and not entry.reads_edges:
        raise ValueError(f"implementation={implementation!r} does not read edges; leave it out.")
    if mask is None and not causal:
        raise ValueError("without a mask attention is causal: give causal=True.")
    size = block or block_size(q.shape[1], k.shape[1] * q.shape[0] * q.shape[2])
    if mask is None and not entry.optional_mask:
        mask = jnp.broadcast_to(causal_mask(q.shape[1], window), (q.shape[0], q.shape[1], k.shape[1]))
    return entry.compute(q, k, v, mask, sinks, Options(scale, causal, window, size, edges))


def _default_implementation(q: Array, k: Array, v: Array, causal: bool, has_edges: bool) -> str:
    for name, entry in sorted(ATTENTIONS.items(), key=lambda item: -item[1].priority):
        if (entry.reads_edges or not has_edges) and entry.supports(q, k, v, causal):
            return name
    raise AssertionError("`plain` supports everything")


def block_size(queries: int, scores: int) -> int:
    """Number of queries to take at a time if each has ``scores`` scores: all, or a power of two from 128 on."""
    if 4 * scores * queries <= _BLOCK_BYTES:
        return queries
    return max(128, 1 << max(1, _BLOCK_BYTES // (4 * scores)).bit_length() - 1)
