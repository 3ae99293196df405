"""Activation times cotangent under every rule equals the explicit relevance of the papers, op by op in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slots import expert_matmul

from moejax.layers import Linear, RMSNorm
from moejax.layers.linear import matmul_f32_accum
from moejax.ops.activation import SLOPES
from moejax.ops.attention import attention
from moejax.ops.experts import assign
from moejax.routing import SCORES, WEIGHTS, route
from moejax.rules import CPLRP, GIM, AttnLRP, Gamma, Plain, Proportional, Reading
from rules import explicit

pytestmark = pytest.mark.usefixtures("x64")

T, D, F, E, K, H, G, C = 7, 40, 20, 6, 2, 4, 2, 10
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}

LRP = [AttnLRP(), AttnLRP(router="uniform"), CPLRP(), CPLRP(router="uniform")]
ROUTED = [*LRP, AttnLRP(router="gradient"), AttnLRP(router="proportional")]
OTHERS = [GIM(), GIM(temperature=3.5), Gamma(), Gamma(gamma=1.5), Proportional(), Proportional(saturation=True)]
every_rule = pytest.mark.parametrize("rule", LRP, ids=repr)
all_of_them = pytest.mark.parametrize("rule", [*LRP, *OTHERS], ids=repr)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def relevance(function, cotangent: np.ndarray, *inputs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Relevance of the output, and of every input as activation times cotangent."""
    arrays = [jnp.asarray(a) for a in inputs]
    output, pull = jax.vjp(function, *arrays)
    return np.asarray(output) * cotangent, [
        np.asarray(x * c) for x, c in zip(arrays, pull(jnp.asarray(cotangent)), strict=True)
    ]


@all_of_them
def test_rms_norm_is_the_identity(rule):
    norm = RMSNorm(jnp.asarray(1 + normal(D)), 1e-5)
    received, (passed,) = relevance(lambda x: norm(x, Reading(rule)), normal(1, T, D, seed=1), normal(1, T, D, seed=2))
    np.testing.assert_allclose(passed, received, **TOLERANCE)


@pytest.mark.parametrize("rule", [*LRP, Gamma(), Proportional()], ids=repr)
@pytest.mark.parametrize("activation", sorted(SLOPES))
def test_gated_activation(rule, activation):
    def run(g, u):
        return rule.gated(SLOPES[activation], g, u)

    received, passed = relevance(run, normal(T, F, seed=1), normal(T, F, seed=2), normal(T, F, seed=3))
    for ours, want in zip(passed, explicit.swiglu(received), strict=True):
        np.testing.assert_allclose(ours, want, **TOLERANCE)


@every_rule
def test_gated_activation_at_zero(rule):
    """The identity rule's slope has a limit where a quotient would not."""
    gate, up = jnp.zeros(F), jnp.asarray(normal(F))
    of_gate, of_up = jax.vjp(lambda g, u: rule.gated(SLOPES["silu"], g, u), gate, up)[1](jnp.ones(F))
    np.testing.assert_allclose(of_gate, up / 4, **TOLERANCE)
    np.testing.assert_array_equal(of_up, jnp.zeros(F))


def run_attention(rule):
    mask = jnp.tril(jnp.ones((T, T), bool))[None]

    def product(q, k, v, temperature=1.0):
        return attention(q, k, v, mask, scale=C**-0.5 / temperature)

    return lambda q, k, v: rule.attention(product, q[None], k[None], v[None])[0]


ATTENTION = [normal(T, H, C, seed=4), normal(T, G, C, seed=5), normal(T, G, C, seed=6)]


@pytest.mark.parametrize("rule", LRP[:2], ids=repr)
def test_attention(rule):
    received, passed = relevance(run_attention(rule), normal(T, H, C, seed=7), *ATTENTION)
    *want, lost = explicit.attention(*ATTENTION, received, C**-0.5)
    for ours, wanted in zip(passed, want, strict=True):
        np.testing.assert_allclose(ours, wanted, **TOLERANCE)
    assert abs(lost) > 0.1, "the softmax does not conserve"
    np.testing.assert_allclose(received.sum() - sum(p.sum() for p in passed), lost, **TOLERANCE)


@pytest.mark.parametrize("rule", LRP[2:], ids=repr)
def test_attention_with_constant_pattern(rule):
    received, (of_q, of_k, of_v) = relevance(run_attention(rule), normal(T, H, C, seed=7), *ATTENTION)
    np.testing.assert_allclose(of_v, explicit.attention_constant_pattern(*ATTENTION, received, C**-0.5), **TOLERANCE)
    assert not of_q.any()
    assert not of_k.any()
    np.testing.assert_allclose(of_v.sum(), received.sum(), **TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_attention_with_a_softmax_at_another_temperature(temperature):
    received, passed = relevance(run_attention(GIM(temperature=temperature)), normal(T, H, C, seed=7), *ATTENTION)
    for ours, wanted in zip(
        passed, explicit.attention_temperature(*ATTENTION, received, C**-0.5, temperature), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, **TOLERANCE)


def test_attention_shared_by_size():
    received, (of_q, of_k, of_v) = relevance(run_attention(Proportional()), normal(T, H, C, seed=7), *ATTENTION)
    np.testing.assert_allclose(of_v, explicit.attention_by_size(*ATTENTION, received, C**-0.5), **TOLERANCE)
    assert not of_q.any()
    assert not of_k.any()
    np.testing.assert_allclose(of_v.sum(), received.sum(), **TOLERANCE)


ROUTERS = [("softmax", "raw"), ("softmax", "renormalised"), ("logits", "softmax")]


def run_mix(rule, score, weigh):
    def run(logits, outputs):
        routing = route(logits, K, score=SCORES[score], weigh=WEIGHTS[weigh])
        return rule.mix(routing.weights, outputs)

    return run


@pytest.mark.parametrize(("score", "weigh"), ROUTERS)
@pytest.mark.parametrize("rule", [*ROUTED, *OTHERS], ids=repr)
def test_router_and_mix(rule, score, weigh):
    logits, outputs = normal(T, E, seed=8), normal(T, K, D, seed=9)
    received, (of_logits, of_outputs) = relevance(
        run_mix(rule, score, weigh), normal(T, K, D, seed=10), logits, outputs
    )
    if rule.router in ("constant", "proportional"):
        np.testing.assert_allclose(of_outputs, received, **TOLERANCE)
        assert not of_logits.any()
        return
    ids = np.argsort(-logits, axis=-1)[:, :K]
    want_outputs, want_logits = explicit.mix_uniform(logits, ids, weigh, received)
    times = 2 if rule.router == "gradient" else 1
    np.testing.assert_allclose(of_outputs, times * want_outputs, **TOLERANCE)
    np.testing.assert_allclose(of_logits, times * want_logits, **TOLERANCE)
    unselected = np.abs(np.delete(of_logits[0], ids[0])).max()
    assert (unselected > 1e-3) == (weigh == "raw"), "only an unrenormalised softmax reaches experts that did not run"


@all_of_them
def test_clamp_is_the_identity(rule):
    x = 2 * normal(T, D, seed=11)
    received, (passed,) = relevance(lambda x: rule.clamp(x, -0.8, 0.8), normal(T, D, seed=12), x)
    assert (np.abs(x) > 0.8).mean() > 0.3
    np.testing.assert_allclose(passed, received, **TOLERANCE)


@pytest.mark.parametrize("rule", [*ROUTED, *OTHERS, Plain()], ids=repr)
def test_sum_of_the_slots(rule):
    terms = normal(T, K, D)
    received, (passed,) = relevance(rule.combine, normal(T, D, seed=1), terms)
    if isinstance(rule, Proportional) or getattr(rule, "router", None) == "proportional":
        want = explicit.by_size(terms, -2, received)
    else:
        want = terms / terms.sum(-2, keepdims=True) * received[:, None]
    np.testing.assert_allclose(passed, want, rtol=1e-10, atol=1e-9)


def biased_linear(rule, bias, x, cotangent, weight):
    """Relevance of inputs and bias for that of the outputs."""
    linear = Linear(jnp.asarray(weight), None if bias is None else jnp.asarray(bias))

    def run(x, probes):
        return linear(x[None], Reading(rule, probes={"bias": probes}))[0]

    y, pull = jax.vjp(run, jnp.asarray(x), jnp.zeros(1))
    of_x, leak = pull(jnp.asarray(cotangent))
    received = np.asarray(y) * cotangent
    np.testing.assert_allclose(received.sum(), (x * of_x).sum() + leak[0], **TOLERANCE)
    return received, x * of_x


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.5])
def test_linear_gamma(gamma, biased):
    weight, bias, x, cotangent = normal(F, D), normal(F, seed=1), normal(T, D, seed=2), normal(T, F, seed=3)
    received, passed = biased_linear(Gamma(gamma=gamma), bias if biased else None, x, cotangent, weight)
    want = explicit.linear_gamma(x, weight, bias if biased else 0.0, received, gamma)
    np.testing.assert_allclose(passed, want, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("saturation", [True, False])
def test_linear_by_size(biased, saturation):
    """No activation follows, so that there is nothing to mask."""
    weight, bias, x, cotangent = normal(F, D), normal(F, seed=1), normal(T, D, seed=2), normal(T, F, seed=3)
    received, passed = biased_linear(
        Proportional(saturation=saturation), bias if biased else None, x, cotangent, weight
    )
    want = explicit.linear_by_size(x, weight, bias if biased else 0.0, received)
    np.testing.assert_allclose(passed, want, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("tolerance", [1e-5, 0.3])
def test_saturation_masks_the_gate_alone(tolerance):
    """Inputs small and large, so that every case of the masks occurs."""
    x = normal(60, 5) * np.geomspace(0.01, 12, 60)[:, None]
    weight, cotangent = normal(2, F, 5, seed=1), normal(60, 2, F, seed=2)

    def product(x, w):
        return jnp.einsum("td,bfd->tbf", x, w)

    rule, slope = Proportional(saturation=True, tolerance=tolerance), SLOPES["silu"]

    def run(x):
        return rule.linear(product, x, jnp.asarray(weight), slope=slope)

    received, (passed,) = relevance(run, cotangent, x)

    def silu(g):
        return g / (1 + np.exp(-g))

    want = explicit.linear_by_size(x, weight[0], 0.0, received[:, 0], silu, tolerance)
    unmasked = explicit.linear_by_size(x, weight[0], 0.0, received[:, 0])
    assert (np.abs(want - unmasked).max(-1) > 1e-3).mean() > 0.1, "masks matter here"
    want = want + explicit.linear_by_size(x, weight[1], 0.0, received[:, 1])
    np.testing.assert_allclose(passed, want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(passed.sum(), received.sum(), rtol=1e-9)


@pytest.mark.parametrize("rule", [*LRP, GIM(), Plain()], ids=repr)
@pytest.mark.parametrize("biased", [True, False])
def test_linear(rule, biased):
    weight, bias, x, cotangent = normal(F, D), normal(F, seed=1), normal(T, D, seed=2), normal(T, F, seed=3)
    received, passed = biased_linear(rule, bias if biased else None, x, cotangent, weight)
    want = explicit.linear(x, weight, bias if biased else 0.0, received)
    np.testing.assert_allclose(passed, want, rtol=1e-10, atol=1e-9)


@every_rule
def test_head_and_expert_products(rule):
    x, weight = normal(T, D), normal(F, D, seed=1)
    received, (passed,) = relevance(
        lambda x: rule.linear(matmul_f32_accum, x, jnp.asarray(weight)), normal(T, F, seed=2), x
    )
    np.testing.assert_allclose(passed, explicit.linear(x, weight, 0.0, received), rtol=1e-10, atol=1e-9)

    experts, ids = normal(E, F, D, seed=3), np.stack([np.roll(range(E), t)[:K] for t in range(T)])

    def product(x, w):
        return expert_matmul(x, w, assign(jnp.asarray(ids), E))

    def run(x):
        return rule.linear(product, x, jnp.asarray(experts))

    received, (passed,) = relevance(run, normal(T, K, F, seed=4), x[:, None])
    want = [
        sum(explicit.linear(x[t : t + 1], experts[ids[t, k]], 0.0, received[t : t + 1, k]) for k in range(K))
        for t in range(T)
    ]
    np.testing.assert_allclose(passed, want, rtol=1e-10, atol=1e-9)


def test_residual_sum_by_size():
    a, b = normal(T, D), normal(T, D, seed=1)
    received, passed = relevance(Proportional().add, normal(T, D, seed=2), a, b)
    np.testing.assert_allclose(passed, explicit.by_size(np.stack([a, b]), 0, received), **TOLERANCE)


@pytest.mark.parametrize("rule", [*LRP, GIM(), Gamma()], ids=repr)
def test_residual_sum(rule):
    a, b = normal(T, D), normal(T, D, seed=1)
    received, passed = relevance(rule.add, normal(T, D, seed=2), a, b)
    for ours, part in zip(passed, (a, b), strict=True):
        np.testing.assert_allclose(ours, part / (a + b) * received, **TOLERANCE)
