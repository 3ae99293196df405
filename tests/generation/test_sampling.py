"""The limits on sampling equal an independent numpy version, and the draws follow their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moejax.generation import Sampling

B, V = 3, 11


def keys(count: int, seed: int = 1) -> jax.Array:
    """Random keys, one for each row."""
    return jax.random.split(jax.random.key(seed), count)


def expected_limits(row: np.ndarray, temperature: float, top_k: int, top_p: float) -> tuple[np.ndarray, float]:
    """Tempered logits with -inf outside the limits, and how close the sum came to ``top_p``.

    Goes from the best token down, one at a time.
    """
    scaled = row.astype(np.float64) / temperature
    kept = np.full(V, True)
    if top_k:
        kept = np.array([(scaled > s).sum() < top_k for s in scaled])
    weights = np.where(kept, np.exp(scaled - scaled.max()), 0)
    probability = weights / weights.sum()
    reached, margin = 0.0, np.inf
    # a limit of 1 keeps all, even a token so unlikely that those before it sum to 1 in float64
    for token in np.argsort(-scaled, kind="stable") if top_p < 1 else ():
        margin = min(margin, abs(reached - top_p))
        if reached >= top_p:
            kept[token] = False
        reached += probability[token]
    return np.where(kept, scaled, -np.inf), margin


# multiples of 1/64: ties are likely, and no number is so small that XLA flushes it to zero
LOGITS = hnp.arrays(np.int32, (B, V), elements=st.integers(-512, 512)).map(lambda a: (a / 64).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, V + 2),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_limits_equal_numpy(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    rows, margins = zip(*(expected_limits(row, temperature, top_k, top_p) for row in logits), strict=True)
    assume(top_p == 1 or min(margins) > 1e-5)
    limited = np.asarray(Sampling(temperature, top_k, top_p).limited(jnp.asarray(logits)))
    np.testing.assert_array_equal(np.isfinite(limited), np.isfinite(rows))
    np.testing.assert_allclose(limited, rows, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(logits=LOGITS, top_p=st.floats(1e-6, 1))
def test_the_best_token_is_always_kept(logits: np.ndarray, top_p: float) -> None:
    limited = Sampling(1.0, 0, top_p).limited(jnp.asarray(logits))
    assert np.isfinite(np.take_along_axis(np.asarray(limited), logits.argmax(-1)[:, None], 1)).all()


@pytest.mark.fast
def test_tokens_tied_with_the_last_are_kept() -> None:
    limited = Sampling(1.0, top_k=2).limited(jnp.array([[3.0, 1.0, 2.0, 2.0, 2.0]]))
    assert np.isfinite(limited).tolist() == [[True, False, True, True, True]]


@pytest.mark.fast
def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampling().draw(jnp.array([[1.0, 4.0, 4.0], [0.0, 0.0, 0.0]]), keys(2)).tolist() == [1, 0]


@pytest.mark.fast
def test_one_kept_token_is_the_greedy_choice() -> None:
    logits = jax.random.normal(jax.random.key(0), (40, 31))
    for sampling in (Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-6)):
        drawn = sampling.draw(sampling.limited(logits), keys(len(logits)))
        assert drawn.tolist() == Sampling().draw(logits, keys(len(logits))).tolist()


def test_draws_follow_the_limited_distribution() -> None:
    """40 000 draws: each token's count is within 4.5 standard deviations, and no token outside the limits is drawn."""
    logits, sampling, draws = jnp.array([0.0, 1.0, 2.0, 2.5, -1.0, 0.5, -3.0]), Sampling(1.5, 5, 0.9), 40_000
    limited = sampling.limited(logits[None])
    counts = np.bincount(np.asarray(sampling.draw(jnp.tile(limited, (draws, 1)), keys(draws, 7))), minlength=7)
    probability = np.asarray(jax.nn.softmax(limited[0]), np.float64)
    assert 2 < (probability > 0).sum() < 6
    assert not counts[probability == 0].any()
    deviation = np.sqrt(draws * probability * (1 - probability))
    assert (np.abs(counts - draws * probability) <= 4.5 * deviation).all()


def test_rows_are_drawn_independently() -> None:
    drawn = Sampling(1.0).draw(jnp.zeros((200, 50)), keys(200))
    assert len(set(drawn.tolist())) > 30
