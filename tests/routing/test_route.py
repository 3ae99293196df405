"""Routing against numpy, and what must hold for any logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moejax.routing import SCORES, WEIGHTS, route

pytestmark = pytest.mark.fast

B, T, E, K = 3, 7, 6, 2

PAIRS = [(score, weigh) for score in ("softmax", "logits") for weigh in ("raw", "renormalised", "softmax")]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_sorting(logits: np.ndarray, score: str, weigh: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = softmax(logits) if score == "softmax" else logits
    ids = np.array([sorted(range(E), key=lambda e: (-row[e], e))[:K] for row in scores.reshape(-1, E)])
    ids = ids.reshape(*logits.shape[:-1], K)
    chosen = np.take_along_axis(scores, ids, axis=-1)
    if weigh == "raw":
        return scores, ids, chosen
    return scores, ids, softmax(chosen) if weigh == "softmax" else chosen / chosen.sum(-1, keepdims=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("score", "weigh"), PAIRS)
def test_against_numpy(score, weigh):
    logits = np.random.default_rng(0).normal(size=(B, T, E)) + 0.3
    got = route(jnp.asarray(logits), K, score=SCORES[score], weigh=WEIGHTS[weigh])
    scores, ids, weights = by_sorting(logits, score, weigh)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_array_equal(got.logits, logits)
    np.testing.assert_allclose(got.scores, scores, rtol=1e-13)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-13)


@pytest.mark.parametrize(("score", "weigh"), PAIRS)
def test_ties_go_to_the_lower_id(score, weigh):
    logits = jnp.asarray([[1.0, 2.0, 2.0, 2.0, 0.0, 2.0], [0.0] * E, [0.5, 0.5, 1.0, 0.5, 1.0, 0.5]])
    got = route(logits, K, score=SCORES[score], weigh=WEIGHTS[weigh])
    assert got.ids.tolist() == [[1, 2], [0, 1], [2, 4]]


finite = st.floats(-8, 8, width=32)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (T, E), elements=finite))
def test_properties_of_the_weights(logits):
    routes = {
        w: route(jnp.asarray(logits), K, score=SCORES["softmax"], weigh=WEIGHTS[w]) for w in ("raw", "renormalised")
    }
    raw, renormalised = routes["raw"], routes["renormalised"]
    ids, weights = np.asarray(raw.ids), np.asarray(raw.weights)
    assert all(len(set(row)) == K for row in ids.tolist())
    assert (weights >= 0).all()
    assert (np.diff(weights, axis=-1) <= 0).all(), "best first"
    assert (weights.sum(-1) <= 1 + 1e-6).all()
    # the others are not better
    rest = np.asarray(raw.scores).copy()
    np.put_along_axis(rest, ids, -1.0, axis=-1)
    assert (rest.max(-1) <= weights[:, -1]).all()
    np.testing.assert_allclose(np.asarray(renormalised.weights).sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(renormalised.ids, ids)
    # a softmax renormalised over the selected is the softmax of their logits
    over_selected = softmax(np.take_along_axis(logits.astype(np.float64), ids, axis=-1))
    np.testing.assert_allclose(renormalised.weights, over_selected, rtol=1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (T, E), elements=finite), st.floats(-5, 5, width=32))
def test_softmax_weights_do_not_see_a_shift(logits, shift):
    def run(x):
        return route(jnp.asarray(x), K, score=SCORES["logits"], weigh=WEIGHTS["softmax"])

    here, there = run(logits), run(np.round(logits, 2) + 0)
    np.testing.assert_allclose(np.asarray(here.weights).sum(-1), 1, rtol=1e-5)
    shifted = run((np.round(logits, 2) + 0).astype(np.float64) + shift)
    np.testing.assert_allclose(shifted.weights, there.weights, atol=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("score", "weigh"), PAIRS)
def test_gradient_of_the_weights(score, weigh):
    """The selection has no gradient; the weights' is that of calculus, by finite differences."""
    rng = np.random.default_rng(2)
    logits, cotangent, step = rng.normal(size=(T, E)), rng.normal(size=(T, K)), rng.normal(size=(T, E))

    def run(x):
        return (route(x, K, score=SCORES[score], weigh=WEIGHTS[weigh]).weights * cotangent).sum()

    h = 1e-6
    slope = (run(jnp.asarray(logits + h * step)) - run(jnp.asarray(logits - h * step))) / (2 * h)
    np.testing.assert_allclose((jax.grad(run)(jnp.asarray(logits)) * step).sum(), slope, rtol=1e-6)
