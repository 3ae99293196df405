"""Ranks and group sizes against counting, and the example of the module's docstring."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import ids_with_load

from moejax.ops.experts import assign, padded_rows


def test_the_documented_example():
    """Three tokens, two slots each, four experts."""
    ids = jnp.array([[2, 0], [2, 3], [0, 2]])
    assignment = assign(ids, 4)
    assert assignment.rank_in_expert.tolist() == [[0, 0], [1, 0], [1, 2]]
    assert assignment.group_sizes.tolist() == [2, 0, 3, 1]
    assert assignment.group_offsets.tolist() == [0, 8, 16, 24]
    assert assignment.slot_to_row.tolist() == [[16, 0], [17, 24], [1, 18]]
    assert len(assignment.row_to_slot) == padded_rows(6, 4) == 32
    rows = [0, 1, 16, 17, 18, 24]
    assert assignment.row_to_slot[jnp.array(rows)].tolist() == [1, 4, 0, 2, 5, 3]
    experts = dict(zip(rows, [0, 0, 2, 2, 2, 3], strict=True))
    assert assignment.row_expert.tolist() == [experts.get(row, 4) for row in range(32)]


class TestAssign:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1, 1), (7, 2, 6), (5, 6, 6), (13, 1, 4)]))
    def test_against_counting(self, seed, shape):
        tokens, slots, experts = shape
        rng = np.random.default_rng(seed)
        ids = np.stack([rng.permutation(experts)[:slots] for _ in range(tokens)]).astype(np.int32)
        assignment = assign(jnp.asarray(ids), experts)
        seen = [0] * experts
        for t in range(tokens):
            for k in range(slots):
                assert assignment.rank_in_expert[t, k] == seen[ids[t, k]]
                seen[ids[t, k]] += 1
        assert assignment.group_sizes.tolist() == seen
        np.testing.assert_array_equal(assignment.ids, ids)

    def test_ranks_are_unique(self):
        assignment = assign(jnp.asarray(ids_with_load(101, 2, 40, 50)), 40)
        positions = list(zip(assignment.ids.ravel().tolist(), assignment.rank_in_expert.ravel().tolist(), strict=True))
        assert len(set(positions)) == 202
