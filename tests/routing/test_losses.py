"""Router losses: their values at the extremes, against numpy, their gradients, and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import SCORES, WEIGHTS, Routing, balance_loss, route, z_loss

pytestmark = pytest.mark.fast

B, T, E, K = 3, 7, 6, 2


def routed(logits, slots: int = K) -> Routing:
    return route(jnp.asarray(logits), slots, score=SCORES["softmax"], weigh=WEIGHTS["raw"])


def random_logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, T, E))


def balance_by_counting(logits: np.ndarray, mask: np.ndarray) -> float:
    tokens = logits[mask]
    scores = np.exp(tokens) / np.exp(tokens).sum(-1, keepdims=True)
    share = np.bincount(np.argsort(-scores, axis=-1)[:, :K].ravel(), minlength=E) / (len(tokens) * K)
    return E * (share * scores.mean(0)).sum()


def some_mask() -> np.ndarray:
    mask = np.random.default_rng(5).random((B, T)) < 0.6
    assert 0 < mask.sum() < mask.size
    return mask


def test_balance_is_one_for_perfect_balance():
    # each cyclic shift once: every expert is chosen equally often, scores are uniform on average
    rows = np.stack([np.roll(np.linspace(1, -1, E), shift) for shift in range(E)])
    np.testing.assert_allclose(balance_loss(routed(rows[None])), 1.0, rtol=1e-6)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_balance_of_a_collapse(slots):
    """All mass on the same ``slots`` experts: their share is 1 / slots each, so the loss is E / slots."""
    logits = np.where(np.arange(E) < slots, 30.0, -30.0) * np.ones((B, T, 1))
    np.testing.assert_allclose(balance_loss(routed(logits, slots)), E / slots, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [False, True])
def test_values_against_numpy(masked):
    logits, mask = random_logits(), some_mask() if masked else np.ones((B, T), bool)
    argument = jnp.asarray(mask) if masked else None
    np.testing.assert_allclose(balance_loss(routed(logits), argument), balance_by_counting(logits, mask), rtol=1e-12)
    z = (np.log(np.exp(logits[mask]).sum(-1)) ** 2).mean()
    np.testing.assert_allclose(z_loss(routed(logits), argument), z, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", [balance_loss, z_loss])
def test_gradient_by_finite_differences(loss):
    """The experts' shares are piecewise constant, so that the true slope sees the scores alone."""
    rng, mask = np.random.default_rng(3), jnp.asarray(some_mask())
    logits, step, h = random_logits(), rng.normal(size=(B, T, E)), 1e-6

    def value(x):
        return loss(routed(x), mask)

    slope = (value(logits + h * step) - value(logits - h * step)) / (2 * h)
    np.testing.assert_allclose((jax.grad(value)(jnp.asarray(logits)) * step).sum(), slope, rtol=1e-6)


@pytest.mark.parametrize("loss", [balance_loss, z_loss])
class TestMask:
    def test_masked_tokens_have_no_influence(self, loss):
        logits, mask = random_logits(), some_mask()
        other = np.where(mask[..., None], logits, 50 * random_logits(1))
        assert loss(routed(logits), jnp.asarray(mask)) == loss(routed(other), jnp.asarray(mask))
        gradient = jax.grad(lambda x: loss(routed(x), jnp.asarray(mask)))(jnp.asarray(logits, jnp.float32))
        assert not np.asarray(gradient)[~mask].any()
        assert np.asarray(gradient)[mask].any()

    def test_no_token_left_is_zero(self, loss):
        nothing = jnp.zeros((B, T), bool)
        value, gradient = jax.value_and_grad(lambda x: loss(routed(x), nothing))(
            jnp.asarray(random_logits(), jnp.float32)
        )
        assert value == 0
        assert not np.asarray(gradient).any()

    def test_full_mask_is_no_mask(self, loss):
        logits = random_logits()
        np.testing.assert_allclose(loss(routed(logits), jnp.ones((B, T), bool)), loss(routed(logits)), rtol=1e-6)
