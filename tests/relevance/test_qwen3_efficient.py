"""Token relevance of Qwen3-MoE against LXT's efficient mode, written down from its equations in float64 numpy.

Efficient mode is gradient times input with a few rules in place of calculus. Every operation below returns its value
and its pullback, from the cotangent of its output to that of its input, derived by hand. Only the decoder's weights
are shared with moejax, and the rotary angles, since they are float32 by definition.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import PROMPT, noisy

from moejax import LM, Token, explain
from moejax.models import family
from moejax.rules import AttnLRP
from relevance.reference import projections

Array = np.ndarray
Pull = Callable[[Array], Any]
Share = tuple[float, float]

HALVES: Share = (0.5, 0.5)
REPLICATED: Share = (1.0, 1.0)


class Rules(NamedTuple):
    """What is held constant, and what share of its cotangent each factor of a product gets; as in efficient mode."""

    norm_constant: bool = True  # root mean square of the residual stream
    head_norm_constant: bool = True  # and of every query and key
    slope_constant: bool = True  # silu(g) / g
    glu: Share = HALVES  # silu(gate), up
    scores: Share = HALVES  # queries, keys
    heads: Share = HALVES  # pattern, values
    mixture: Share = HALVES  # routing weights, expert outputs


EFFICIENT = Rules()
CALCULUS = Rules(False, False, False, REPLICATED, REPLICATED, REPLICATED, REPLICATED)


def wide(x: Any) -> Array:
    return np.asarray(x, np.float64)


def softmax(x: Array) -> tuple[Array, Pull]:
    e = np.exp(x - x.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return p, lambda c: p * (c - (p * c).sum(-1, keepdims=True))


def linear(x: Array, weight: Any) -> tuple[Array, Pull]:
    weight = wide(weight)
    return x @ weight.T, lambda c: c @ weight


def rms_norm(x: Array, norm: Any, *, constant: bool) -> tuple[Array, Pull]:
    weight = wide(norm.weight)
    inverse = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps)

    def pull(c: Array) -> Array:
        c = weight * c
        radial = 0 if constant else inverse**2 * x * (x * c).mean(-1, keepdims=True)
        return inverse * (c - radial)

    return weight * x * inverse, pull


def rotate(x: Array, angles: tuple[Array, Array]) -> tuple[Array, Pull]:
    """Pair ``(x[i], x[i + C/2])`` of every head turns by the angle of its position."""
    cosine, sine = (a[:, None, : a.shape[-1] // 2] for a in angles)

    def turn(x: Array, sine: Array) -> Array:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)

    return turn(x, sine), lambda c: turn(c, -sine)


def attend(q: Array, k: Array, v: Array, rules: Rules) -> tuple[Array, Pull]:
    """Causal attention of queries ``[T H C]`` to keys and values ``[T G C]``, each seen by a run of ``H / G`` heads."""
    tokens, groups, _ = k.shape
    scale, share = q.shape[-1] ** -0.5, q.shape[1] // groups
    k, v = k.repeat(share, axis=1), v.repeat(share, axis=1)
    scores = scale * np.einsum("thc,shc->hts", q, k)
    pattern, pull_softmax = softmax(np.where(np.tri(tokens, dtype=bool), scores, -np.inf))

    def pull(c: Array) -> tuple[Array, Array, Array]:
        of_pattern = rules.heads[0] * np.einsum("thc,shc->hts", c, v)
        of_v = rules.heads[1] * np.einsum("hts,thc->shc", pattern, c)
        of_scores = scale * pull_softmax(of_pattern)
        of_q = rules.scores[0] * np.einsum("hts,shc->thc", of_scores, k)
        of_k = rules.scores[1] * np.einsum("hts,thc->shc", of_scores, q)
        of_k, of_v = (of.reshape(tokens, groups, share, -1).sum(2) for of in (of_k, of_v))
        return of_q, of_k, of_v

    return np.einsum("hts,shc->thc", pattern, v), pull


def attention(x: Array, layer: Any, angles: tuple[Array, Array], rules: Rules) -> tuple[Array, Pull]:
    tokens, head_dim = len(x), layer.config.head_dim

    def project(matrix: Any, norm: Any) -> tuple[Array, Pull]:
        flat, pull_linear = linear(x, matrix.weight)
        normed, pull_norm = rms_norm(flat.reshape(tokens, -1, head_dim), norm, constant=rules.head_norm_constant)
        turned, pull_turn = rotate(normed, angles)
        return turned, lambda c: pull_linear(pull_norm(pull_turn(c)).reshape(tokens, -1))

    query, key, value = projections(layer)
    q, pull_q = project(query, layer.query_norm)
    k, pull_k = project(key, layer.key_norm)
    v, pull_v = linear(x, value.weight)
    heads, pull_heads = attend(q, k, v.reshape(tokens, -1, head_dim), rules)
    y, pull_output = linear(heads.reshape(tokens, -1), layer.output.weight)

    def pull(c: Array) -> Array:
        of_q, of_k, of_v = pull_heads(pull_output(c).reshape(heads.shape))
        return pull_q(of_q) + pull_k(of_k) + pull_v(of_v.reshape(tokens, -1))

    return y, pull


def gated(gate: Array, up: Array, rules: Rules) -> tuple[Array, Pull]:
    slope = 1 / (1 + np.exp(-gate))
    derivative = slope if rules.slope_constant else slope + gate * slope * (1 - slope)
    return gate * slope * up, lambda c: (rules.glu[0] * derivative * up * c, rules.glu[1] * gate * slope * c)


def route(x: Array, router: Any) -> tuple[Array, Array, Pull]:
    """The selected experts, their weights, and the weights' pullback; the selection itself has none."""
    logits, pull_linear = linear(x, router.weight)
    probability, pull_softmax = softmax(logits)
    ids = np.argsort(-probability, axis=-1)[:, : router.config.num_selected]
    weights, total = np.take_along_axis(probability, ids, axis=-1), 1.0
    renormalised = router.config.weigh == "renormalised"
    if renormalised:
        total = weights.sum(-1, keepdims=True)
        weights = weights / total

    def pull(c: Array) -> Array:
        if renormalised:
            c = (c - (weights * c).sum(-1, keepdims=True)) / total
        of_probability = np.zeros_like(probability)
        np.put_along_axis(of_probability, ids, c, axis=-1)
        return pull_linear(pull_softmax(of_probability))

    return ids, weights, pull


def mixture(x: Array, moe: Any, rules: Rules) -> tuple[Array, Pull]:
    ids, weights, pull_weights = route(x, moe.router)
    to_gate, to_up = np.moveaxis(wide(moe.experts.gate_up)[ids], 2, 0)
    down = wide(moe.experts.down)[ids]
    hidden, pull_hidden = gated(*(np.einsum("tkfd,td->tkf", m, x) for m in (to_gate, to_up)), rules)
    outputs = np.einsum("tkdf,tkf->tkd", down, hidden)

    def pull(c: Array) -> Array:
        of_weights = rules.mixture[0] * np.einsum("tkd,td->tk", outputs, c)
        of_outputs = rules.mixture[1] * weights[..., None] * c[:, None]
        of_halves = pull_hidden(np.einsum("tkdf,tkd->tkf", down, of_outputs))
        of_x = sum(np.einsum("tkfd,tkf->td", m, of) for m, of in zip((to_gate, to_up), of_halves, strict=True))
        return of_x + pull_weights(of_weights)

    return np.einsum("tk,tkd->td", weights, outputs), pull


def residual(x: Array, norm: Any, branch: Callable[[Array], tuple[Array, Pull]], rules: Rules) -> tuple[Array, Pull]:
    normed, pull_norm = rms_norm(x, norm, constant=rules.norm_constant)
    y, pull_branch = branch(normed)
    return x + y, lambda c: c + pull_norm(pull_branch(c))


class Reference:
    """One sequence through the weights of ``lm``."""

    def __init__(self, lm: LM) -> None:
        self.decoder = jax.tree.map(np.asarray, lm.decoder)
        cosine, sine = lm.config.blocks[0].rotary.rope.angles(jnp.arange(len(PROMPT))[None], lm.config.head_dim)
        self.angles = wide(cosine[0]), wide(sine[0])
        self.embedded = wide(self.decoder.embedding)[PROMPT]

    def forward(self, x: Array, rules: Rules = EFFICIENT) -> tuple[Array, Pull]:
        """Logits of embedded tokens, and the pullback from logits to these."""
        pulls = []

        def apply(value_and_pull: tuple[Array, Pull]) -> Array:
            pulls.append(value_and_pull[1])
            return value_and_pull[0]

        for block in self.decoder.layers:
            for norm, branch in (
                (block.attention_norm, partial(attention, layer=block.attention, angles=self.angles, rules=rules)),
                (block.feed_forward_norm, partial(mixture, moe=block.feed_forward, rules=rules)),
            ):
                x = apply(residual(x, norm, branch, rules))
        x = apply(rms_norm(x, self.decoder.norm, constant=rules.norm_constant))
        logits = apply(linear(x, self.decoder.head))

        def pull(c: Array) -> Array:
            for pull_one in reversed(pulls):
                c = pull_one(c)
            return c

        return logits, pull

    def relevance(self, target: Token, rules: Rules = EFFICIENT) -> Array:
        """Input times cotangent of every token."""
        logits, pull = self.forward(self.embedded, rules)
        seed = np.zeros_like(logits)
        seed[target.position, target.token] = 1
        return (self.embedded * pull(seed)).sum(-1)


# no two sizes are alike, those of toy.py's prompt included; heads do not divide the model's width among them
SIZES = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "num_experts": 11,
    "num_experts_per_tok": 5,
    "moe_intermediate_size": 14,
    "intermediate_size": 36,
    "vocab_size": 97,
}
# rules do not depend on the dtype, so that float32 has one case, which is as the checkpoints are published
CASES = [(True, "float64", 1e-12), (False, "float64", 1e-12), (True, "float32", 1e-5)]
TARGETS = [Token(11, 5), Token(60, 6)]

both_routers = pytest.mark.parametrize("renormalise", [True, False], ids=["renormalised", "raw"])
both_targets = pytest.mark.parametrize("target", TARGETS, ids=["inner", "last"])


@cache
def make_lm(renormalise: bool, dtype: str, seed: int = 0) -> LM:
    """Weights as in toy.py; an epsilon large enough to matter. In float64 only where that is enabled."""
    options = {"norm_topk_prob": renormalise, "rms_norm_eps": 1e-2, "rope_theta": 100.0}
    config = family("qwen3_moe").config(SIZES | options)
    return LM(noisy(config, seed, jnp.dtype(dtype)), name="toy")


def difference(got: Array, want: Array) -> float:
    """The largest, relative to the largest value."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_angles_of_the_rotation():
    theta, pairs = 100.0, SIZES["head_dim"] // 2
    angle = np.arange(len(PROMPT))[:, None] * theta ** -(np.arange(pairs) / pairs)
    for got, want in zip(Reference(make_lm(True, "float32")).angles, (np.cos(angle), np.sin(angle)), strict=True):
        np.testing.assert_allclose(got, np.tile(want, 2), rtol=0, atol=1e-6)


@both_targets
@both_routers
def test_pullbacks_without_rules_are_derivatives(renormalise, target):
    """That the reference itself is right: with every rule off, it is the slope of its own forward pass."""
    reference, step = Reference(make_lm(renormalise, "float32")), 1e-5

    def logit(token: int, factor: float) -> float:
        x = reference.embedded.copy()
        x[token] *= factor
        return reference.forward(x)[0][target.position, target.token]

    slopes = [(logit(t, 1 + step) - logit(t, 1 - step)) / (2 * step) for t in range(len(PROMPT))]
    assert difference(reference.relevance(target, CALCULUS), np.array(slopes)) < 1e-7


@pytest.mark.parametrize("seed", range(3))
@both_targets
@pytest.mark.parametrize(("renormalise", "dtype", "tolerance"), CASES, ids=["renormalised", "raw", "float32"])
def test_token_relevance(renormalise, dtype, tolerance, target, seed):
    with jax.enable_x64(dtype == "float64"):
        lm = make_lm(renormalise, dtype, seed)
        ours = explain(lm, PROMPT, target=target, rule=AttnLRP(router="uniform"))
    reference = Reference(lm)
    logits, want = reference.forward(reference.embedded)[0], reference.relevance(target)
    assert ours.tokens.dtype == dtype
    assert abs(ours.ledger.target[0] - logits[target.position, target.token]) < tolerance * np.abs(logits).max()
    assert difference(ours.tokens[0], want) < tolerance
    seen = np.arange(len(PROMPT)) <= target.position
    assert np.array_equal(ours.tokens[0] != 0, seen)
    assert np.array_equal(want != 0, seen)


WRONG = {
    "norms vary": {"norm_constant": False},
    "head norms vary": {"head_norm_constant": False},
    "slope varies": {"slope_constant": False},
    "both GLU factors whole": {"glu": REPLICATED},
    "all to the GLU's gate": {"glu": (1.0, 0.0)},
    "all to the GLU's up": {"glu": (0.0, 1.0)},
    "queries and keys whole": {"scores": REPLICATED},
    "pattern and values whole": {"heads": REPLICATED},
    "attention as in calculus": {"scores": REPLICATED, "heads": REPLICATED},
    "pattern constant": {"heads": (0.0, 1.0)},
    "routing weights and outputs whole": {"mixture": REPLICATED},
    "routing weights constant": {"mixture": (0.0, 1.0)},
    "routing weights constant, outputs half": {"mixture": (0.0, 0.5)},
    "only outputs whole": {"mixture": (0.5, 1.0)},
    "only routing weights whole": {"mixture": (1.0, 0.5)},
}


@pytest.mark.parametrize("wrong", WRONG)
@both_routers
def test_no_rule_is_idle(renormalise, wrong):
    """The comparison above tells every rule from calculus, and from what it could be mistaken for."""
    reference = Reference(make_lm(renormalise, "float32"))
    efficient, changed = (reference.relevance(TARGETS[0], EFFICIENT._replace(**w)) for w in ({}, WRONG[wrong]))
    assert difference(changed, efficient) > 0.05
