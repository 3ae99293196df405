"""Relevance rules as their papers write them, in float64 numpy: the output's relevance in, the inputs' out.

Every rule divides by its output, which the library never does; nothing here knows cotangents. One sequence, no batch.
"""

from typing import Any

import numpy as np

Array = np.ndarray


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def taylor_softmax(logits: Array, relevance: Array) -> Array:
    """Taylor expansion of the softmax at its input (AttnLRP Prop. 3.1): ``R_l = l (R_p - p sum R_p)``."""
    return logits * (relevance - softmax(logits) * relevance.sum(-1, keepdims=True))


def linear(x: Array, weight: Array, bias: Array | float, relevance: Array) -> Array:
    """Each input takes its share ``w_ji x_i / y_j`` of every output's relevance; the bias keeps its own."""
    output = x @ weight.T + bias
    return np.einsum("ti,ji,tj->ti", x, weight, relevance / output)


def swiglu(relevance: Array) -> tuple[Array, Array]:
    """Uniform rule on the product, identity rule on the activation: one half each."""
    return relevance / 2, relevance / 2


def attention(q: Array, k: Array, v: Array, relevance: Array, scale: float) -> tuple[Array, Array, Array, float]:
    """Causal grouped attention; relevance of queries, keys and values, and what the softmax loses."""
    heads, groups = q.shape[1], k.shape[1]
    out = [np.zeros_like(a) for a in (q, k, v)]
    lost = 0.0
    for h in range(heads):
        g = h // (heads // groups)
        for t in range(len(q)):
            parts = scale * q[t, h] * k[: t + 1, g]
            scores = parts.sum(-1)
            pattern = softmax(scores)
            products = pattern[:, None] * v[: t + 1, g]
            share = products * relevance[t, h] / products.sum(0)
            # uniform rule: one half to the values, one half to the pattern
            out[2][: t + 1, g] += share / 2
            of_pattern = share.sum(-1) / 2
            of_scores = taylor_softmax(scores, of_pattern)
            lost += of_pattern.sum() - of_scores.sum()
            # the same again for queries and keys
            share = parts * (of_scores / scores)[:, None] / 2
            out[0][t, h] += share.sum(0)
            out[1][: t + 1, g] += share
    return *out, lost


def attention_constant_pattern(q: Array, k: Array, v: Array, relevance: Array, scale: float) -> Array:
    """CP-LRP: the values take everything, in proportion to what they contribute."""
    heads, groups = q.shape[1], k.shape[1]
    out = np.zeros_like(v)
    for h in range(heads):
        g = h // (heads // groups)
        for t in range(len(q)):
            pattern = softmax(scale * k[: t + 1, g] @ q[t, h])
            products = pattern[:, None] * v[: t + 1, g]
            out[: t + 1, g] += products * relevance[t, h] / products.sum(0)
    return out


def mix_uniform(logits: Array, ids: Array, weigh: str, relevance: Array) -> tuple[Array, Array]:
    """Relevance of expert outputs and of router logits for relevance ``[T K D]`` of the weighted outputs.

    One half to each factor. A weight's half goes on through ``w = p / sum p`` (the sum takes, in proportion to each
    term, what the numerators receive in all) and the softmax (over the selected, or over all).
    """
    of_weights = relevance.sum(-1) / 2
    chosen = np.take_along_axis(logits, ids, axis=-1)
    of_logits = np.zeros_like(logits)
    if weigh == "softmax":
        np.put_along_axis(of_logits, ids, taylor_softmax(chosen, of_weights), axis=-1)
        return relevance / 2, of_logits
    if weigh == "renormalised":
        probability = np.take_along_axis(softmax(logits), ids, axis=-1)
        share = probability / probability.sum(-1, keepdims=True)
        of_weights = of_weights - share * of_weights.sum(-1, keepdims=True)
    of_probability = np.zeros_like(logits)
    np.put_along_axis(of_probability, ids, of_weights, axis=-1)
    return relevance / 2, taylor_softmax(logits, of_probability)


def attention_temperature(
    q: Array, k: Array, v: Array, relevance: Array, scale: float, temperature: float
) -> tuple[Array, Array, Array]:
    """GIM: as :func:`attention`, but the softmax's Jacobian is that of ``softmax(scores / temperature)``."""
    heads, groups = q.shape[1], k.shape[1]
    out = [np.zeros_like(a) for a in (q, k, v)]
    for h in range(heads):
        g = h // (heads // groups)
        for t in range(len(q)):
            parts = scale * q[t, h] * k[: t + 1, g]
            scores = parts.sum(-1)
            pattern, flat = softmax(scores), softmax(scores / temperature)
            products = pattern[:, None] * v[: t + 1, g]
            share = products * relevance[t, h] / products.sum(0)
            out[2][: t + 1, g] += share / 2
            slope = share.sum(-1) / 2 / pattern
            of_scores = scores * flat * (slope - flat @ slope)
            share = parts * (of_scores / scores)[:, None] / 2
            out[0][t, h] += share.sum(0)
            out[1][: t + 1, g] += share
    return out[0], out[1], out[2]


def attention_by_size(q: Array, k: Array, v: Array, relevance: Array, scale: float) -> Array:
    """The values take everything, in proportion to the absolute value of what they contribute."""
    heads, groups = q.shape[1], k.shape[1]
    out = np.zeros_like(v)
    for h in range(heads):
        g = h // (heads // groups)
        for t in range(len(q)):
            products = np.abs(softmax(scale * k[: t + 1, g] @ q[t, h])[:, None] * v[: t + 1, g])
            out[: t + 1, g] += products * relevance[t, h] / products.sum(0)
    return out


def by_size(terms: Array, axis: int, relevance: Array) -> Array:
    """Every term of a sum along ``axis`` takes a share in proportion to its absolute value."""
    size = np.abs(terms)
    return size / size.sum(axis, keepdims=True) * np.expand_dims(relevance, axis)


def linear_gamma(x: Array, weight: Array, bias: Array | float, relevance: Array, gamma: float) -> Array:
    """Contributions with the sign of their output count ``1 + gamma`` times; output by output, the bias one of them."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        for j, row in enumerate(weight):
            terms = np.append(row * x[t], np.broadcast_to(bias, len(weight))[j])
            favoured = np.where(terms * terms.sum() > 0, 1 + gamma, 1.0) * terms
            out[t] += (favoured / favoured.sum() * relevance[t, j])[:-1]
    return out


def linear_by_size(
    x: Array, weight: Array, bias: Array | float, relevance: Array, activation: Any = None, tolerance: float = 0.0
) -> Array:
    """Shares by absolute value; with an activation, only on the side of each sum that it sees."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        for j, row in enumerate(weight):
            terms = np.append(row * x[t], np.broadcast_to(bias, len(weight))[j])
            positive, negative = terms.clip(0).sum(), (-terms).clip(0).sum()
            seen = np.ones_like(terms)
            if activation is not None:
                value = activation(positive - negative)

                def equal(part, value=value):
                    return abs(value - activation(part)) <= tolerance * abs(value)

                if positive - negative < -6:
                    seen[terms > 0] = 0
                elif positive > 0 and negative > 0 and equal(positive):
                    seen[terms < 0] = 0
                elif positive > 0 and negative > 0 and equal(-negative):
                    seen[terms > 0] = 0
            size = seen * np.abs(terms)
            out[t] += (size / size.sum() * relevance[t, j])[:-1]
    return out
