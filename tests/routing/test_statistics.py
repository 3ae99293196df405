"""Every statistic against loops in numpy float64, at its extremes, and under what must not change it."""

from inspect import getmembers, isfunction, signature
from itertools import combinations, permutations
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moejax.routing import statistics

# compiled whole: operation by operation takes several times as long
s = SimpleNamespace(
    **{
        name: jax.jit(function, static_argnames={"num_experts", "options", "least"} & {*signature(function).parameters})
        for name, function in getmembers(statistics, isfunction)
        if not name.startswith("_")
    }
)

B, T, L, E, K, R, D = 3, 7, 5, 6, 4, 9, 8


def ids_and_weights(seed: int = 0, shape=(B, T), k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Random sets, best first; signs are mixed, some slots carry nothing, and one token's do not at all."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((*shape, E)), axis=-1)[..., :k].astype(np.int32)
    weights = rng.normal(size=(*shape, k)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.2] = 0
    weights[(0,) * len(shape)] = 0
    return ids, weights


def some_mask(seed: int = 5) -> np.ndarray:
    mask = np.random.default_rng(seed).random((B, T)) < 0.6
    assert 0 < mask.sum() < mask.size
    return mask


def set_of(ids: np.ndarray, weights: np.ndarray) -> set[int]:
    return {int(i) for i, w in zip(ids, weights, strict=True) if w != 0}


def entropy(p) -> float:
    p = np.abs(np.asarray(p, np.float64))
    return -sum(x * np.log(x) for x in p / p.sum() if x > 0) if p.sum() else 0.0


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def counts(seed: int = 1, shape=(L, E)) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, 40, shape)
    found[0, :-1] = 0
    return found


def close(got, want) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


# ---- one token -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_entropy_and_margin_of_the_router(dtype):
    logits = jnp.asarray(3 * np.random.default_rng(2).normal(size=(B, T, R)), dtype)
    p = softmax(np.asarray(logits, np.float64))
    close(s.router_entropy(logits), np.apply_along_axis(entropy, -1, p))
    best = np.sort(p, axis=-1)
    close(s.router_margin(logits), best[..., -1] - best[..., -2])
    assert s.router_entropy(logits).dtype == s.router_margin(logits).dtype == jnp.float32


def test_entropy_and_margin_of_the_weights():
    weights = ids_and_weights()[1]
    close(s.weight_entropy(jnp.asarray(weights)), np.apply_along_axis(entropy, -1, weights))
    sizes = np.sort(np.abs(weights.astype(np.float64)), axis=-1)
    sums = sizes.sum(-1)
    close(s.weight_margin(jnp.asarray(weights)), (sizes[..., -1] - sizes[..., -2]) / np.where(sums == 0, 1, sums))


def test_extremes_of_one_token():
    close(s.router_entropy(jnp.zeros(R)), np.log(R))
    assert s.normalised(s.router_entropy(jnp.zeros(R)), R) == pytest.approx(1)
    assert s.router_entropy(jnp.asarray([0.0, -jnp.inf, -jnp.inf])) == 0
    assert s.router_margin(jnp.asarray([0.0, -jnp.inf])) == 1
    one = jnp.ones((T, 1))
    assert not s.router_entropy(one).any()
    assert not s.normalised(s.weight_entropy(one), 1).any()
    assert (s.router_margin(one) == 1).all()
    assert (s.weight_margin(one) == 1).all()
    assert s.weight_margin(jnp.zeros(K)) == s.weight_entropy(jnp.zeros(K)) == 0


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (T, R), elements=st.floats(-20, 20, width=32)))
def test_bounds_of_one_token(logits):
    entropies, margins = s.router_entropy(jnp.asarray(logits)), s.router_margin(jnp.asarray(logits))
    assert (entropies >= 0).all()
    assert (entropies <= np.log(R) + 1e-5).all()
    assert (margins >= 0).all()
    assert (margins <= 1 + 1e-6).all()
    shuffled = np.random.default_rng(0).permutation(R)
    close(s.router_entropy(jnp.asarray(logits[:, shuffled])), entropies)


# ---- selections ----------------------------------------------------------------------------------------------------


def test_selections_and_usage():
    (ids, weights), mask = ids_and_weights(), some_mask()
    chosen = s.selections(jnp.asarray(ids), jnp.asarray(weights), E)
    want = np.zeros((B, T, E))
    for at in np.ndindex(B, T):
        for expert in set_of(ids[at], weights[at]):
            want[(*at, expert)] += 1
    np.testing.assert_array_equal(chosen, want)
    np.testing.assert_array_equal(s.usage(chosen, jnp.asarray(mask)), want[mask].sum(0))
    np.testing.assert_array_equal(s.usage(chosen), want.sum((0, 1)))


def test_two_routes_to_one_expert_are_two_slots_and_one_member():
    ids, weights = jnp.asarray([[2, 2, 4]]), jnp.asarray([[0.5, -0.3, 0.0]])
    chosen = s.selections(ids, weights, E)
    assert chosen.tolist() == [[0, 0, 2, 0, 0, 0]]
    assert s.coactivation(chosen)[2, 2] == 1
    assert s.set_overlap(ids, jnp.asarray([[4, 2]]), weights=weights) == 0.5
    assert s.set_overlap(jnp.asarray([[4, 2]]), ids, other_weights=weights) == 1


def test_first_choice_is_that_of_the_largest_weight():
    ids, weights = jnp.asarray([[3, 1, 5], [0, 1, 2]]), jnp.asarray([[0.0, 0.2, -0.4], [0.0, 0.0, 0.0]])
    assert s.first_choice(ids, weights, E).argmax(-1)[0] == 5
    assert s.first_choice(ids, weights, E).sum(-1).tolist() == [1, 0]


def test_coactivation():
    (ids, weights), mask = ids_and_weights(), some_mask()
    want = np.zeros((E, E))
    for at in zip(*np.nonzero(mask), strict=True):
        for i in set_of(ids[at], weights[at]):
            for j in set_of(ids[at], weights[at]):
                want[i, j] += 1
    chosen = s.selections(jnp.asarray(ids), jnp.asarray(weights), E)
    got = s.coactivation(chosen, jnp.asarray(mask))
    np.testing.assert_array_equal(got, want)
    close(s.conditional_coactivation(got), want / np.maximum(np.diag(want), 1)[:, None])


# ---- counts --------------------------------------------------------------------------------------------------------


def test_evenness_of_counts():
    found = counts()
    p = found / found.sum(-1, keepdims=True)
    close(s.shares(found), p)
    close(s.usage_entropy(found), [entropy(row) / np.log(E) for row in p])
    close(s.relative_perplexity(found), [np.exp(entropy(row)) / E for row in p])
    close(s.dead_experts(found), (found == 0).mean(-1))
    close(s.jain_index(found), 1 / (E * (p**2).sum(-1)))
    close(s.largest_load(found), E * p.max(-1))


@pytest.mark.parametrize("size", [1, E])
def test_evenness_at_its_extremes(size):
    even, collapsed = np.full(size, 5), np.eye(size, dtype=int)[0]
    close([s.relative_perplexity(even), s.jain_index(even), s.largest_load(even)], 1)
    close([s.relative_perplexity(collapsed), s.jain_index(collapsed)], 1 / size)
    close(s.largest_load(collapsed), size)
    assert s.usage_entropy(collapsed) == 0
    assert s.dead_experts(even) == 0
    assert s.dead_experts(collapsed) == pytest.approx(1 - 1 / size)


# ---- pairs ---------------------------------------------------------------------------------------------------------


def test_layer_overlap():
    (ids, weights), mask = ids_and_weights(shape=(L, B, T)), some_mask()
    got = s.layer_overlap(s.selections(jnp.asarray(ids), jnp.asarray(weights), E), jnp.asarray(mask))
    for one, two in np.ndindex(L, L):
        found = []
        for at in zip(*np.nonzero(mask), strict=True):
            here, there = (set_of(ids[layer][at], weights[layer][at]) for layer in (one, two))
            found += [len(here & there) / len(here | there)] if here | there else []
        close(got[one, two], np.mean(found))
    close(np.diagonal(got), 1)


def test_set_overlap_and_switch_rate():
    (ids, weights), (other, other_weights), mask = ids_and_weights(1), ids_and_weights(2, k=3), some_mask()
    found = []
    for at in zip(*np.nonzero(mask), strict=True):
        here, there = set_of(ids[at], weights[at]), set_of(other[at], other_weights[at])
        found += [len(here & there) / len(there)] if there else []
    sets = jnp.asarray(ids), jnp.asarray(other), jnp.asarray(mask)
    carry = {"weights": jnp.asarray(weights), "other_weights": jnp.asarray(other_weights)}
    close(s.set_overlap(*sets, **carry), np.mean(found))
    close(s.switch_rate(*sets, **carry), 1 - np.mean(found))


def test_set_overlap_does_not_see_the_order():
    """Swapping ranks is no change: a comparison position by position would call it one."""
    ids = jnp.asarray(ids_and_weights()[0])
    for order in permutations(range(K)):
        assert s.set_overlap(ids, ids[..., list(order)]) == 1
        assert s.switch_rate(ids[..., list(order)], ids) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(K)), st.permutations(range(3)))
def test_set_overlap_is_invariant(seed, order, other_order):
    ids, other = jnp.asarray(ids_and_weights(seed)[0]), jnp.asarray(ids_and_weights(seed + 1, k=3)[0])
    value = float(s.set_overlap(ids, other))
    assert 0 <= value <= 1
    assert float(s.set_overlap(ids[..., order], other[..., other_order])) == pytest.approx(value, abs=1e-6)
    # counted once, divided by the sizes of either
    assert float(s.set_overlap(other, ids)) == pytest.approx(value * 3 / K, abs=1e-6)


# ---- similarity ----------------------------------------------------------------------------------------------------


def mean_cosine(vectors: np.ndarray) -> float:
    pairs = list(combinations(vectors.astype(np.float64), 2))
    return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))


def test_expert_similarity():
    vectors = np.random.default_rng(3).normal(size=(L, E, D)) + 0.4
    close(s.expert_similarity(jnp.asarray(vectors, jnp.float32)), [mean_cosine(v) for v in vectors])
    assert s.expert_similarity(jnp.ones((1, D))) == 0, "one expert has no pair"


def test_diversity():
    outputs, (_, weights) = np.random.default_rng(4).normal(size=(B, T, K, D)) + 0.3, ids_and_weights()
    mask = some_mask()
    found = []
    for at in zip(*np.nonzero(mask), strict=True):
        kept = outputs[at][weights[at] != 0]
        found += [mean_cosine(kept)] if len(kept) > 1 else []
    outputs = jnp.asarray(outputs, jnp.float32)
    close(s.diversity(outputs, jnp.asarray(mask), weights=jnp.asarray(weights)), np.mean(found))


def test_diversity_of_identical_outputs_is_one():
    close(s.diversity(jnp.full((B, T, K, D), 0.7)), 1)
    assert s.diversity(jnp.ones((B, T, 1, D))) == 0, "one output has no pair"


# ---- specialisation ------------------------------------------------------------------------------------------------


def test_specialisation():
    found = np.random.default_rng(6).integers(0, 9, (T, E))
    found[2] = 0
    joint = found / found.sum()
    outer = joint.sum(0) * joint.sum(1, keepdims=True)
    information = sum(j * np.log(j / o) for j, o in zip(joint.ravel(), outer.ravel(), strict=True) if j > 0)
    close(s.specialisation(found), information / entropy(joint.sum(0)))
    least = int(np.median(found.sum(1)))
    close(s.specialisation(found, least), s.specialisation(found[found.sum(1) >= least]))
    assert s.specialisation(found, 10**6) == 0


def test_specialisation_at_its_extremes():
    close(s.specialisation(7 * np.eye(E)), 1)
    close(s.specialisation(np.outer(np.arange(1, T + 1), np.arange(1, E + 1))), 0)
    # a group that decides on two experts of six, each pair as often
    pairs = np.kron(np.eye(E // 2), np.ones((1, 2)))
    close(s.specialisation(pairs), 1 - np.log(2) / np.log(E))


def test_divergence():
    found = counts(7, (4, E))
    found[1] = 0
    p = found[[0, 2, 3]] / found[[0, 2, 3]].sum(-1, keepdims=True)
    close(s.divergence(found), (entropy(p.mean(0)) - np.mean([entropy(row) for row in p])) / np.log(3))
    close(s.divergence(5 * np.eye(4)), 1)
    close(s.divergence(np.ones((4, E))), 0)
    assert s.divergence(found[1:2]) == 0
    pairs = s.pairwise_divergence(found)
    close(pairs[2, 3], (entropy((p[1] + p[2]) / 2) - (entropy(p[1]) + entropy(p[2])) / 2) / np.log(2))
    close(np.diagonal(pairs), 0)
    close(pairs, pairs.T)
    assert not pairs[1].any()


# ---- masks ---------------------------------------------------------------------------------------------------------

MASKED = {
    "usage": lambda ids, w, x, m: s.usage(s.selections(ids, w, E), m),
    "coactivation": lambda ids, w, x, m: s.coactivation(s.selections(ids, w, E), m),
    "layer_overlap": lambda ids, w, x, m: s.layer_overlap(s.selections(ids[None], w[None], E), m),
    "set_overlap": lambda ids, w, x, m: s.set_overlap(ids, ids[..., ::-1] * 0 + 2, m, weights=w),
    "switch_rate": lambda ids, w, x, m: s.switch_rate(ids, ids[..., ::-1] * 0 + 2, m, weights=w),
    "diversity": lambda ids, w, x, m: s.diversity(x, m, weights=w),
    "entropy": lambda ids, w, x, m: s.masked_mean(s.router_entropy(x[..., 0]), m),
    "margin": lambda ids, w, x, m: s.masked_mean(s.weight_margin(w), m),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_tokens_change_nothing(name):
    mask, inputs = some_mask(), (*ids_and_weights(), np.random.default_rng(8).normal(size=(B, T, K, D)))
    noise = (*ids_and_weights(9), np.full((B, T, K, D), np.nan))

    def run(arrays):
        return MASKED[name](*map(jnp.asarray, arrays), jnp.asarray(mask))

    other = [np.where(mask.reshape(B, T, *[1] * (x.ndim - 2)), x, n) for x, n in zip(inputs, noise, strict=True)]
    assert np.isfinite(run(inputs)).all()
    np.testing.assert_array_equal(run(inputs), run(other))


@pytest.mark.parametrize("name", MASKED)
def test_no_token_is_zero(name):
    inputs = (*ids_and_weights(), np.ones((B, T, K, D), np.float32))
    assert not np.asarray(MASKED[name](*map(jnp.asarray, inputs), jnp.zeros((B, T), bool))).any()


@pytest.mark.parametrize("count", [s.usage_entropy, s.relative_perplexity, s.jain_index, s.largest_load])
def test_no_count_is_finite(count):
    assert np.isfinite(count(np.zeros(E, int)))
    assert np.isfinite(jax.jit(count)(jnp.zeros((L, E), jnp.int32))).all()
