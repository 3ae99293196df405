"""Attention against a softmax written out for each head and query in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.attention import attention

B, T, S, H, G, C = 3, 7, 9, 4, 2, 10


def by_loop(q, k, v, mask, scale):
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = np.flatnonzero(mask[b, t])
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                scores = np.array([q[b, t, h] @ k[b, s, g] * scale for s in seen])
                pattern = np.exp(scores - scores.max())
                out[b, t, h] = sum(p * v[b, s, g] for p, s in zip(pattern / pattern.sum(), seen, strict=True))
    return out


def operands(heads=H, groups=G, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s) for s in [(B, T, heads, C), (B, S, groups, C), (B, S, groups, C)]]


def some_mask(kind):
    if kind == "causal":
        return np.broadcast_to(np.arange(S) <= np.arange(T)[:, None] + S - T, (B, T, S))
    mask = np.random.default_rng(1).random((B, T, S)) < (1.0 if kind == "full" else 0.4)
    mask[..., 2] = True
    return mask


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["causal", "full", "random"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 2), (5, 5), (3, 1)])
def test_against_numpy(kind, heads, groups):
    operand, mask = operands(heads, groups), some_mask(kind)
    got = attention(*map(jnp.asarray, operand), jnp.asarray(mask), scale=0.3)
    np.testing.assert_allclose(got, by_loop(*operand, mask, 0.3), rtol=1e-12, atol=1e-12)


def test_bfloat16_keeps_scores_in_float32():
    operand = [jnp.asarray(a, jnp.bfloat16) for a in operands()]
    got = attention(*operand, jnp.asarray(some_mask("causal")), scale=5.0)
    assert got.dtype == jnp.bfloat16
    want = by_loop(*(np.asarray(a, np.float64) for a in operand), some_mask("causal"), 5.0)
    # scores of size 50 would be off by 0.2 in bfloat16, weights by as much
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.03)


@pytest.mark.parametrize("scale", [0.3, 1e4])
def test_query_that_sees_nothing_is_finite(scale):
    q, k, v = (jnp.asarray(a, jnp.float32) for a in operands())
    mask = np.array(some_mask("causal"))
    mask[1, 3] = False
    out, pull = jax.vjp(lambda *a: attention(*a, jnp.asarray(mask), scale=scale), q, k, v)
    np.testing.assert_allclose(out[1, 3, 0], v[1, :, 0].mean(0), rtol=1e-5, atol=1e-6)
    gradients = pull(jnp.ones_like(out).at[1, 3].set(0))
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    assert not np.asarray(gradients[0])[1, 3].any()


def test_masked_keys_have_no_influence():
    q, k, v = (jnp.asarray(a, jnp.float32) for a in operands())
    mask = jnp.asarray(some_mask("causal")).at[:, :, 4].set(False)
    run = lambda k, v: attention(q, k, v, mask, scale=0.3)  # noqa: E731
    out, pull = jax.vjp(run, k, v)
    np.testing.assert_array_equal(out, run(k.at[:, 4].set(1e6), v.at[:, 4].set(-1e6)))
    assert not any(np.asarray(g)[:, 4].any() for g in pull(jnp.ones_like(out)))
