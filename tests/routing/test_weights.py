"""Weightings against numpy: the guards of published families, and factors."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import WEIGHTS, Renormalised, scaled
from moejax.routing.weights import Scaled, raw, renormalised

T, K = 7, 3

# (options, the published formula): DeepSeek-V3 and others, LFM2-MoE, Ernie 4.5
GUARDS = [
    ({"eps": 1e-20}, lambda total: total + 1e-20),
    ({"eps": 1e-6}, lambda total: total + 1e-6),
    ({"least": 1e-12}, lambda total: np.maximum(total, 1e-12)),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("options", "divisor"), GUARDS)
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-13])
def test_guarded_sums(options, divisor, size):
    scores = np.random.default_rng(0).uniform(0.1, 1, (T, K)) * size
    want = scores / divisor(scores.sum(-1, keepdims=True))
    np.testing.assert_allclose(Renormalised(**options)(jnp.asarray(scores)), want, rtol=1e-14)


def test_guards_differ_where_sums_are_small():
    scores = jnp.full((1, K), 1e-6)
    sums = {
        name: float(Renormalised(**options)(scores).sum()) for name, (options, _) in zip("abc", GUARDS, strict=True)
    }
    assert sums["a"] == pytest.approx(1, rel=1e-6)
    assert sums["b"] == pytest.approx(0.75, rel=1e-5)
    assert sums["c"] == pytest.approx(1, rel=1e-6)


def test_scores_of_zero_have_weights_of_zero():
    for weigh in (renormalised, *(Renormalised(**options) for options, _ in GUARDS)):
        assert not np.asarray(weigh(jnp.zeros((T, K)))).any()


def test_without_a_guard_it_is_the_named_weighting():
    scores = jnp.asarray(np.random.default_rng(1).uniform(0, 1, (T, K)).astype(np.float32))
    np.testing.assert_array_equal(Renormalised()(scores), WEIGHTS["renormalised"](scores))


@pytest.mark.parametrize("weigh", [raw, renormalised, Renormalised(eps=1e-20), WEIGHTS["softmax"]])
def test_scaled_multiplies_any_weighting(weigh):
    scores = jnp.asarray(np.random.default_rng(2).uniform(0, 1, (T, K)).astype(np.float32))
    np.testing.assert_array_equal(scaled(2.5, weigh)(scores), np.float32(2.5) * np.asarray(weigh(scores)))


def test_a_factor_alone_scales_renormalised_scores():
    scores = jnp.asarray([[0.25, 0.5, 0.25]])
    np.testing.assert_array_equal(scaled(2.5)(scores), 2.5 * renormalised(scores))


def test_configurations_can_hold_them():
    """Equal options are equal and hash alike, so that a program is compiled once for them."""
    assert scaled(2.0, Renormalised(eps=1e-20)) == Scaled(2.0, Renormalised(eps=1e-20))
    assert hash(Renormalised(least=1e-12)) == hash(Renormalised(least=1e-12))
    assert scaled(2.0) != scaled(2.5)
