"""Logits processors, applied before a token is chosen: one pure function each, with the results of ``transformers``.

``history`` holds the token ids of each row's prompt and answer so far, the newest last. Padding in it is -1, so that a
row of a batch is treated as it would be alone. A forbidden token gets the logit minus infinity.

Letters of shapes: ``Q`` rows, ``Z`` tokens of the history, ``V`` vocabulary.
"""

from collections.abc import Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Number = float | int | Float[Array, ""] | Int[Array, ""]
"""A setting; traced in a compiled program, so that another value needs no other program."""


def penalise_repetition(
    logits: Float[Array, "Q V"], history: Int[Array, "Q Z"], penalty: Number
) -> Float[Array, "Q V"]:
    """``z / penalty`` where z > 0, else ``z * penalty``, for each token of the history, however often it occurs.

    Source: Keskar et al. 2019 (CTRL), section 4.1, which has ``z / penalty`` for both signs.
    """
    changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(_holds(history, logits.shape[-1]), changed, logits)


def forbid_repeated_ngrams(logits: Float[Array, "Q V"], history: Int[Array, "Q Z"], size: int) -> Float[Array, "Q V"]:
    """Forbid tokens that would complete a sequence of ``size`` tokens which the history already holds.

    The last ``size - 1`` tokens are the suffix: every h[i] with h[i-size+1:i] = suffix is forbidden.
    Source: Paulus et al. 2017 (A deep reinforced model for abstractive summarization), section 2.5.
    """
    windows = history.shape[1] - size + 1
    if windows < 1:
        return logits
    follows = jnp.ones((len(history), windows), bool)
    for offset in range(size - 1):
        follows &= history[:, offset : offset + windows] == history[:, windows + offset, None]
    return _forbid(logits, _holds(jnp.where(follows, history[:, size - 1 :], -1), logits.shape[-1]))


def forbid_words(
    logits: Float[Array, "Q V"], history: Int[Array, "Q Z"], words: Sequence[Sequence[int]]
) -> Float[Array, "Q V"]:
    """Forbid tokens that would complete one of ``words``: w[-1] is forbidden where the history ends in w[:-1].

    Source: ``bad_words_ids`` of ``transformers``.
    """
    for length, group in groupby(sorted(words, key=len), key=len):
        words_of_length = np.array(list(group), np.int32)
        if length - 1 > history.shape[1]:
            break
        begun = words_of_length[:, :-1] == history[:, None, history.shape[1] - length + 1 :]
        completing = jnp.where(begun.all(-1), words_of_length[:, -1], -1)
        logits = _forbid(logits, _holds(completing, logits.shape[-1]))
    return logits


def forbid_early_end(
    logits: Float[Array, "Q V"], count: Int[Array, ""] | int, minimum: Number, eos_ids: tuple[int, ...]
) -> Float[Array, "Q V"]:
    """Forbid the end of a text while ``count``, the number of new tokens so far, is below ``minimum``."""
    ends = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(eos_ids, jnp.int32))
    return _forbid(logits, ends & (count < minimum))


def temper(logits: Float[Array, "Q V"], temperature: Number) -> Float[Array, "Q V"]:
    """``z / temperature``."""
    return logits / temperature


def keep_top_k(logits: Float[Array, "Q V"], count: int) -> Float[Array, "Q V"]:
    """Keep the ``count`` best tokens and those tied with the last of them; forbid all others.

    Source: Fan et al. 2018 (Hierarchical neural story generation), section 5.1.
    """
    last = jax.lax.top_k(logits, min(count, logits.shape[-1]))[0][:, -1:]
    return _forbid(logits, logits < last)


def keep_top_p(logits: Float[Array, "Q V"], mass: Number) -> Float[Array, "Q V"]:
    """Keep the smallest set of best tokens whose probabilities sum to at least ``mass``; forbid all others.

    Tokens are left out from the least likely up, while their sum stays within ``1 - mass``. The best token stays.
    Source: Holtzman et al. 2019 (The curious case of neural text degeneration), section 3.1.
    """
    # summed from the least likely token, as in transformers: small numbers keep their digits. The first of equals stays
    order = jnp.argsort(-logits, axis=-1)[:, ::-1]
    worst_first = jnp.take_along_axis(logits, order, axis=-1)
    outside = jnp.cumsum(jax.nn.softmax(worst_first, axis=-1), axis=-1) <= 1 - mass
    outside = outside.at[:, -1].set(False)
    rows = jnp.arange(len(logits))[:, None]
    return _forbid(logits, jnp.zeros(logits.shape, bool).at[rows, order].set(outside))


def _forbid(logits: Float[Array, "Q V"], forbidden: Bool[Array, "*b V"]) -> Float[Array, "Q V"]:
    return jnp.where(forbidden, -jnp.inf, logits)


def _holds(ids: Int[Array, "Q Z"], vocabulary: int) -> Bool[Array, "Q V"]:
    """Return whether each row of ``ids`` holds each token of the vocabulary; -1 stands for no token."""
    # -1 would index the last token; an index behind the end is dropped
    rows, columns = jnp.arange(len(ids))[:, None], jnp.where(ids < 0, vocabulary, ids)
    return jnp.zeros((len(ids), vocabulary), bool).at[rows, columns].set(True, mode="drop")
