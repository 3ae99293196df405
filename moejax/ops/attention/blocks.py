"""Attention by blocks of queries, whose backward pass computes the pattern (the softmax of the scores) again.

The forward pass keeps only the row statistics of the softmax (Dao et al., arXiv 2205.14135). Unlike the kernel of that
paper, the scores of one block are written to memory. The pattern does not depend on the cotangent, so ``vmap`` over
cotangents computes it once for all of them.

Shapes here have one letter beyond the glossary: Q query heads share a key/value head, so H = G Q. In ``einsum`` it is
``r``.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.ops.attention.registry import Options, register_attention

_SPANS = 4
"""Ranges of queries that are compiled at most, beside an incomplete last block. Each is compiled with the keys that it
sees, and loops over its blocks. More spans would skip more edges that no query sees (4 spans skip 3/8 of all edges, 8
spans 7/16), but take longer to compile."""


class KeySpan(NamedTuple):
    """Queries ``start`` to ``stop``, in ``blocks`` equal blocks, and the keys ``low`` to ``high`` that they may see."""

    start: int
    stop: int
    low: int
    high: int
    blocks: int


class _BlockSettings(NamedTuple):
    scale: float
    causal: bool
    window: int | None
    block: int


class _Rows(NamedTuple):
    """Statistics of the softmax of a block: the largest score of each row, and the sum of its exponentials."""

    top: Float[Array, "B G Q T 1"]
    total: Float[Array, "B G Q T 1"]


@register_attention("blocks", priority=20)
def in_blocks(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G Cv"],
    mask: Bool[Array, "B T S"],
    sinks: Float[Array, " H"] | None,
    options: Options,
) -> Float[Array, "B T H Cv"]:
    """Attention that holds the scores of ``options.block`` queries at a time; arguments as in :func:`attention`."""
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    if sinks is not None:
        sinks = sinks.astype(jnp.promote_types(q.dtype, jnp.float32)).reshape(groups, -1)
    grouped = q.reshape(batch, queries, groups, -1, width)
    settings = _BlockSettings(options.scale, options.causal, options.window, options.block)
    out: Array = _attend(settings, grouped, k, v, mask, sinks)
    return out.reshape(batch, queries, heads, v.shape[-1])


def spans(queries: int, keys: int, block: int, causal: bool, window: int | None) -> list[KeySpan]:
    """The ranges of queries that are compiled one by one, with the keys that each may see."""
    # an incomplete last block is a range for itself
    complete = queries // block
    blocks_per_span = max(1, -(-complete // _SPANS))
    edges = [*range(0, complete, blocks_per_span), complete]
    ranges = [(a * block, b * block, b - a) for a, b in pairwise(edges) if a < b]
    if complete * block < queries:
        ranges.append((complete * block, queries, 1))
    if not causal:
        return [KeySpan(a, b, 0, keys, n) for a, b, n in ranges]
    return [KeySpan(a, b, 0 if window is None else max(0, a - window + 1), b, n) for a, b, n in ranges]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _BlockSettings,
    q: Float[Array, "B T G Q C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G Cv"],
    mask: Bool[Array, "B T S"],
    sinks: Float[Array, "G Q"] | None,
) -> Float[Array, "B T G Q Cv"]:
    return _forward(settings, q, k, v, mask, sinks)[0]


def _forward(settings, q, k, v, mask, sinks):
    outs, rows = [], []
    for span in _spans_of(settings, q, k):
        keys, values = k[:, span.low : span.high], v[:, span.low : span.high]

        def one(block: tuple, keys: Array = keys, values: Array = values) -> tuple[Array, _Rows]:
            q, mask = block
            scores = _scores(settings, q, keys, mask)
            rows = _statistics(scores, mask, sinks)
            pattern = jnp.exp(scores - rows.top) / rows.total
            return jnp.einsum("bgrts,bsgc->btgrc", pattern.astype(values.dtype), values), rows

        out, row = _each(one, span, _part(span, q, mask))
        outs.append(out)
        rows.append(row)
    return jnp.concatenate(outs, axis=1), (q, k, v, mask, sinks, rows)


def _backward(settings, saved, cotangent):
    q, k, v, mask, sinks, rows = saved
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    several = len(rows) > 1 or q.shape[1] > settings.block
    # partial sums stay in float32; the product of a single block is rounded once, when it leaves the accumulator
    partial_sums = accumulator if several else q.dtype
    dk, dv = (jnp.zeros(x.shape, partial_sums) for x in (k, v))
    dsinks, dqs = None if sinks is None else jnp.zeros(sinks.shape, accumulator), []
    for span, row in zip(_spans_of(settings, q, k), rows, strict=True):
        keys, values = k[:, span.low : span.high], v[:, span.low : span.high]

        def one(block: tuple, keys: Array = keys, values: Array = values) -> tuple[Array, tuple]:
            q, mask, c, rows = block
            return _one_backward(settings, (q, keys, values, mask, sinks, rows), c, partial_sums)

        dq, (dk_part, dv_part, dsinks_part) = _sum_each(one, span, (*_part(span, q, mask, cotangent), row))
        dqs.append(dq)
        dk = dk.at[:, span.low : span.high].add(dk_part) if several else dk_part
        dv = dv.at[:, span.low : span.high].add(dv_part) if several else dv_part
        dsinks = None if dsinks is None else dsinks + dsinks_part
    return jnp.concatenate(dqs, axis=1), dk.astype(k.dtype), dv.astype(v.dtype), None, dsinks


_attend.defvjp(_forward, _backward)


def _one_backward(settings: _BlockSettings, saved: tuple, c: Array, partial_sums: jnp.dtype) -> tuple[Array, tuple]:
    """``dq`` of one block, and its parts of ``dk``, ``dv`` and ``dsinks``; ``c`` is the output's cotangent."""
    q, k, v, mask, sinks, rows = saved
    pattern = jnp.exp(_scores(settings, q, k, mask) - rows.top) / rows.total
    narrow = pattern.astype(v.dtype)
    # for each target these two are the largest arrays, hence in 16 bits; the products accumulate in float32 all the
    # same
    through = jnp.einsum("btgrc,bsgc->bgrts", c, v)
    mean = (pattern * through).sum(-1, keepdims=True)
    scores = (pattern * (through - mean) * settings.scale).astype(q.dtype)
    dq = jnp.einsum("bgrts,bsgc->btgrc", scores, k)
    dk = jnp.einsum("bgrts,btgrc->bsgc", scores, q, preferred_element_type=partial_sums)
    dv = jnp.einsum("bgrts,btgrc->bsgc", narrow, c, preferred_element_type=partial_sums)
    if sinks is None:
        return dq, (dk, dv, None)
    sink_pattern = jnp.exp(sinks[:, :, None, None] - rows.top) / rows.total
    return dq, (dk, dv, -(sink_pattern * mean).sum((0, 3, 4)))


def _scores(settings: _BlockSettings, q: Array, k: Array, mask: Array) -> Float[Array, "B G Q T S"]:
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btgrc,bsgc->bgrts", q, k, preferred_element_type=accumulator) * settings.scale
    return jnp.where(mask[:, None, None], scores, jnp.finfo(accumulator).min)


def _statistics(scores: Array, mask: Array, sinks: Array | None) -> _Rows:
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks[:, :, None, None])
    total = jnp.exp(scores - top).sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks[:, :, None, None] - top)
    # an infinite sum makes the pattern of a query that sees nothing zero
    return _Rows(top, jnp.where(mask.any(-1)[:, None, None, :, None], total, jnp.inf))


def _spans_of(settings: _BlockSettings, q: Array, k: Array) -> list[KeySpan]:
    return spans(q.shape[1], k.shape[1], settings.block, settings.causal, settings.window)


def _part(span: KeySpan, q: Array, mask: Array, *rest: Array) -> tuple[Array, ...]:
    """The queries of the span, their part of the mask, and their rows of all further arrays."""
    rows = slice(span.start, span.stop)
    return (q[:, rows], mask[:, rows, span.low : span.high], *(x[:, rows] for x in rest))


def _each(one, span: KeySpan, operands: tuple) -> tuple[Array, _Rows]:
    """Apply ``one`` to every block, and join the outputs; the statistics keep an axis of blocks."""
    if span.blocks == 1:
        return one(operands)
    out, rows = jax.lax.map(one, tuple(_split_blocks(x, span.blocks) for x in operands))
    return _join_blocks(out), rows


def _sum_each(one, span: KeySpan, operands: tuple) -> tuple[Array, tuple]:
    """Apply ``one`` to every block; join the first results, and sum the others over blocks."""
    if span.blocks == 1:
        return one(operands)
    *arrays, rows = operands
    blocks = (*(_split_blocks(x, span.blocks) for x in arrays), rows)

    def step(total: tuple, block: tuple) -> tuple[tuple, Array]:
        first, rest = one(block)
        return jax.tree.map(jnp.add, total, rest), first

    shapes = jax.eval_shape(lambda b: one(jax.tree.map(lambda x: x[0], b))[1], blocks)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, first = jax.lax.scan(step, zeros, blocks)
    return _join_blocks(first), total


def _split_blocks(x: Array, blocks: int) -> Array:
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, -1, *x.shape[2:]), 1, 0)


def _join_blocks(x: Array) -> Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
