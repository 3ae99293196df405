"""Attention by blocks of queries, whose backward pass computes the pattern again.

Only the row statistics of the softmax are kept from the forward pass (Dao et al., arXiv 2205.14135, whose kernel this
is not: scores of one block do reach memory). The pattern does not depend on the cotangent, so ``vmap`` over cotangents
computes it once for all of them.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_SPANS = 4
"""So many ranges of queries, and an incomplete one, are compiled at most, each with the keys that it sees; longer ones
loop over blocks. More would skip more of what no query sees (4: 3/8 of all edges, 8: 7/16) and compile longer."""


class Span(NamedTuple):
    """Queries ``start`` to ``stop`` in ``blocks`` equal blocks, and the keys ``low`` to ``high`` that they may see."""

    start: int
    stop: int
    low: int
    high: int
    blocks: int


class _Settings(NamedTuple):
    scale: float
    causal: bool
    window: int | None
    block: int


class _Rows(NamedTuple):
    """A block's softmax: largest score and sum of exponentials of each row."""

    top: Float[Array, "B G R T 1"]
    total: Float[Array, "B G R T 1"]


def in_blocks(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G C"],
    mask: Bool[Array, "B T S"],
    sinks: Float[Array, " H"] | None,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    block: int,
) -> Float[Array, "B T H C"]:
    """Attention, arguments as in :func:`attention`; never more than the scores of ``block`` queries at a time."""
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    if sinks is not None:
        sinks = sinks.astype(jnp.promote_types(q.dtype, jnp.float32)).reshape(groups, -1)
    grouped = q.reshape(batch, queries, groups, -1, width)
    out: Array = _attend(_Settings(scale, causal, window, block), grouped, k, v, mask, sinks)
    return out.reshape(batch, queries, heads, width)


def spans(queries: int, keys: int, block: int, causal: bool, window: int | None) -> list[Span]:
    """The ranges of queries that are compiled one by one."""
    # an incomplete last block is a range of its own
    whole = queries // block
    each = max(1, -(-whole // _SPANS))
    edges = [*range(0, whole, each), whole]
    ranges = [(a * block, b * block, b - a) for a, b in pairwise(edges) if a < b]
    if whole * block < queries:
        ranges.append((whole * block, queries, 1))
    if not causal:
        return [Span(a, b, 0, keys, n) for a, b, n in ranges]
    return [Span(a, b, 0 if window is None else max(0, a - window + 1), b, n) for a, b, n in ranges]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _Settings,
    q: Float[Array, "B T G R C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G C"],
    mask: Bool[Array, "B T S"],
    sinks: Float[Array, "G R"] | None,
) -> Float[Array, "B T G R C"]:
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
    wide = jnp.promote_types(q.dtype, jnp.float32)
    several = len(rows) > 1 or q.shape[1] > settings.block
    # partial sums stay wide; a single block's product is rounded once, as it leaves the accumulator
    kept = wide if several else q.dtype
    dk, dv = (jnp.zeros(x.shape, kept) for x in (k, v))
    dsinks, dqs = None if sinks is None else jnp.zeros(sinks.shape, wide), []
    for span, row in zip(_spans_of(settings, q, k), rows, strict=True):
        keys, values = k[:, span.low : span.high], v[:, span.low : span.high]

        def one(block: tuple, keys: Array = keys, values: Array = values) -> tuple[Array, tuple]:
            q, mask, c, rows = block
            return _one_backward(settings, (q, keys, values, mask, sinks, rows), c, kept)

        dq, (dk_part, dv_part, dsinks_part) = _sum_each(one, span, (*_part(span, q, mask, cotangent), row))
        dqs.append(dq)
        dk = dk.at[:, span.low : span.high].add(dk_part) if several else dk_part
        dv = dv.at[:, span.low : span.high].add(dv_part) if several else dv_part
        dsinks = None if dsinks is None else dsinks + dsinks_part
    return jnp.concatenate(dqs, axis=1), dk.astype(k.dtype), dv.astype(v.dtype), None, dsinks


_attend.defvjp(_forward, _backward)


def _one_backward(settings: _Settings, saved: tuple, c: Array, partial_sums: jnp.dtype) -> tuple[Array, tuple]:
    """``dq`` of one block, and its parts of ``dk``, ``dv`` and ``dsinks``."""
    q, k, v, mask, sinks, rows = saved
    pattern = jnp.exp(_scores(settings, q, k, mask) - rows.top) / rows.total
    narrow = pattern.astype(v.dtype)
    # per target these two are the largest arrays, hence narrow; both products accumulate in float32 all the same
    through = jnp.einsum("btgrc,bsgc->bgrts", c, v)
    mean = (pattern * through).sum(-1, keepdims=True)
    scores = (pattern * (through - mean) * settings.scale).astype(q.dtype)
    dq = jnp.einsum("bgrts,bsgc->btgrc", scores, k)
    dk = jnp.einsum("bgrts,btgrc->bsgc", scores, q, preferred_element_type=partial_sums)
    dv = jnp.einsum("bgrts,btgrc->bsgc", narrow, c, preferred_element_type=partial_sums)
    if sinks is None:
        return dq, (dk, dv, None)
    of_sink = jnp.exp(sinks[:, :, None, None] - rows.top) / rows.total
    return dq, (dk, dv, -(of_sink * mean).sum((0, 3, 4)))


def _scores(settings: _Settings, q: Array, k: Array, mask: Array) -> Float[Array, "B G R T S"]:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btgrc,bsgc->bgrts", q, k, preferred_element_type=wide) * settings.scale
    return jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)


def _statistics(scores: Array, mask: Array, sinks: Array | None) -> _Rows:
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks[:, :, None, None])
    total = jnp.exp(scores - top).sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks[:, :, None, None] - top)
    # the pattern of a query that sees nothing is zero
    return _Rows(top, jnp.where(mask.any(-1)[:, None, None, :, None], total, jnp.inf))


def _spans_of(settings: _Settings, q: Array, k: Array) -> list[Span]:
    return spans(q.shape[1], k.shape[1], settings.block, settings.causal, settings.window)


def _part(span: Span, q: Array, mask: Array, *rest: Array) -> tuple[Array, ...]:
    """The span's queries, their part of the mask, and their rows of the rest."""
    rows = slice(span.start, span.stop)
    return (q[:, rows], mask[:, rows, span.low : span.high], *(x[:, rows] for x in rest))


def _each(one, span: Span, operands: tuple) -> tuple[Array, _Rows]:
    """``one`` of every block; the rows' statistics stay by block."""
    if span.blocks == 1:
        return one(operands)
    out, rows = jax.lax.map(one, tuple(_by_block(x, span.blocks) for x in operands))
    return _joined(out), rows


def _sum_each(one, span: Span, operands: tuple) -> tuple[Array, tuple]:
    """The first result of every block, and the sum of the others."""
    if span.blocks == 1:
        return one(operands)
    *arrays, rows = operands
    blocks = (*(_by_block(x, span.blocks) for x in arrays), rows)

    def step(total: tuple, block: tuple) -> tuple[tuple, Array]:
        first, rest = one(block)
        return jax.tree.map(jnp.add, total, rest), first

    shapes = jax.eval_shape(lambda b: one(jax.tree.map(lambda x: x[0], b))[1], blocks)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, first = jax.lax.scan(step, zeros, blocks)
    return _joined(first), total


def _by_block(x: Array, blocks: int) -> Array:
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, -1, *x.shape[2:]), 1, 0)


def _joined(x: Array) -> Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
