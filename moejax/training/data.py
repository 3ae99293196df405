"""Token corpora, and random windows of a corpus."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, PRNGKeyArray

from moejax.checkpoints.tokenizer import Tokenizer
from moejax.errors import MoejaxError
from moejax.training.texts import read_texts


@dataclass(frozen=True)
class Corpus:
    """Documents in one array of token ids; an end-of-text token follows each document.

    Attributes:
        tokens: ids of all ``n`` tokens.
        starts: index in ``tokens`` of the first token of each of ``d`` documents.
        domains: number of each document's domain (a label such as the source of the text).
    """

    tokens: Integer[np.ndarray, " n"]
    starts: Int[np.ndarray, " d"]
    domains: Int[np.ndarray, " d"]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an ``.npz`` file with the arrays ``tokens``, ``doc_starts`` and ``doc_domain``.

        Raises:
            MoejaxError: the file or one of its arrays is missing.
        """
        if not path.exists():
            raise MoejaxError(f"{path}: no such corpus; make it with scripts/prepare_corpus.py.")
        with np.load(path) as arrays:
            names = ("tokens", "doc_starts", "doc_domain")
            if missing := [name for name in names if name not in arrays]:
                raise MoejaxError(f"{path}: not a prepared corpus: no {', '.join(missing)}.")
            return cls(*(arrays[name] for name in names))

    @classmethod
    def from_texts(cls, path: Path, tokenizer: Tokenizer, end: int) -> Self:
        """Tokenise the texts of a file that :func:`moejax.training.texts.read_texts` reads.

        Labels become domains, numbered in the order in which they appear in the file.

        Args:
            end: id of the end-of-text token.

        Raises:
            MoejaxError: the file is missing, or its content does not fit its name.
        """
        texts, labels = read_texts(path)
        rows = [np.array([*tokenizer.encode(text, special=False), end], np.int32) for text in texts]
        names = list(dict.fromkeys(labels))
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        return cls(np.concatenate(rows), starts, np.array([names.index(label) for label in labels]))

    def split(self, share: float) -> tuple[Self, Self]:
        """Split the corpus in two, the second with the last ``share`` (a fraction) of the tokens.

        A document may be cut; its rest then begins the second corpus.
        """
        cut = len(self.tokens) - round(len(self.tokens) * share)
        before, after = self.starts < cut, self.starts >= cut
        first = type(self)(self.tokens[:cut], self.starts[before], self.domains[before])
        # the rest of a cut document is the first document of the second corpus
        starts = np.unique([0, *(self.starts[after] - cut)]) if cut < len(self.tokens) else self.starts[:0]
        domains = self.domains[np.searchsorted(self.starts, starts + cut, side="right") - 1]
        return first, type(self)(self.tokens[cut:], starts, domains)

    def documents(self) -> list[np.ndarray]:
        """Return the tokens of each document, its end-of-text token included."""
        return np.split(self.tokens, self.starts[1:])


def windows(tokens: Integer[Array, " n"], key: PRNGKeyArray, count: int, length: int) -> Int[Array, "B T"]:
    """Draw ``count`` windows of ``length`` tokens, which begin at uniformly random tokens; ``key`` determines them."""
    starts = jax.random.randint(key, (count,), 0, len(tokens) - length + 1)
    return tokens[starts[:, None] + jnp.arange(length)].astype(jnp.int32)
