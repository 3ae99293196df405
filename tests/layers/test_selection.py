"""Selections: what must hold for any scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moejax.routing.selection import balanced_bias, biased, drop_experts, expert_choice, limit_groups, selected

N, GROUPS, SIZE, K = 8, 3, 4, 5
E = GROUPS * SIZE

# few values, so that ties are common
score = st.sampled_from(np.linspace(0, 1, 23).astype(np.float32).tolist())
some_scores = arrays(np.float32, (N, E), elements=score)
quick = settings(max_examples=50, deadline=None)


@quick
@given(some_scores, st.integers(1, GROUPS), st.integers(1, SIZE + 1))
def test_group_limit(scores, kept, best):
    seen = np.asarray(limit_groups(jnp.asarray(scores), GROUPS, kept, best)).reshape(N, GROUPS, SIZE)
    inside = np.isfinite(seen).all(-1)
    assert (np.isfinite(seen) == inside[..., None]).all(), "a group is in or out as a whole"
    assert (inside.sum(-1) == kept).all()
    np.testing.assert_array_equal(seen[inside], scores.reshape(N, GROUPS, SIZE)[inside])
    rank = np.sort(scores.reshape(N, GROUPS, SIZE), -1)[..., -min(best, SIZE) :].sum(-1)
    worst_in = np.where(inside, rank, np.inf).min(-1)
    best_out = np.where(inside, -np.inf, rank).max(-1)
    assert (worst_in >= best_out - 1e-6).all()


@quick
@given(some_scores, arrays(np.float32, (E,), elements=st.floats(-2, 2, width=32, allow_subnormal=False)))
def test_bias_moves_the_selection_and_has_no_gradient(scores, bias):
    seen = biased(jnp.asarray(scores), jnp.asarray(bias))
    np.testing.assert_array_equal(seen, scores + bias)
    slope = jax.grad(lambda b: biased(jnp.asarray(scores), b).sum())(jnp.asarray(bias))
    assert not np.asarray(slope).any()


@quick
@given(arrays(np.int32, (E,), elements=st.integers(0, 50)), st.floats(1e-4, 0.5))
def test_bias_moves_by_the_sign_of_the_lack(load, rate):
    moved = np.asarray(balanced_bias(jnp.zeros(E), jnp.asarray(load, jnp.float32), rate))
    mean = np.float32(load.astype(np.float32).mean())
    np.testing.assert_allclose(moved, rate * np.sign(mean - load.astype(np.float32)), rtol=1e-6)


@quick
@given(some_scores, st.integers(0, 10_000), st.floats(0, 1), st.integers(1, E))
def test_dropped_experts(scores, seed, rate, least):
    seen = np.asarray(drop_experts(jnp.asarray(scores), jax.random.key(seed), rate, least))
    out = ~np.isfinite(seen)
    assert (out == out[:1]).all(), "the same experts for all tokens"
    assert (~out).sum(-1).min() >= least
    np.testing.assert_array_equal(seen[~out], scores[~out])


def test_rate_of_dropped_experts():
    out = [np.isinf(drop_experts(jnp.zeros((1, E)), jax.random.key(s), 0.3, 1)).mean() for s in range(200)]
    assert abs(np.mean(out) - 0.3) < 0.04
    assert not np.isinf(drop_experts(jnp.zeros((1, E)), jax.random.key(0), 0.0, 1)).any()


@quick
@given(some_scores, st.integers(1, N + 2), arrays(bool, (N,)))
def test_expert_choice(scores, capacity, mask):
    taken = np.asarray(expert_choice(jnp.asarray(scores), capacity, jnp.asarray(mask)))
    assert not taken[~mask].any()
    assert (taken.sum(0) == min(capacity, mask.sum())).all(), "loads are even"
    for e in range(E):
        inside, outside = scores[taken[:, e], e], scores[mask & ~taken[:, e], e]
        assert not len(outside) or not len(inside) or inside.min() >= outside.max()
    whole = np.asarray(expert_choice(jnp.asarray(scores), capacity))
    np.testing.assert_array_equal(whole, expert_choice(jnp.asarray(scores), capacity, jnp.ones(N, bool)))


@quick
@given(arrays(np.int32, (N, K), elements=st.integers(-1, E + 2)))
def test_selected_marks_the_ids_that_exist(ids):
    want = np.array([[e in row for e in range(E)] for row in ids.tolist()])
    np.testing.assert_array_equal(selected(jnp.asarray(ids), E), want)


@pytest.mark.parametrize("experts", [3, 6, 7, 49])
def test_a_mean_load_is_no_lack(experts):
    """Shares are rounded, and so is their mean, which an expert at it must not feel."""
    load = jnp.full(experts, 1 / experts, jnp.float32)
    assert not balanced_bias(jnp.zeros(experts), load, 0.1).any()
    some = jnp.arange(experts) - experts // 2
    moved = balanced_bias(jnp.zeros(experts), (1 + 1e-4 * some) / experts, 0.1)
    assert (moved[: experts // 2] > 0).all()
    assert (moved[experts // 2 + 1 :] < 0).all()
