"""What every rule keeps: values to the bit, being hashable and static; and that `Plain` is calculus."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from moejax import MoejaxError
from moejax.layers import GLU, AttentionConfig, BlockConfig, MixtureConfig, RouterConfig
from moejax.models import Config, Decoder
from moejax.ops.activation import SLOPES
from moejax.ops.attention import attention
from moejax.ops.rope import Rope
from moejax.rules import CPLRP, GIM, RULES, AttnLRP, Direct, Gamma, Gates, Plain, Proportional, Reading, Rule, by_name

T, D, F, E, K, H, G, C, L, V = 7, 40, 20, 6, 2, 4, 2, 10, 3, 97

LRP = [*RULES.values(), CPLRP(router="uniform")]
every_rule = pytest.mark.parametrize("rule", LRP, ids=repr)


@every_rule
def test_targets_share_the_factors_of_a_unit(rule):
    """Nothing but products is computed for each of several cotangents, whether branches are limited or not."""
    branches = jnp.stack([jnp.linspace(-2, 2, 7), jnp.linspace(1, 3, 7)])[None]
    for unit in (GLU(), GLU(alpha=1.7, limit=1.5, offset=1.0)):
        pull = jax.vmap(jax.vjp(lambda x, unit=unit: unit(x, Reading(rule)), branches)[1])
        steps = jax.make_jaxpr(pull)(jnp.ones((3, 1, 7))).jaxpr.eqns
        each = [str(step.primitive) for step in steps for y in step.outvars if y.aval.shape == (3, 1, 7)]
        assert each == ["mul", "mul"]


@pytest.mark.parametrize(("rule", "products"), [(Direct(), 1), (AttnLRP(), 2)], ids=repr)
def test_what_a_rule_cuts_is_not_computed(rule, products):
    matrix, unit = jnp.ones((5, 14)), GLU(limit=1.5)

    def run(x):
        return unit((x @ matrix).reshape(1, 2, 7), Reading(rule)).sum()

    steps = jax.make_jaxpr(jax.grad(run))(jnp.ones(5)).jaxpr.eqns
    assert sum(step.primitive.name == "dot_general" for step in steps) == products


def test_booked_limits_are_limits():
    """What a rule does not conserve at the limits is computed for itself, and changes nothing."""
    branches = jnp.stack([jnp.linspace(-2, 2, 7), jnp.linspace(1, 3, 7)])[None]
    unit, probes = GLU(limit=1.5), {"clamp": jnp.zeros(1)}

    def run(x, probes):
        return unit(x, Reading(probes=probes)).sum()

    alone, booked = (jax.value_and_grad(run, argnums=(0, 1))(branches, p) for p in ({}, probes))
    assert alone[0] == booked[0]
    np.testing.assert_array_equal(alone[1][0], booked[1][0])
    assert booked[1][1]["clamp"] != 0


def make_decoder(dtype: jnp.dtype) -> Decoder:
    config = Config(
        model_type="olmoe",
        vocab_size=V,
        blocks=(
            BlockConfig(
                AttentionConfig(D, H, G, C, 1e-5, Rope(100.0), qk_norm="full", clip=0.8, bias=True, output_bias=True),
                MixtureConfig(D, F, RouterConfig(E, K, weigh="renormalised")),
                norm_eps=1e-5,
            ),
        )
        * L,
        norm_eps=1e-5,
        tied=False,
        max_positions=64,
    )
    rng = np.random.default_rng(0)
    decoder = Decoder.init(config, jax.random.key(0))
    return jax.tree.map(lambda w: jnp.asarray(w + rng.normal(0, 0.2, w.shape), dtype), decoder)


TOKENS = jnp.asarray([[5, 80, 33, 96, 0, 33, 12], [1, 2, 3, 4, 5, 6, 7]])


@jax.jit
def logits(decoder: Decoder, tokens: jax.Array, reading: Reading) -> jax.Array:
    return decoder(tokens, reading=reading)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)], ids=["f32", "bf16"]
)
class TestValuesToTheBit:
    def test_logits_under_every_rule(self, dtype):
        decoder = make_decoder(dtype)
        plain = np.asarray(logits(decoder, TOKENS, Reading()))
        assert plain.dtype == np.float32
        assert np.ptp(plain) > 1
        for rule in LRP:
            np.testing.assert_array_equal(logits(decoder, TOKENS, Reading(rule)), plain, err_msg=repr(rule))

    def test_probes_change_no_bit(self, dtype):
        decoder = make_decoder(dtype)
        rule = AttnLRP(router="uniform")
        probes = {name: jnp.zeros((L + 1, *TOKENS.shape)) for name in sorted(rule.leaks)}
        read = logits(decoder, TOKENS, Reading(rule, probes=probes))
        np.testing.assert_array_equal(read, logits(decoder, TOKENS, Reading()))

    def test_gates_of_one_change_rounding_only(self, dtype):
        """A gate multiplies at run time, so the compiler may fuse differently around it."""
        decoder = make_decoder(dtype)
        plain, close = logits(decoder, TOKENS, Reading()), 1e-5 if dtype == jnp.float32 else 0.1
        for gates in (Gates.readout(decoder.config, TOKENS), Gates.ones(decoder.config, TOKENS)):
            np.testing.assert_allclose(logits(decoder, TOKENS, Reading(gates=gates)), plain, atol=close)

    @every_rule
    def test_every_method(self, dtype, rule):
        rng = np.random.default_rng(0)

        def normal(*shape):
            return jnp.asarray(2 * rng.normal(size=shape), dtype)

        x, y, scale = normal(T, D), normal(T, D), jnp.abs(normal(T, 1)).astype(jnp.float32)
        q, k, v = normal(1, T, H, C), normal(1, T, G, C), normal(1, T, G, C)
        weights, outputs, matrix, halves = normal(T, K), normal(T, K, D), normal(F, D), normal(2, F, D)

        def gated(a, w):
            return jnp.einsum("td,bfd->tbf", a, w)

        mask = jnp.ones((1, T, T), bool)

        def attend(q, k, v, temperature=1.0):
            return attention(q, k, v, mask, scale=1 / temperature)

        calls: list[Callable[[Rule], object]] = [
            lambda r: r.norm(x.astype(jnp.float32), scale),
            lambda r: r.gated(SLOPES["silu"], x, y),
            lambda r: r.attention(attend, q, k, v),
            lambda r: r.combine(outputs),
            lambda r: r.mix(weights, outputs),
            lambda r: r.clamp(x, -0.8, 0.8),
            lambda r: r.linear(lambda a, w: a @ w.T, x, matrix),
            lambda r: r.linear(gated, x, halves, jnp.ones((T, 2, F), dtype), SLOPES["silu"]),
            lambda r: r.add(x, y),
        ]
        for call in calls:
            ours, plain = jax.tree.leaves(call(rule)), jax.tree.leaves(call(Plain()))
            for a, b in zip(ours, plain, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


class TestPlainIsCalculus:
    @pytest.mark.parametrize("name", ["norm", "gated", "mix", "clamp", "linear", "add"])
    def test_each_method_has_the_gradient_of_its_formula(self, name):
        rng = np.random.default_rng(0)

        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape), jnp.float32)

        plain, rms = Plain(), lambda x: jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        x, y, weights, outputs = normal(T, D), normal(T, D), normal(T, K), normal(T, K, D)

        def matmul(a, w):
            return a @ w.T

        ours, formula, inputs = {
            "norm": (lambda x: plain.norm(x, rms(x)), lambda x: x * rms(x), (x,)),
            "gated": (lambda g, u: plain.gated(SLOPES["silu"], g, u), lambda g, u: jax.nn.silu(g) * u, (x, y)),
            "mix": (plain.mix, lambda w, f: w[..., None] * f, (weights, outputs)),
            "clamp": (lambda x: plain.clamp(x, -0.8, 0.8), lambda x: jnp.clip(x, -0.8, 0.8), (x,)),
            "linear": (lambda x: plain.linear(matmul, x, y), lambda x: x @ y.T, (x,)),
            "add": (plain.add, jnp.add, (x, y)),
        }[name]

        def total(f):
            return lambda *a: (f(*a) * jnp.cos(f(*a))).sum()

        wrt = tuple(range(len(inputs)))
        for a, b in zip(jax.grad(total(ours), wrt)(*inputs), jax.grad(total(formula), wrt)(*inputs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class TestRulesAreStatic:
    @pytest.mark.parametrize("rule", LRP, ids=repr)
    def test_hashable_equal_and_frozen(self, rule):
        assert hash(rule) == hash(dataclasses.replace(rule))
        assert rule == dataclasses.replace(rule)
        with pytest.raises(dataclasses.FrozenInstanceError):
            rule.anything = 1

    def test_all_differ(self):
        assert len(set(LRP)) == len(LRP) == 11

    def test_static_under_jit(self):
        leaves = jax.tree.leaves(Reading(AttnLRP()))
        assert leaves == []

    @pytest.mark.parametrize("rule", [AttnLRP, CPLRP])
    def test_unknown_router(self, rule):
        with pytest.raises((ValueError, TypeCheckError), match="lxt"):
            rule(router="lxt")

    def test_declared_leaks(self):
        assert AttnLRP().leaks == {"softmax", "bias"}
        assert AttnLRP(router="uniform").leaks == {"softmax", "bias", "router"}
        assert AttnLRP(router="gradient").leaks == {"softmax", "bias", "router"}
        assert AttnLRP(router="proportional").leaks == {"softmax", "bias"}
        assert CPLRP().leaks == {"bias"}
        assert GIM().leaks == {"softmax", "activation", "bias"}
        assert Gamma().leaks == {"softmax", "bias"}
        assert Proportional().leaks == {"bias"}
        assert CPLRP(router="uniform").leaks == {"bias", "router"}
        assert Plain().leaks == {"norm", "activation", "clamp", "softmax", "router", "gate", "bias"}

    def test_by_name(self):
        assert by_name("gim") == GIM()
        assert by_name(CPLRP()) == CPLRP()
        with pytest.raises(MoejaxError, match="'lrp' is unknown; choose from attnlrp, attnlrp-uniform"):
            by_name("lrp")
