"""Padding of token rows: to which lengths, and on which side."""

import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from moejax.models.config import Config
from moejax.rules import Gates


def bucket_length(length: int) -> int:
    """Round ``length`` up to one of few lengths, so that most prompts find their program compiled.

    The lengths are powers of two from 16 to 64, since fewer tokens take as long as 64, and above 64 four lengths
    between one power of two and the next.
    """
    step = max(16, 1 << (length - 1).bit_length()) // (1 if length <= 64 else 8)
    return -(-length // step) * step


def padded_length(config: Config, length: int, gates: Gates | None) -> int:
    """Return the length to which prompts of ``length`` tokens are padded (:func:`bucket_length`).

    It is ``length`` itself where padding would change the result: if a layer couples sequences, or if gates hold for
    single tokens.
    """
    by_token = any(gate.shape[2:3] > (1,) for gate in jax.tree.leaves(gates))
    return length if by_token or config.couples_sequences else bucket_length(length)


def warn_beyond_context(config: Config, length: int) -> None:
    """Warn if a sequence of ``length`` tokens is longer than the context that the model was made for."""
    if length > config.max_positions:
        text = f"{length} tokens exceed the context of {config.max_positions} that the model was made for."
        warnings.warn(text, stacklevel=3)


def left_pad(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Align rows of unequal length at their ends; return the tokens, and true where they are no padding."""
    tokens, valid = np.full((len(rows), width), pad_id, np.int32), np.zeros((len(rows), width), bool)
    for out, real, row in zip(tokens, valid, rows, strict=True):
        out[width - len(row) :], real[width - len(row) :] = row, True
    return jnp.asarray(tokens), jnp.asarray(valid)


def right_pad(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> Int[Array, "B T"]:
    """Align rows of unequal length at their beginnings: no token attends to the padding behind it."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    for out, row in zip(tokens, rows, strict=True):
        out[: len(row)] = row
    return jnp.asarray(tokens)
