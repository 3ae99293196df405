"""Packed token corpora and random windows from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, PRNGKeyArray

from moejax.errors import MoejaxError


@dataclass(frozen=True)
class Corpus:
    """Documents as one array of token ids, each followed by the end-of-text token.

    Attributes:
        starts: first token of each document.
        domains: label of each document.
    """

    tokens: Integer[np.ndarray, " n"]
    starts: Int[np.ndarray, " d"]
    domains: Int[np.ndarray, " d"]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an ``.npz`` with ``tokens``, ``doc_starts`` and ``doc_domain``.

        Raises:
            MoejaxError: the file is missing or lacks an array.
        """
        if not path.exists():
            raise MoejaxError(f"{path}: no such corpus; make it with scripts/prepare_corpus.py.")
        with np.load(path) as arrays:
            names = ("tokens", "doc_starts", "doc_domain")
            if missing := [name for name in names if name not in arrays]:
                raise MoejaxError(f"{path}: not a prepared corpus: no {', '.join(missing)}.")
            return cls(*(arrays[name] for name in names))

    def documents(self) -> list[np.ndarray]:
        """Each document's tokens, its end-of-text included."""
        return np.split(self.tokens, self.starts[1:])


def windows(tokens: Integer[Array, " n"], key: PRNGKeyArray, count: int, length: int) -> Int[Array, "B T"]:
    """``count`` windows of ``length`` tokens at uniformly random places; ``key`` determines them."""
    starts = jax.random.randint(key, (count,), 0, len(tokens) - length + 1)
    return tokens[starts[:, None] + jnp.arange(length)].astype(jnp.int32)
