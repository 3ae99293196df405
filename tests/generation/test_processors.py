"""Each processor equals its namesake in transformers; histories of unequal length do not affect each other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from moejax.generation import Sampling
from moejax.generation.processors import (
    forbid_early_end,
    forbid_repeated_ngrams,
    forbid_words,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    temper,
)

B, S, V = 5, 19, 11
LENGTHS = (19, 3, 1, 12, 7)
WORDS = [[4], [2, 7], [9, 9], [1, 0, 3], [6, 0, 3], *([a, b, c] for a in range(4) for b in range(4) for c in (5, 8))]


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (B, V)).astype(np.float32)


@pytest.fixture(scope="module")
def history() -> np.ndarray:
    """Four different tokens, so that sequences recur; -1 before the start of the shorter rows."""
    tokens = np.random.default_rng(1).integers(0, 4, (B, S))
    tokens[0, -6:] = [1, 3, 2, 0, 1, 3]
    return np.where(np.arange(S) >= S - np.array(LENGTHS)[:, None], tokens, -1)


HISTORICAL: dict[str, tuple[Callable, Callable]] = {
    **{
        f"penalty {r}": (
            lambda z, h, r=r: penalise_repetition(z, h, r),
            lambda r=r: hf.RepetitionPenaltyLogitsProcessor(r),
        )
        for r in (1.7, 0.6)
    },
    **{
        f"ngram {n}": (
            lambda z, h, n=n: forbid_repeated_ngrams(z, h, n),
            lambda n=n: hf.NoRepeatNGramLogitsProcessor(n),
        )
        for n in (1, 2, 3, 4, 19, 20)
    },
    "words": (lambda z, h: forbid_words(z, h, WORDS), lambda: hf.NoBadWordsLogitsProcessor(WORDS)),
}


@pytest.mark.parametrize("name", HISTORICAL)
def test_processor_equals_transformers(name: str, logits: np.ndarray, history: np.ndarray) -> None:
    ours, make = HISTORICAL[name]
    got = np.asarray(jax.jit(ours)(logits, history))
    assert not np.array_equal(got, logits) or name in ("ngram 19", "ngram 20")
    for row in range(B):
        alone, scores = torch.tensor(history[row : row + 1, S - LENGTHS[row] :]), torch.tensor(logits[row : row + 1])
        np.testing.assert_allclose(got[row], make()(alone, scores)[0].numpy(), rtol=1e-6, err_msg=str(row))


@pytest.mark.parametrize("count", [0, 2, 3])
def test_early_end(count: int, logits: np.ndarray) -> None:
    ends = (4, 9)
    theirs = hf.MinNewTokensLengthLogitsProcessor(S, 3, list(ends))
    want = theirs(torch.zeros(B, S + count, dtype=torch.long), torch.tensor(logits))
    np.testing.assert_array_equal(forbid_early_end(jnp.asarray(logits), count, 3, ends), want)


def test_words_that_end_a_text_are_left_to_min_new_tokens(logits: np.ndarray, history: np.ndarray) -> None:
    """As in transformers; longer sequences that contain the end are forbidden."""
    sampling = Sampling(bad_words=[[4], [6], [0, 4]])
    got = jax.jit(sampling.process, static_argnums=3)(logits, history, 0, (4,))
    want = hf.NoBadWordsLogitsProcessor([[4], [6], [0, 4]], eos_token_id=[4])
    for row in range(B):
        alone = torch.tensor(history[row : row + 1, S - LENGTHS[row] :])
        np.testing.assert_array_equal(got[row], want(alone, torch.tensor(logits[row : row + 1]))[0])


WIDE = np.random.default_rng(2).normal(0, 3, (64, 97)).astype(np.float32)
LIMITS: dict[str, tuple[Callable, Callable]] = {
    **{f"k {k}": (lambda z, k=k: keep_top_k(z, k), lambda k=k: hf.TopKLogitsWarper(k)) for k in (1, 7, 97, 200)},
    **{
        f"p {p}": (lambda z, p=p: keep_top_p(z, p), lambda p=p: hf.TopPLogitsWarper(p)) for p in (1e-4, 0.3, 0.9, 0.999)
    },
    **{f"t {t}": (lambda z, t=t: temper(z, t), lambda t=t: hf.TemperatureLogitsWarper(t)) for t in (0.3, 2.5)},
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit_equals_transformers(name: str) -> None:
    ours, make = LIMITS[name]
    got, want = np.asarray(jax.jit(ours)(WIDE)), make()(torch.zeros(64, 1), torch.tensor(WIDE)).numpy()
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_limits_together_equal_transformers() -> None:
    """Temperature first, then top-k, then top-p on what is left."""
    want = torch.tensor(WIDE)
    for warper in (hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.8)):
        want = warper(torch.zeros(64, 1), want)
    got = np.asarray(jax.jit(Sampling(0.7, 20, 0.8).limited)(WIDE))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_all_processors_come_in_the_order_of_transformers(logits: np.ndarray, history: np.ndarray) -> None:
    sampling = Sampling(repetition_penalty=1.4, no_repeat_ngram_size=2, bad_words=WORDS, min_new_tokens=4)
    got = jax.jit(sampling.process, static_argnums=3)(logits, history, 1, (10,))
    chain = [hf.RepetitionPenaltyLogitsProcessor(1.4), hf.NoRepeatNGramLogitsProcessor(2)]
    chain += [hf.NoBadWordsLogitsProcessor(WORDS), hf.MinNewTokensLengthLogitsProcessor(0, 99, 10)]
    for row in range(B):
        alone, want = torch.tensor(history[row : row + 1, S - LENGTHS[row] :]), torch.tensor(logits[row : row + 1])
        for processor in chain:
            want = processor(alone, want)
        np.testing.assert_allclose(got[row], want[0], rtol=1e-6)
