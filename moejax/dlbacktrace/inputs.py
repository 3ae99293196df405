"""The inputs of a call as token ids: from texts or ids, from torch, numpy, JAX or lists, padded on any side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from moejax.errors import PromptError
from moejax.lm import LM
from moejax.models.padding import bucket_length, left_pad


@dataclass(frozen=True)
class EncodedInputs:
    """Token ids in the columns in which they were given.

    Attributes:
        ids: token ids.
        valid: True at tokens, False at padding.
        tight: True if rows are padded to the longest one only, because a layer couples the sequences of a batch.
    """

    ids: Int[np.ndarray, "B T"]
    valid: Bool[np.ndarray, "B T"]
    tight: bool = False

    @property
    def rows(self) -> list[list[int]]:
        """Token ids of each row without its padding."""
        return [ids[valid].tolist() for ids, valid in zip(self.ids, self.valid, strict=True)]

    @cached_property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Number of tokens of each row."""
        return self.valid.sum(1)

    @property
    def width(self) -> int:
        """Number of positions ``W`` of the rows of :meth:`left`, at least the length of the longest row."""
        longest = int(self.lengths.max())
        return longest if self.tight else bucket_length(longest)

    def left(self, pad_id: int) -> tuple[Int[Array, "B W"], Bool[Array, "B W"]]:
        """The rows aligned at their ends, as the model reads them, and where they hold tokens."""
        return left_pad(self.rows, self.width, pad_id)

    @cached_property
    def positions(self) -> Int[np.ndarray, "B T"]:
        """Position of each column's token in the rows of :meth:`left`; padding gets the position behind their end."""
        offsets = (self.width - self.lengths)[:, None]
        return np.where(self.valid, offsets + np.cumsum(self.valid, axis=1) - 1, self.width)

    def in_columns(self, x: Shaped[np.ndarray, "B W *s"], columns: int) -> Shaped[np.ndarray, "B T *s"]:
        """Values at the positions of :meth:`left`, moved to the first ``columns`` columns as given; zero at padding."""
        if self.valid.all() and x.shape[1] == self.valid.shape[1]:
            return x[:, :columns]
        with_zero = np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)
        return with_zero[np.arange(len(x))[:, None], self.positions[:, :columns]]

    def last_columns(self, columns: int | None = None) -> Int[np.ndarray, " B"]:
        """The column of each row's last token, among the first ``columns`` if given."""
        valid = self.valid[:, :columns]
        return valid.shape[1] - 1 - np.argmax(valid[:, ::-1], axis=1)

    def repeated(self, times: int) -> "EncodedInputs":
        """Every row ``times`` times, side by side."""
        return replace(self, ids=self.ids.repeat(times, axis=0), valid=self.valid.repeat(times, axis=0))

    def followed_by(self, ids: Int[np.ndarray, "B A"], lengths: Int[np.ndarray, " B"]) -> "EncodedInputs":
        """These columns with ``ids`` behind them; the first ``lengths`` of a row's ``ids`` are tokens."""
        valid = np.arange(ids.shape[1]) < lengths[:, None]
        ids, valid = np.concatenate([self.ids, ids], axis=1), np.concatenate([self.valid, valid], axis=1)
        return replace(self, ids=ids, valid=valid)


def to_numpy(values: Any) -> np.ndarray:
    """An array of torch, JAX or numpy, or a list, as a numpy array.

    Raises:
        PromptError: rows of unequal length.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise PromptError("rows of unequal length: pad them and say so with an attention_mask.") from error


def read_inputs(inputs: Any, tokenizer: Any, lm: LM, bos_id: int | None = None) -> EncodedInputs:
    """Encode a text or several, a mapping with ``input_ids``, a pair of ids and mask, or ids alone.

    Args:
        tokenizer: encodes texts; ``None`` takes the model's tokenizer.
        bos_id: token id that an empty prompt begins with.

    Raises:
        PromptError: nothing to read, an id outside the vocabulary, or a mask of another shape.
    """
    if inputs is None:
        raise PromptError("there are no inputs: pass inputs={'input_ids': ..., 'attention_mask': ...}, or a text.")
    mask = None
    if isinstance(inputs, str) or (isinstance(inputs, Sequence) and inputs and isinstance(inputs[0], str)):
        inputs = _padded([encode(text, tokenizer, lm) for text in ([inputs] if isinstance(inputs, str) else inputs)])
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise PromptError(f"inputs have no 'input_ids', only {', '.join(map(repr, inputs)) or 'nothing'}.")
        inputs, mask = inputs["input_ids"], inputs.get("attention_mask")
    elif isinstance(inputs, tuple) and len(inputs) == 2:
        inputs, mask = inputs
    ids = np.atleast_2d(to_numpy(inputs))
    valid = np.ones(ids.shape, bool) if mask is None else np.atleast_2d(to_numpy(mask))
    if ids.ndim != 2 or valid.shape != ids.shape:
        raise PromptError(f"ids of shape {ids.shape} with an attention_mask of shape {valid.shape}: both are [B T].")
    if not np.isin(valid, (0, 1)).all():
        raise PromptError("an attention_mask holds ones and zeros; several prompts are a list, not a pair.")
    return _checked(ids, valid.astype(bool), lm, bos_id)


def _checked(ids: np.ndarray, valid: np.ndarray, lm: LM, bos_id: int | None) -> EncodedInputs:
    if bos_id is not None and not valid.any(1).all():
        # a row without a token begins with the start token
        ids = np.concatenate([ids.astype(int), np.full((len(ids), 1), bos_id)], axis=1)
        valid = np.concatenate([valid, ~valid.any(1, keepdims=True)], axis=1)
    if valid.size == 0 or not valid.any(1).all():
        raise PromptError("a prompt is empty: there is no token to predict from.")
    lm.check(ids[valid])
    return EncodedInputs(ids.astype(np.int64), valid, tight=lm.config.couples_sequences)


def _padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unequal length as left-padded ids and their mask."""
    lengths, width = np.array([len(row) for row in rows]), max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows], np.int64).reshape(len(rows), width)
    return ids, np.arange(width) >= width - lengths[:, None]


def encode(text: str, tokenizer: Any, lm: LM) -> list[int]:
    """Token ids of a text, by ``tokenizer``, or by the model's if it is ``None``.

    Raises:
        PromptError: neither the caller nor the model has a tokenizer.
    """
    if tokenizer is None:
        return lm.need_tokenizer().encode(text)
    ids = tokenizer.encode(text)
    return list(getattr(ids, "ids", ids))


def pieces(ids: Sequence[int], tokenizer: Any, lm: LM) -> list[str]:
    """Text of each token, or its id if there is no tokenizer."""
    if tokenizer is None:
        return lm.pieces(ids)
    if hasattr(tokenizer, "pieces"):
        return tokenizer.pieces(ids)
    return [tokenizer.decode([i], skip_special_tokens=False) for i in ids]


def token_ids(value: Any) -> tuple[int, ...] | None:
    """One id or several as a tuple; ``None`` stays ``None``."""
    return None if value is None else tuple(int(i) for i in np.atleast_1d(to_numpy(value)))
