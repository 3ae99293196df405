"""Unassigned slots: zero products, no row in a buffer, no gradient; limited group sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import expert_matmul

from moejax.ops.experts import assign

D, M, E, K = 5, 4, 6, 3


@st.composite
def slots(draw: st.DrawFn) -> np.ndarray:
    """Ids of some tokens: distinct where they are experts, anything from ``E`` on elsewhere."""
    tokens = draw(st.sampled_from([1, 7]))
    rows = [draw(st.permutations(range(E)))[:K] for _ in range(tokens)]
    unassigned = [[draw(st.sampled_from([None, None, E, E + 4])) for _ in range(K)] for _ in range(tokens)]
    return np.array([[n or i for i, n in zip(*both, strict=True)] for both in zip(rows, unassigned, strict=True)])


def by_loop(x, weight, ids, cotangent, limit: int | None):
    """Product, gradients and loads; an expert takes its first ``limit`` slots."""
    y, dx, dw, load = np.zeros((*ids.shape, M)), np.zeros_like(x), np.zeros_like(weight), np.zeros(E, int)
    for t, k in np.ndindex(ids.shape):
        e, row = ids[t, k], k % x.shape[1]
        if e >= E or (limit is not None and load[e] >= limit):
            continue
        load[e] += 1
        y[t, k] = weight[e] @ x[t, row]
        dx[t, row] += weight[e].T @ cotangent[t, k]
        dw[e] += np.outer(cotangent[t, k], x[t, row])
    return y, dx, dw, load


@jax.jit(static_argnames=("implementation", "limit"))
def run(x, weight, ids, cotangent, *, implementation, limit):
    assignment = assign(ids, E, allow_unassigned=True)
    if limit is not None:
        assignment = assignment.limited(limit)
    y, pull = jax.vjp(lambda x, w: expert_matmul(x, w, assignment, implementation=implementation), x, weight)
    return y, *pull(cotangent), assignment.group_sizes


def check(ids: np.ndarray, implementation: str, limit: int | None, shared: bool, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(ids), 1 if shared else K, D))
    weight, cotangent = rng.normal(size=(E, M, D)), rng.normal(size=(*ids.shape, M))
    results = run(*map(jnp.asarray, (x, weight, ids, cotangent)), implementation=implementation, limit=limit)
    for name, got, want in zip(
        ("y", "dx", "dw", "group_sizes"), results, by_loop(x, weight, ids, cotangent, limit), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["gather", "padded"])
@settings(max_examples=25, deadline=None)
@given(ids=slots(), limit=st.sampled_from([None, 2]), shared=st.booleans(), seed=st.integers(0, 99))
def test_against_a_loop(implementation, ids, limit, shared, seed):
    with jax.enable_x64(True):
        check(ids, implementation, limit, shared, seed)


@pytest.mark.usefixtures("x64")
def test_all_slots_are_unassigned():
    check(np.full((7, K), E), "padded", None, shared=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("hot", [70, 301])
def test_loads_beyond_the_first_buffer(hot, limit):
    """Most tokens take expert 0 alone: a larger buffer, and several passes where none is large enough."""
    ids = np.full((301, K), E)
    ids[:hot, 1] = 0
    ids[::9, 2] = 3
    check(ids, "padded", limit, shared=False)
