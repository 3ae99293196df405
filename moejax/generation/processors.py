"""What may be done to a step's logits before a token is chosen: one pure function a rule, each as in ``transformers``.

``history`` holds the ids of each row's prompt and answer so far, the newest last, and -1 where there is none (padding),
so that a row of a batch is treated as it would be alone. A forbidden token has the logit minus infinity.
"""

from collections.abc import Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Settings are traced numbers in a compiled program, so that another value needs no new one.
Number = float | int | Float[Array, ""] | Int[Array, ""]


def penalise_repetition(
    logits: Float[Array, "B V"], history: Int[Array, "B S"], penalty: Number
) -> Float[Array, "B V"]:
    """``z / penalty`` where z > 0, else ``z * penalty``, for each token of the history, however often it occurs.

    Source: Keskar et al. 2019 (CTRL), section 4.1, which has ``z / penalty`` for both signs.
    """
    changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(_among(history, logits.shape[-1]), changed, logits)


def forbid_repeated_ngrams(logits: Float[Array, "B V"], history: Int[Array, "B S"], size: int) -> Float[Array, "B V"]:
    """No token that would end a sequence of ``size`` tokens which the history already holds.

    With the last ``size - 1`` tokens called the suffix: forbidden is every h[i] with h[i-size+1:i] = suffix.
    Source: Paulus et al. 2017 (A deep reinforced model for abstractive summarization), section 2.5.
    """
    windows = history.shape[1] - size + 1
    if windows < 1:
        return logits
    follows = jnp.ones((len(history), windows), bool)
    for place in range(size - 1):
        follows &= history[:, place : place + windows] == history[:, windows + place, None]
    return _forbid(logits, _among(jnp.where(follows, history[:, size - 1 :], -1), logits.shape[-1]))


def forbid_words(
    logits: Float[Array, "B V"], history: Int[Array, "B S"], words: Sequence[Sequence[int]]
) -> Float[Array, "B V"]:
    """No token that would complete one of ``words``: w[-1] is forbidden where the history ends in w[:-1].

    Source: the ``bad_words_ids`` of ``transformers``.
    """
    for length, group in groupby(sorted(words, key=len), key=len):
        words_of_length = np.array(list(group), np.int32)
        if length - 1 > history.shape[1]:
            break
        begun = words_of_length[:, :-1] == history[:, None, history.shape[1] - length + 1 :]
        completing = jnp.where(begun.all(-1), words_of_length[:, -1], -1)
        logits = _forbid(logits, _among(completing, logits.shape[-1]))
    return logits


def forbid_early_end(
    logits: Float[Array, "B V"], count: Int[Array, ""] | int, minimum: Number, eos_ids: tuple[int, ...]
) -> Float[Array, "B V"]:
    """No end of text while the ``count`` tokens generated so far are fewer than ``minimum``."""
    ends = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(eos_ids, jnp.int32))
    return _forbid(logits, ends & (count < minimum))


def temper(logits: Float[Array, "B V"], temperature: Number) -> Float[Array, "B V"]:
    """``z / temperature``."""
    return logits / temperature


def keep_top_k(logits: Float[Array, "B V"], count: int) -> Float[Array, "B V"]:
    """Only the ``count`` best tokens, and those tied with the last of them.

    Source: Fan et al. 2018 (Hierarchical neural story generation), section 5.1.
    """
    last = jax.lax.top_k(logits, min(count, logits.shape[-1]))[0][:, -1:]
    return _forbid(logits, logits < last)


def keep_top_p(logits: Float[Array, "B V"], mass: Number) -> Float[Array, "B V"]:
    """Only the best tokens, as few as have at least the probability ``mass`` together.

    Left out from the least likely up, as long as the sum of what is left out stays within ``1 - mass``; the best stays.
    Source: Holtzman et al. 2019 (The curious case of neural text degeneration), section 3.1.
    """
    # summed from the unlikely end, as transformers does: the small numbers keep their digits. Of equals the first stays
    order = jnp.argsort(-logits, axis=-1)[:, ::-1]
    worst_first = jnp.take_along_axis(logits, order, axis=-1)
    outside = jnp.cumsum(jax.nn.softmax(worst_first, axis=-1), axis=-1) <= 1 - mass
    outside = outside.at[:, -1].set(False)
    rows = jnp.arange(len(logits))[:, None]
    return _forbid(logits, jnp.zeros(logits.shape, bool).at[rows, order].set(outside))


def _forbid(logits: Float[Array, "B V"], which: Bool[Array, "*b V"]) -> Float[Array, "B V"]:
    return jnp.where(which, -jnp.inf, logits)


def _among(ids: Int[Array, "B N"], vocabulary: int) -> Bool[Array, "B V"]:
    """Which tokens of the vocabulary each row of ``ids`` names; -1 names none."""
    # a negative index would count from the end, one behind the end is dropped
    rows, named = jnp.arange(len(ids))[:, None], jnp.where(ids < 0, vocabulary, ids)
    return jnp.zeros((len(ids), vocabulary), bool).at[rows, named].set(True, mode="drop")
