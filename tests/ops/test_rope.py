"""Rotary positions against a rotation of complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.rope import Rope, rotate

pytestmark = pytest.mark.fast

B, T, H, C, THETA = 3, 7, 4, 10, 100.0


def by_complex_numbers(x, positions, theta):
    half = x.shape[-1] // 2
    angle = positions[..., None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def operands():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, T, H, C)), rng.integers(0, 40, (B, T))


def test_against_complex_rotation():
    x, positions = operands()
    got = rotate(jnp.asarray(x, jnp.float32), *Rope(THETA).angles(jnp.asarray(positions), C))
    np.testing.assert_allclose(got, by_complex_numbers(x, positions, THETA), atol=3e-5)


@pytest.mark.usefixtures("x64")
def test_rotation_in_float64_of_given_angles():
    x, positions = operands()
    cosine, sine = Rope(THETA).angles(jnp.asarray(positions), C)
    c, s = (np.asarray(a, np.float64)[:, :, None, : C // 2] for a in (cosine, sine))
    turned = (x[..., : C // 2] + 1j * x[..., C // 2 :]) * (c + 1j * s)
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), cosine, sine), want, rtol=1e-14, atol=1e-14)


def test_scores_depend_on_distance_only():
    x, _ = operands()
    q, k = (jnp.asarray(a, jnp.float32) for a in (x[:1, :1], x[1:2, :1]))

    def score(query_position: int, key_position: int) -> np.ndarray:
        turned = [
            rotate(a, *Rope(THETA).angles(jnp.full((1, 1), p), C)) for a, p in ((q, query_position), (k, key_position))
        ]
        return np.asarray((turned[0] * turned[1]).sum(-1))

    np.testing.assert_allclose(score(9, 4), score(25, 20), atol=1e-5)
    assert np.abs(score(9, 4) - score(9, 5)).max() > 1e-2


def test_position_zero_is_the_identity_and_relevance_is_conserved():
    x, positions = operands()
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_array_equal(rotate(x, *Rope(THETA).angles(jnp.zeros((B, T), int), C)), x)
    y, pull = jax.vjp(lambda x: rotate(x, *Rope(THETA).angles(jnp.asarray(positions), C)), x)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32)
    np.testing.assert_allclose((x * pull(cotangent)[0]).sum(-1), (y * cotangent).sum(-1), atol=1e-5)


def test_dtype_is_kept():
    x, positions = operands()
    angles = Rope(THETA).angles(jnp.asarray(positions), C)
    assert {a.dtype for a in angles} == {jnp.dtype(jnp.float32)}
    assert rotate(jnp.asarray(x, jnp.bfloat16), *angles).dtype == jnp.bfloat16
