"""Relevance inside one layer: it stays at its token in the MoE block, and partitions what enters from above."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import C, D, E, H, K, T, variant_lm

from moejax.layers import Call, Mixture, Rotary, Router
from moejax.ops.rope import Rope
from moejax.rules import CPLRP, AttnLRP, Gates, Plain, Reading, Rule

pytestmark = pytest.mark.usefixtures("x64")

B = 3
RULES = [AttnLRP(), AttnLRP(router="uniform"), CPLRP(), Plain()]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def moe_layer(variant: str = "plain") -> Mixture:
    """With a bias on the router, which no variant has."""
    moe = variant_lm(variant, dtype="float64").decoder.layers[0].feed_forward
    router = Router(moe.router.weight, normal(E), None, moe.router.config)
    return Mixture(router, moe.experts, None, None)


@partial(jax.jit, static_argnames="rule")
def _read_moe(moe, rule, x, gates, probes, cotangent):
    def run(x, g, p):
        y, _, aux = moe.run(x, Call(reading=Reading(rule, g, p)))
        return y, aux.routing

    y, pull, routing = jax.vjp(run, x, gates, probes, has_aux=True)
    return y, routing, *pull(cotangent)


def read_moe(moe: Mixture, rule: Rule, x: jax.Array, cotangent: jax.Array, **fields: jax.Array):
    """Output and routing; cotangents of ``x``, of the gates and of the probes."""
    probes = {name: jnp.zeros(x.shape[:2]) for name in sorted(rule.leaks)}
    return _read_moe(moe, rule, x, Gates(**fields), probes, cotangent)


class TestMoE:
    @pytest.mark.parametrize(
        ("rule", "tokens"), [*((rule, T) for rule in RULES), (AttnLRP(router="uniform"), 1)], ids=repr
    )
    def test_relevance_stays_at_its_token(self, rule, tokens):
        """Seven tokens take the padded expert product, one takes the gathered."""
        x = normal(1 if tokens == 1 else B, tokens, D)
        at = (0, tokens // 2)
        cotangent = jnp.zeros_like(x).at[at].set(normal(D, seed=1))
        of_x = np.array(read_moe(moe_layer(), rule, x, cotangent)[2])
        assert of_x[at].any()
        of_x[at] = 0
        assert not of_x.any(), "exactly zero everywhere else"

    @every_rule
    @pytest.mark.parametrize("variant", ["plain", "renormalised"])
    def test_experts_partition_the_output(self, rule, variant):
        x, c = normal(B, T, D), normal(B, T, D, seed=1)
        y, _, of_x, gates, leaks = read_moe(moe_layer(variant), rule, x, c, slots=jnp.ones((B, T, K)))
        assert gates.slots.shape == (B, T, K)
        np.testing.assert_allclose(gates.slots.sum(-1), (y * c).sum(-1), rtol=1e-12, atol=1e-12)
        # and the layer's books close for each row
        left = (y * c).sum((1, 2)) - (x * of_x).sum((1, 2)) - sum(leak.sum(1) for leak in leaks.values())
        np.testing.assert_allclose(left, np.zeros(B), atol=1e-11)
        if rule.leaks == {"softmax", "bias"}:
            assert not any(np.asarray(leak).any() for leak in leaks.values()), "a constant router leaks nothing"

    def test_gates_by_slot_and_by_expert_read_the_same(self):
        x, c = normal(B, T, D), normal(B, T, D, seed=1)
        fields = {"slots": jnp.ones((B, T, K)), "experts": jnp.ones((B, T, E))}
        _, routing, _, gates, _ = read_moe(moe_layer(), AttnLRP(), x, c, **fields)
        want = np.zeros((B, T, E))
        np.put_along_axis(want, np.asarray(routing.ids), np.asarray(gates.slots), axis=-1)
        np.testing.assert_allclose(gates.experts, want, rtol=1e-12, atol=1e-13)

    def test_broadcast_expert_gate_reads_the_sum(self):
        x, c = normal(B, T, D), normal(B, T, D, seed=1)
        each = read_moe(moe_layer(), AttnLRP(), x, c, experts=jnp.ones((B, T, E)))[3].experts
        for shape, axes in [((1, 1, E), (0, 1)), ((B, 1, E), (1,))]:
            together = read_moe(moe_layer(), AttnLRP(), x, c, experts=jnp.ones(shape))[3].experts
            np.testing.assert_allclose(together, np.asarray(each).sum(axes, keepdims=True), rtol=1e-11, atol=1e-12)

    def test_relevance_of_an_expert_is_its_effect(self):
        """With the seed held, switching an expert off takes exactly its relevance from the output."""
        moe, x, c = moe_layer(), normal(1, T, D), normal(1, T, D, seed=1)
        gates = jnp.ones((1, T, E))
        y, routing, _, read, _ = read_moe(moe, AttnLRP(), x, c, experts=gates)
        expert = int(routing.ids[0, 3, 1])
        off = read_moe(moe, AttnLRP(), x, c, experts=gates.at[0, 3, expert].set(0))[0]
        np.testing.assert_allclose(((y - off) * c).sum(), read.experts[0, 3, expert], rtol=1e-11)


@pytest.mark.parametrize(("rule", "variant"), [*((rule, "clip-bias") for rule in RULES), (CPLRP(), "plain")], ids=repr)
def test_heads_partition_attention(rule, variant):
    layer = variant_lm(variant, dtype="float64").decoder.layers[0].attention
    x, cotangent = normal(B, T, D), normal(B, T, D, seed=1)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    call = Call(
        rotation=Rotary(Rope(100.0), C).rotation(jnp.broadcast_to(jnp.arange(T), (B, T))),
        mask=causal,
        distance=jnp.zeros((T, T), int),
        valid=jnp.ones((B, T), bool),
    )

    @jax.jit
    def run(layer, x, heads, probes):
        def forward(x, h, p):
            return layer.run(x, call._replace(reading=Reading(rule, Gates(heads=h), p)))[0]

        y, pull = jax.vjp(forward, x, heads, probes)
        return y, *pull(cotangent)

    probes = {name: jnp.zeros((B, T)) for name in sorted(rule.leaks)}
    y, of_x, heads, leaks = run(layer, x, jnp.ones((B, T, H)), probes)
    bias = 0.0 if layer.output.bias is None else layer.output.bias
    np.testing.assert_allclose(heads.sum(-1), ((y - bias) * cotangent).sum(-1), rtol=1e-11, atol=1e-11)
    left = (y * cotangent).sum((1, 2)) - (x * of_x).sum((1, 2)) - sum(leak.sum(1) for leak in leaks.values())
    np.testing.assert_allclose(left, np.zeros(B), atol=1e-11)
    if isinstance(rule, CPLRP) and variant == "plain":
        np.testing.assert_allclose((y * cotangent).sum(), (x * of_x).sum(), rtol=1e-11)


def test_reading_of_one_layer_takes_its_row():
    gates = Gates(tokens=normal(4, B, T), experts=normal(3, B, T, E), heads=normal(1, B, T, H))
    reading = Reading(AttnLRP(), gates, {"bias": normal(4, B, T)})
    at = reading.for_layer(2)
    np.testing.assert_array_equal(at.gates.tokens, gates.tokens[2])
    np.testing.assert_array_equal(at.gates.experts, gates.experts[2])
    np.testing.assert_array_equal(at.gates.heads, gates.heads[0], err_msg="one row serves all layers")
    np.testing.assert_array_equal(at.probes["bias"], reading.probes["bias"][2])
    assert at.gates.slots is None
    assert at.rule == reading.rule
    assert replace(at, rule=Plain()) != at
