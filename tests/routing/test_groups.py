"""Group-limited selection against numpy, as DeepSeek-V2 (best score of a group) and V3 (two best) publish it."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moejax import MoejaxError
from moejax.routing import GROUP_SCORES, SCORES, WEIGHTS, group_limited, route
from moejax.routing.selection import limit_groups

T, GROUPS, SIZE, K = 7, 4, 3, 5
E = GROUPS * SIZE

# few values, so that ties are common; sums of two are exact
scores_with_ties = arrays(np.float32, (T, E), elements=st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]))
quick = settings(max_examples=50, deadline=None)


def by_sorting(scores: np.ndarray, kept: int, name: str) -> np.ndarray:
    """Loops over tokens and groups, which share nothing with the code under test."""
    limited = np.full_like(scores, -np.inf)
    for token, row in enumerate(scores):
        groups = [row[g * SIZE : (g + 1) * SIZE].tolist() for g in range(GROUPS)]
        rank = {"max": max, "top2": lambda values: sum(sorted(values)[-2:])}[name]
        for g in sorted(range(GROUPS), key=lambda g: (-rank(groups[g]), g))[:kept]:
            limited[token, g * SIZE : (g + 1) * SIZE] = groups[g]
    return limited


@quick
@given(scores_with_ties, st.integers(1, GROUPS), st.sampled_from(list(GROUP_SCORES)))
def test_against_numpy(scores, kept, name):
    np.testing.assert_array_equal(
        group_limited(jnp.asarray(scores), GROUPS, kept, name), by_sorting(scores, kept, name)
    )


@quick
@given(scores_with_ties, st.integers(1, GROUPS))
def test_limit_groups_is_the_sum_of_the_best(scores, kept):
    x = jnp.asarray(scores)
    np.testing.assert_array_equal(limit_groups(x, GROUPS, kept), group_limited(x, GROUPS, kept, "top2"))
    np.testing.assert_array_equal(limit_groups(x, GROUPS, kept, best=1), group_limited(x, GROUPS, kept, "max"))
    np.testing.assert_array_equal(group_limited(x, GROUPS, GROUPS), scores)


def test_the_two_papers_differ():
    """One outstanding expert wins its group a place in V2; two good ones win it in V3."""
    scores = jnp.asarray([[0.9, 0.0, 0.0, 0.6, 0.6, 0.0]])
    assert np.isfinite(group_limited(scores, 2, 1, "max")).tolist() == [[True] * 3 + [False] * 3]
    assert np.isfinite(group_limited(scores, 2, 1, "top2")).tolist() == [[False] * 3 + [True] * 3]


@pytest.mark.parametrize("name", GROUP_SCORES)
def test_routing_within_groups(name):
    """Experts come from the best groups; weights come from the unlimited scores."""
    logits = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32)

    def adjust(scores):
        return group_limited(scores, GROUPS, 2, name)

    got = route(jnp.asarray(logits), K, score=SCORES["sigmoid"], weigh=WEIGHTS["raw"], adjust=adjust)
    sigmoid = 1 / (1 + np.exp(-logits.astype(np.float64)))
    limited = by_sorting(sigmoid, 2, name)
    want = np.argsort(-limited, axis=-1, kind="stable")[:, :K]
    np.testing.assert_array_equal(got.ids, want)
    np.testing.assert_allclose(got.weights, np.take_along_axis(sigmoid, want, -1), rtol=1e-6)
    assert all(len({e // SIZE for e in row}) <= 2 for row in got.ids.tolist())


def test_a_group_score_of_ones_own():
    scores = jnp.asarray([[0.9, 0.0, 0.3, 0.2]])
    limited = group_limited(scores, 2, 1, lambda by_group: by_group.min(-1))
    assert np.isfinite(limited).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("groups", "kept", "name", "message"),
    [
        (5, 1, "max", "cannot keep 1 of 5 groups of 12 experts"),
        (4, 5, "max", "cannot keep 5 of 4 groups"),
        (4, 0, "max", "cannot keep 0 of 4 groups"),
        (4, 2, "best", "group_score='best' is unknown; choose from max, top2"),
    ],
)
def test_mistakes(groups, kept, name, message):
    with pytest.raises(MoejaxError, match=message):
        group_limited(jnp.zeros((T, E)), groups, kept, name)
