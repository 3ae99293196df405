"""A whole decoder in float64 numpy: its forward pass, and relevance propagated back through it rule by rule.

Written from the papers' equations. Relevance is passed in its explicit form: every step takes relevance of outputs
and returns relevance of inputs in proportion to what each contributed, dividing by the output. No cotangents, no
automatic differentiation, no batch. Only the rotary angles are taken as given, since they are float32 by definition.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

Array = np.ndarray


def wide(x: Any) -> Array:
    return np.asarray(x, np.float64)


def share(parts: Array | float, output: Array, relevance: Array) -> Array:
    """``parts / output * relevance``; an output that is switched off has no relevance to share."""
    safe = np.where(output == 0, 1.0, output)
    return parts * np.where(output == 0, 0.0, relevance / safe)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def projections(attention: Any) -> "list[Affine]":
    """Queries, keys and values, from the weight ``[G, R + 2, C, D]`` in which those of a group stand together."""
    weight, bias = attention.query_key_value.weight, attention.query_key_value.bias
    bias = np.zeros(weight.shape[:-1]) if bias is None else bias
    parts = slice(None, -2), slice(-2, -1), slice(-1, None)
    return [Affine(wide(weight[:, p]).reshape(-1, weight.shape[-1]), wide(bias[:, p]).reshape(-1)) for p in parts]


class Affine(NamedTuple):
    """``y = W x + b``."""

    weight: Array
    bias: Array

    @classmethod
    def of(cls, linear: Any) -> "Affine":
        weight = wide(linear.weight)
        return cls(weight, np.zeros(len(weight)) if linear.bias is None else wide(linear.bias))

    def forward(self, x: Array) -> Array:
        return x @ self.weight.T + self.bias

    def backward(self, x: Array, relevance: Array) -> tuple[Array, float]:
        """Relevance of ``x``, and what the bias keeps."""
        per_output = share(1.0, self.forward(x), relevance)
        return x * (per_output @ self.weight), float((per_output * self.bias).sum())


def rms_norm(x: Array, norm: Any) -> Array:
    return wide(norm.weight) * x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps)


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    half = x.shape[-1] // 2
    cosine, sine = cosine[:, None], sine[:, None]
    return np.concatenate(
        [
            x[..., :half] * cosine[..., :half] - x[..., half:] * sine[..., :half],
            x[..., half:] * cosine[..., half:] + x[..., :half] * sine[..., half:],
        ],
        axis=-1,
    )


def rotate_back(x: Array, cosine: Array, sine: Array, relevance: Array) -> Array:
    """Each rotated number is a sum of two terms, which share its relevance."""
    half = x.shape[-1] // 2
    output = rotate(x, cosine, sine)
    cosine, sine = cosine[:, None], sine[:, None]
    first, second = x[..., :half], x[..., half:]
    out = share(x * cosine, output, relevance)
    out[..., half:] += share(-second * sine[..., :half], output[..., :half], relevance[..., :half])
    out[..., :half] += share(first * sine[..., half:], output[..., half:], relevance[..., half:])
    return out


@dataclass
class Edits:
    """What is left out of a forward pass: terms of its sums, by index."""

    experts: set[tuple[int, int, int]] = field(default_factory=set)  # layer, token, expert
    heads: set[tuple[int, int, int]] = field(default_factory=set)  # layer, token, head
    tokens: set[tuple[int, int]] = field(default_factory=set)  # layer, token
    # experts left out in another way: the others' weights keep the sum; the next best takes the place
    renormalised: set[tuple[int, int, int]] = field(default_factory=set)
    replaced: set[tuple[int, int, int]] = field(default_factory=set)


class Layer:
    """One layer's forward pass, kept for the way back."""

    def __init__(self, block: Any, index: int, x: Array, angles: tuple[Array, Array], edits: Edits) -> None:
        self.block, self.index, self.angles, self.edits = block, index, angles, edits
        self.x = x
        self._attend(rms_norm(x, block.attention_norm))
        self.middle = x + self.attended
        self._mix(rms_norm(self.middle, block.feed_forward_norm))
        self.out = self.middle + self.mixed

    def _attend(self, x: Array) -> None:
        layer, c = self.block.attention, self.block.attention.config
        self.attention_in = x
        q, k, v = (affine.forward(x) for affine in projections(layer))
        if layer.query_norm is not None:
            q, k = rms_norm(q, layer.query_norm), rms_norm(k, layer.key_norm)
        if c.clip is not None:
            q, k, v = (np.minimum(np.maximum(a, -c.clip), c.clip) for a in (q, k, v))
        self.q, self.k, self.v = (a.reshape(len(x), -1, c.head_dim) for a in (q, k, v))
        self.q_turned, self.k_turned = rotate(self.q, *self.angles), rotate(self.k, *self.angles)
        self.heads = np.zeros_like(self.q)
        for t in range(len(x)):
            for h in range(c.num_heads):
                if (self.index, t, h) not in self.edits.heads:
                    _, pattern, values = self._cell(t, h)
                    self.heads[t, h] = pattern @ values
        self.attended = Affine.of(layer.output).forward(self.heads.reshape(len(x), -1))

    def _cell(self, t: int, h: int) -> tuple[Array, Array, Array]:
        """Terms of the scores of one query and head, its pattern, and the values it sees."""
        c = self.block.attention.config
        g = h // (c.num_heads // c.num_kv_heads)
        terms = self.q_turned[t, h] * self.k_turned[: t + 1, g] / np.sqrt(c.head_dim)
        return terms, softmax(terms.sum(-1)), self.v[: t + 1, g]

    def _mix(self, x: Array) -> None:
        moe, c = self.block.feed_forward, self.block.config.feed_forward
        self.moe_in = x
        self.logits = Affine.of(moe.router).forward(x)
        self.probability = softmax(self.logits)
        self.ids = np.array([self._best(t, row)[: c.router.num_selected] for t, row in enumerate(self.logits)])
        self.weights = np.take_along_axis(self.probability, self.ids, axis=-1)
        if c.router.weigh == "renormalised":
            self.weights = self.weights / self.weights.sum(-1, keepdims=True)
        for t, row in enumerate(self.ids):
            gone = [(self.index, t, e) in self.edits.renormalised for e in row]
            if any(gone) and not all(gone):
                kept = np.where(gone, 0, self.weights[t])
                self.weights[t] = kept / kept.sum() * self.weights[t].sum()
        self.terms = np.zeros((len(x), c.router.num_selected, c.model_dim))
        for t, row in enumerate(self.ids):
            for slot, e in enumerate(row):
                if (self.index, t, e) not in self.edits.experts:
                    self.terms[t, slot] = self.weights[t, slot] * (wide(moe.experts.down[e]) @ self._hidden(t, e)[2])
        self.mixed = self.terms.sum(1)

    def _best(self, t: int, logits: Array) -> list[int]:
        return sorted(range(len(logits)), key=lambda e: ((self.index, t, e) in self.edits.replaced, -logits[e]))

    def _hidden(self, t: int, e: int) -> tuple[Array, Array, Array]:
        gate, up = (wide(m) @ self.moe_in[t] for m in self.block.feed_forward.experts.gate_up[e])
        return gate, up, gate / (1 + np.exp(-gate)) * up

    # ---- the way back ------------------------------------------------------------------------------------------

    def backward(self, relevance: Array, *, pattern: str, router: str) -> Array:
        """Relevance of this layer's input for that of its output; keeps that of experts and heads, and every loss."""
        self.lost = {"softmax": 0.0, "router": 0.0, "bias": 0.0}
        branch = share(self.mixed, self.out, relevance)
        self.relevance_of_mixed = branch
        relevance = share(self.middle, self.out, relevance) + self._back_through_experts(branch, router)
        branch = share(self.attended, self.middle, relevance)
        return share(self.x, self.middle, relevance) + self._back_through_attention(branch, pattern)

    def _back_through_experts(self, relevance: Array, router: str) -> Array:
        """The norm below takes all that this returns: identity rule."""
        moe, x = self.block.feed_forward, self.moe_in
        terms = share(self.terms, self.mixed[:, None], relevance[:, None])
        self.experts = terms.sum(-1)
        of_outputs = terms if router == "constant" else terms / 2
        out = np.zeros_like(x)
        for t, row in enumerate(self.ids):
            for slot, e in enumerate(row):
                gate, up, hidden = self._hidden(t, e)
                down = wide(moe.experts.down[e])
                of_hidden = hidden * (share(1.0, down @ hidden, of_outputs[t, slot]) @ down)
                for matrix, output in zip(wide(moe.experts.gate_up[e]), (gate, up), strict=True):
                    out[t] += x[t] * (share(0.5, output, of_hidden) @ matrix)
        if router == "uniform":
            of_logits = self._back_through_weights(self.experts / 2)
            self.lost["router"] += self.experts.sum() / 2 - of_logits.sum()
            of_x, bias = Affine.of(moe.router).backward(x, of_logits)
            self.lost["bias"] += bias
            out += of_x
        return out

    def _back_through_weights(self, relevance: Array) -> Array:
        if self.block.feed_forward.router.config.weigh == "renormalised":
            relevance = relevance - self.weights * relevance.sum(-1, keepdims=True)
        of_probability = np.zeros_like(self.logits)
        np.put_along_axis(of_probability, self.ids, relevance, axis=-1)
        return self.logits * (of_probability - self.probability * of_probability.sum(-1, keepdims=True))

    def _back_through_attention(self, relevance: Array, pattern: str) -> Array:
        layer, c, x = self.block.attention, self.block.attention.config, self.attention_in
        flat, bias = Affine.of(layer.output).backward(self.heads.reshape(len(x), -1), relevance)
        self.lost["bias"] += bias
        of_heads = flat.reshape(self.heads.shape)
        self.head_relevance = of_heads.sum(-1)
        of_q, of_k, of_v = np.zeros_like(self.q), np.zeros_like(self.k), np.zeros_like(self.v)
        for t in range(len(x)):
            for h in range(c.num_heads):
                g = h // (c.num_heads // c.num_kv_heads)
                terms, weights, values = self._cell(t, h)
                products = share(weights[:, None] * values, self.heads[t, h], of_heads[t, h])
                if pattern == "constant":
                    of_v[: t + 1, g] += products
                    continue
                of_v[: t + 1, g] += products / 2
                of_weights = products.sum(-1) / 2
                scores = terms.sum(-1)
                of_scores = scores * (of_weights - weights * of_weights.sum())
                self.lost["softmax"] += of_weights.sum() - of_scores.sum()
                of_terms = share(terms, scores[:, None], of_scores[:, None]) / 2
                of_q[t, h] += of_terms.sum(0)
                of_k[: t + 1, g] += of_terms
        of_q, of_k = rotate_back(self.q, *self.angles, of_q), rotate_back(self.k, *self.angles, of_k)
        out = np.zeros_like(x)
        # clamps and norms: identity, so relevance of what leaves them is that of the projections
        for affine, part in zip(projections(layer), (of_q, of_k, of_v), strict=True):
            of_x, bias = affine.backward(x, part.reshape(len(x), -1))
            self.lost["bias"] += bias
            out += of_x
        return out


class Reference:
    """The forward pass of one sequence."""

    def __init__(self, decoder: Any, tokens: list[int], angles: tuple[Any, Any], edits: Edits | None = None) -> None:
        decoder, edits = jax.tree.map(np.asarray, decoder), edits or Edits()
        angles = wide(angles[0][0]), wide(angles[1][0])
        x = self._drop(wide(decoder.embedding)[tokens], 0, edits)
        self.layers = []
        for index, block in enumerate(decoder.layers):
            self.layers.append(Layer(block, index, x, angles, edits))
            x = self._drop(self.layers[-1].out, index + 1, edits)
        self.stream = x
        self.normed = rms_norm(x, decoder.norm)
        self.head = wide(decoder.embedding if decoder.head is None else decoder.head)
        self.logits = self.normed @ self.head.T

    @staticmethod
    def _drop(x: Array, layer: int, edits: Edits) -> Array:
        return np.array([np.zeros_like(row) if (layer, t) in edits.tokens else row for t, row in enumerate(x)])

    def explain(self, position: int, terms: dict[int, float], *, pattern: str, router: str) -> "Explained":
        """Relevance for the sum of ``sign * logit`` over ``terms`` at ``position``."""
        relevance = np.zeros_like(self.stream)
        for token, sign in terms.items():
            relevance[position] += sign * self.head[token] * self.normed[position]
        streams, lost = [relevance], []
        for layer in reversed(self.layers):
            relevance = layer.backward(relevance, pattern=pattern, router=router)
            streams.append(relevance)
            lost.append(layer.lost)
        return Explained(
            target=sum(sign * self.logits[position, token] for token, sign in terms.items()),
            layers=np.stack([s.sum(-1) for s in reversed(streams)]),
            experts=np.stack([layer.experts for layer in self.layers]),
            heads=np.stack([layer.head_relevance for layer in self.layers]),
            lost={name: np.array([entry[name] for entry in reversed(lost)]) for name in lost[0]},
        )


class Explained(NamedTuple):
    """``layers`` [L+1 T], ``experts`` [L T K], ``heads`` [L T H]; ``lost`` is by name and layer."""

    target: float
    layers: Array
    experts: Array
    heads: Array
    lost: dict[str, Array]
