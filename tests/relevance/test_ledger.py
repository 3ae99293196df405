"""The ledger closes for every rule and architecture, and does not when a rule is wrong."""

from dataclasses import dataclass
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax.lax import stop_gradient
from tiny.decoders import LAYERS, PROMPT, VARIANTS, V, best_and_worst, make_config, make_lm, noisy, variant_lm

import moejax
from moejax import LM, Argmax, Contrast, Relevance, explain
from moejax.ops.cotangents import scale_cotangent
from moejax.relevance import Ledger
from moejax.rules import CPLRP, AttnLRP, Plain, Rule

RULES = [*moejax.rules.RULES.values(), CPLRP(router="uniform")]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def relative_residual(relevance: Relevance) -> float:
    return float(np.abs(relevance.ledger.residual / relevance.ledger.target).max())


def check_closed(lm: LM, rule: Rule, dtype: str) -> None:
    relevance = explain(lm, PROMPT, target=best_and_worst(lm), rule=rule)
    assert relevance.layers.dtype == dtype
    assert relevance.ledger.target[0] > 3
    assert relative_residual(relevance) <= TOLERANCE[dtype]


class TestCloses:
    @pytest.mark.parametrize(
        "rule", [*RULES[:2], *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES[2:])], ids=repr
    )
    def test_float32(self, rule):
        for seed in range(3):
            check_closed(variant_lm("clip-bias", seed), rule, "float32")

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize(
        ("rule", "variant"),
        [*((rule, "clip-bias") for rule in RULES), *product(RULES[:1], ["plain", "renormalised"])],
        ids=repr,
    )
    def test_float64(self, rule, variant):
        for seed in range(3):
            check_closed(variant_lm(variant, seed, "float64"), rule, "float64")

    @pytest.mark.slow
    @every_rule
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(
        ("weigh", "clip", "bias"), list(product(["raw", "renormalised"], [None, 0.8], [False, True]))
    )
    def test_every_combination(self, weigh, clip, bias, dtype, rule):
        with jax.enable_x64(dtype == "float64"):
            for seed in range(5):
                check_closed(make_lm(seed, dtype, weigh=weigh, clip=clip, bias=bias), rule, dtype)

    @settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def test_random_architectures(self, data):
        def draw(strategy):
            return data.draw(strategy)

        groups, experts = draw(st.integers(1, 3)), draw(st.integers(1, 9))
        sizes = (
            draw(st.integers(3, 30)),
            draw(st.integers(1, 20)),
            experts,
            draw(st.integers(1, experts)),
            groups * draw(st.integers(1, 3)),
            groups,
            2 * draw(st.integers(1, 5)),
        )
        config = make_config(
            sizes=sizes,
            layers=draw(st.integers(1, 2)),
            clip=draw(st.sampled_from([None, 0.5])),
            bias=draw(st.booleans()),
            weigh=draw(st.sampled_from(["raw", "renormalised", "softmax"])),
            qk_norm=draw(st.sampled_from([None, "full"])),
            tied=draw(st.booleans()),
        )
        seed = draw(st.integers(0, 1000))
        lm = LM(noisy(config, seed, jnp.float32))
        prompt = draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
        relevance = explain(lm, prompt, target=Argmax(), rule=draw(st.sampled_from(RULES)))
        size = np.abs(relevance.layers).sum(-1).max()
        assume(relevance.ledger.target[0] > 1e-2 * size)
        assert relative_residual(relevance) <= 3e-5


@pytest.mark.usefixtures("x64")
class TestFlow:
    @pytest.mark.parametrize("variant", ["plain", "renormalised"])
    def test_constant_attention_and_router_without_biases_conserve(self, variant):
        lm = variant_lm(variant, dtype="float64")
        relevance = explain(lm, PROMPT, target=best_and_worst(lm), rule=CPLRP())
        target = relevance.ledger.target
        assert relevance.ledger.leaks == {}
        np.testing.assert_allclose(relevance.tokens.sum(-1), target, rtol=1e-12)
        np.testing.assert_allclose(relevance.layers.sum(-1), np.tile(target, (LAYERS + 1, 1)).T, rtol=1e-12)

    @pytest.mark.parametrize(
        ("rule", "variant"),
        [*((AttnLRP(router="uniform"), name) for name in VARIANTS), (Plain(), "clip-bias")],
        ids=repr,
    )
    def test_each_layer_accounts_for_its_own_leaks(self, rule, variant):
        """What leaves a layer upwards is what enters it from above, less what that layer leaks."""
        lm = variant_lm(variant, dtype="float64")
        relevance = explain(lm, PROMPT, target=best_and_worst(lm), rule=rule)
        leaks = sum(relevance.ledger.leaks.values())
        totals = relevance.layers.sum(-1)
        np.testing.assert_allclose(totals[:, :-1], totals[:, 1:] - leaks[:, :-1], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(totals[:, -1], relevance.ledger.target - leaks[:, -1], rtol=1e-12, atol=1e-12)
        assert (np.abs(leaks[:, :-1]) > 1e-3).all()

    def test_plain_gradient_loses_everything_at_the_norm(self):
        """An RMSNorm does not see the length of its input: gradient times input is then zero, up to its epsilon."""
        lm = variant_lm("clip-bias", dtype="float64")
        relevance = explain(lm, PROMPT, target=best_and_worst(lm), rule=Plain())
        assert np.abs(relevance.layers[:, -1].sum()) < 1e-3
        np.testing.assert_allclose(relevance.ledger.leaks["norm"][:, -1], relevance.ledger.target, rtol=1e-3)


@dataclass(frozen=True)
class WrongValueFactor(CPLRP):
    def attention(self, product, q, k, v):
        return super().attention(product, q, k, scale_cotangent(v, 0.9))


@dataclass(frozen=True)
class UndeclaredPattern(CPLRP):
    """The query and key path of AttnLRP, in a rule that claims a constant pattern."""

    def attention(self, product, q, k, v):
        return AttnLRP.attention(self, product, q, k, v)


@dataclass(frozen=True)
class ThawedNorm(AttnLRP):
    """The statistic takes part, and ``leaks`` does not say so."""

    def norm(self, x, inverse_rms):
        return Rule.norm(self, x, inverse_rms)


@dataclass(frozen=True)
class DoubledActivation(AttnLRP):
    """Both factors of the product take all of its relevance."""

    def gated(self, slope, gate, up, offset=0.0, limit=None):
        return Rule.gated(self, lambda g: stop_gradient(slope(g)), gate, up, offset, limit)


@dataclass(frozen=True)
class PlainActivation(AttnLRP):
    """The slope of the activation takes part: the derivative of SiLU in place of SiLU over its input."""

    def gated(self, slope, gate, up, offset=0.0, limit=None):
        return scale_cotangent(Rule.gated(self, slope, gate, up, offset, limit), 0.5)


@dataclass(frozen=True)
class BluntClamp(AttnLRP):
    """Saturated units get no gradient."""

    def clamp(self, x, low, high):
        return Rule.clamp(self, x, low, high)


@dataclass(frozen=True)
class UndeclaredRouter(AttnLRP):
    def mix(self, weights, outputs):
        return Rule.mix(self, weights, outputs)


@dataclass(frozen=True)
class UndeclaredBias(AttnLRP):
    @property
    def leaks(self):
        return super().leaks - {"bias"}


@dataclass(frozen=True)
class LossyLinear(AttnLRP):
    def linear(self, matmul, x, weight, bias=None, slope=None):
        return scale_cotangent(super().linear(matmul, x, weight, bias, slope), 0.99)


@dataclass(frozen=True)
class HalvedResidual(AttnLRP):
    def add(self, stream, branch):
        return scale_cotangent(stream, 0.5) + branch


@dataclass(frozen=True)
class WrongSharedFactors(AttnLRP):
    def attention(self, product, q, k, v):
        return product(scale_cotangent(q, 0.25), scale_cotangent(k, 0.25), scale_cotangent(v, 0.4))


MISTAKES = [
    WrongValueFactor(),
    UndeclaredPattern(),
    ThawedNorm(),
    DoubledActivation(),
    PlainActivation(),
    BluntClamp(),
    UndeclaredRouter(),
    UndeclaredBias(),
    LossyLinear(),
    HalvedResidual(),
]


def ledgers(rule: Rule) -> list[Ledger]:
    """Of four models with one layer."""
    models = [variant_lm("clip-bias", seed, layers=1) for seed in range(4)]
    return [explain(lm, PROMPT, target=best_and_worst(lm), rule=rule).ledger for lm in models]


class TestMistakesShow:
    @pytest.mark.parametrize("rule", MISTAKES, ids=lambda rule: type(rule).__name__)
    def test_residual_is_large(self, rule):
        assert max(np.abs(books.residual / books.target).item() for books in ledgers(rule)) > 1e-2

    @pytest.mark.parametrize("rule", [AttnLRP(), CPLRP()], ids=repr)
    def test_and_is_not_without_them(self, rule):
        assert max(np.abs(books.residual / books.target).item() for books in ledgers(rule)) < 1e-5

    def test_a_mistake_where_a_leak_is_declared_is_booked_there(self):
        """The ledger measures what the named operation loses: a wrong factor in it closes, with another entry.

        That the entries themselves are right is shown against the numpy reference.
        """
        extra = []
        for right, wrong in zip(ledgers(AttnLRP()), ledgers(WrongSharedFactors()), strict=True):
            assert np.abs(wrong.residual / wrong.target).max() < 1e-5
            extra.append((wrong.leaks["softmax"].sum() - right.leaks["softmax"].sum()) / wrong.target.item())
        assert np.abs(extra).max() > 1e-2


def test_residual_is_target_less_tokens_and_leaks():
    lm = variant_lm("clip-bias")
    books = explain(lm, PROMPT, target=Contrast(11, 60), rule=AttnLRP(router="uniform")).ledger
    assert set(books.leaks) == {"softmax", "bias", "router"}
    assert all(leak.shape == (1, LAYERS + 1) for leak in books.leaks.values())
    want = books.target - books.tokens - sum(leak.sum(-1) for leak in books.leaks.values())
    np.testing.assert_allclose(books.residual, want, atol=1e-12)


def test_printed_as_a_table():
    books = Ledger(
        target=np.array([3.0, -1.0]),
        tokens=np.array([2.25, -1.0]),
        leaks={"softmax": np.array([[0.5, 0.0], [0.0, 0.0]]), "bias": np.array([[0.0, 0.25], [0.125, -0.125]])},
    )
    first, second = str(books).split("\n\n")
    assert first.splitlines() == [
        "target 3.0000 = tokens 2.2500 + leaks 0.7500 + residual 0.0e+00",
        " layer     softmax        bias",
        "     0      0.5000      0.0000",
        "  head      0.0000      0.2500",
        "   sum      0.5000      0.2500",
    ]
    assert second.startswith("target -1.0000 = tokens -1.0000 + leaks 0.0000")
    assert str(Ledger(np.array([1.0]), np.array([1.0]), {})) == (
        "target 1.0000 = tokens 1.0000 + leaks 0.0000 + residual 0.0e+00"
    )
