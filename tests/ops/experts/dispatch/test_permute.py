"""Rows by expert: the row of each slot, and that the contents of rows without a slot never count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.layers.feed_forward.activation import GLU
from moejax.layers.feed_forward.expert_stack import combine
from moejax.layers.feed_forward.experts import Experts
from moejax.ops.experts import assign, permute, unpermute
from moejax.ops.experts.matmul.registry import MATMULS
from moejax.rules import AttnLRP, Gates, Proportional, Reading
from moejax.rules.rule import Rule

B, T, K, E, D, F, WIDTH = 2, 5, 3, 6, 7, 4, 9


def some_ids(seed: int, skew: float, tokens: int = B * T) -> np.ndarray:
    """Distinct experts for each token, the first ones favoured."""
    rng = np.random.default_rng(seed)
    logits = rng.gumbel(size=(tokens, E)) - skew * np.arange(E)
    return np.argsort(-logits, axis=1)[:, :K].astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 10), st.sampled_from([None, 2]), st.booleans())
def test_every_slot_has_a_row_of_its_expert(seed, skew, limit, by_expert):
    ids = some_ids(seed, skew)
    assignment = assign(jnp.asarray(ids), E, by_expert=by_expert)
    assignment = assignment if limit is None else assignment.limited(limit)
    assigned = np.asarray(assignment.rank_in_expert) >= 0
    assert assigned.sum() == np.asarray(assignment.group_sizes).sum()
    slot_to_row, row_to_slot, expert = (
        np.asarray(a) for a in (assignment.slot_to_row, assignment.row_to_slot, assignment.row_expert)
    )
    assert len(set(slot_to_row[assigned])) == assigned.sum(), "no two share a row"
    np.testing.assert_array_equal(row_to_slot[slot_to_row[assigned]], np.flatnonzero(assigned.ravel()))
    np.testing.assert_array_equal(expert[slot_to_row[assigned]], ids[assigned])
    others = np.setdiff1d(np.arange(len(row_to_slot)), slot_to_row[assigned])
    assert (expert[others] == E).all(), "rows without a slot have no expert"
    if by_expert:
        assert (np.asarray(assignment.group_offsets) % 8 == 0).all()
        for e in range(E):
            rows = np.sort(slot_to_row[assigned & (ids == e)])
            np.testing.assert_array_equal(rows, assignment.group_offsets[e] + np.arange(len(rows)))


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("width", [1, K])
def test_the_copies_are_each_other_transposed(width, limit):
    assignment = assign(jnp.asarray(some_ids(0, 1.0)), E)
    assignment = assignment if limit is None else assignment.limited(limit)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B * T, width, D)), jnp.float32)
    slots = unpermute(permute(x, assignment), assignment)
    assigned = np.asarray(assignment.rank_in_expert >= 0)[..., None]
    np.testing.assert_array_equal(slots, np.where(assigned, np.broadcast_to(x, slots.shape), 0))
    received = jnp.asarray(rng.normal(size=slots.shape), jnp.float32)
    (dx,) = jax.vjp(lambda x: unpermute(permute(x, assignment), assignment), x)[1](received)
    want = np.where(assigned, received, 0)
    np.testing.assert_allclose(dx, want.sum(1, keepdims=True) if width == 1 else want, rtol=1e-6)


def everything(experts: Experts, x, weights, ids, rule: Rule, limit: int | None) -> list:
    """Output, gradients in all parameters and inputs, relevance of slots and neurons, the ledger's entries."""
    assignment = assign(ids.reshape(-1, K), E)
    assignment = assignment if limit is None else assignment.limited(limit)
    gates = Gates(slots=jnp.ones((B, T, K)))
    probes = {name: jnp.zeros((B, T)) for name in ("activation", "bias", "router")}
    taps = {"neurons": jnp.ones((B, T, K, F))}

    def run(experts, x, weights, gates, probes, taps):
        reading = Reading(rule, gates, probes, taps)
        return experts.mixed(x[:, :, None], assignment, weights, ids, reading)

    y, pull = jax.vjp(run, experts, x, weights, gates, probes, taps)
    received = jnp.asarray(np.random.default_rng(1).normal(size=(2, *y.shape)), y.dtype)
    return [y, pull(received[0]), jax.vmap(pull)(received)]


@pytest.mark.parametrize(
    "rule", [Rule(), AttnLRP(), Proportional(saturation=True)], ids=["calculus", "attnlrp", "backtrace"]
)
@pytest.mark.parametrize("limit", [None, 2])
def test_rows_without_a_slot_may_hold_anything(monkeypatch, rule, limit):
    """The kernel leaves them as it finds the memory: here they are not numbers, in every product."""
    rng = np.random.default_rng(0)

    def some(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    experts = Experts(some(E, 2, F, D), some(E, WIDTH, F), some(E, 2, F), some(E, WIDTH), GLU(limit=1.0, offset=1.0))
    x, weights, ids = some(B, T, D), some(B, T, K), jnp.asarray(some_ids(3, 2.0)).reshape(B, T, K)
    want = everything(experts, x, weights, ids, rule, limit)
    padded = MATMULS["padded"].product

    def leaving(x, weight, assignment, transpose):
        y = padded(x, weight, assignment, transpose)
        held = (assignment.row_expert < E).reshape(-1, *[1] * (y.ndim - 1))
        return jnp.where(held, y, jnp.nan)

    monkeypatch.setattr(MATMULS["padded"], "product", leaving)
    got = everything(experts, x, weights, ids, rule, limit)
    assert (assign(ids.reshape(-1, K), E).row_expert == E).any(), "there are such rows"
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_combine_takes_the_sum_it_is_given():
    """As where experts are split over devices: the sum over slots is completed by that over devices."""
    rng = np.random.default_rng(0)
    outputs, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, K, D), (B, T, K)))
    ids = jnp.asarray(some_ids(0, 0.0)).reshape(B, T, K)
    for rule in (AttnLRP(), AttnLRP("proportional"), Proportional()):
        alone = combine(outputs, weights, ids, Reading(rule))
        np.testing.assert_allclose(combine(outputs, weights, ids, Reading(rule), psum=lambda y: 2 * y), 2 * alone)
