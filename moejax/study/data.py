"""Documents from a file, and padded batches of windows cut from them."""

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.training import Corpus
from moejax.training.texts import find_text, read_texts

_MIN_WIDTH = 32
"""Tokens of the narrowest batch. Widths are powers of two, so that few programs are compiled."""


class WindowBatch(NamedTuple):
    """Windows side by side, padded on the right; every row holds at least one token that is not padding.

    Attributes:
        tokens: token ids.
        targets: the token that follows each.
        valid: false for padding; rows that only complete a batch are padding throughout.
        predicted: true where the document continues, so that there is a target.
        labels: index of each row's label; 0 if the data has no labels.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    predicted: Bool[Array, "B T"]
    labels: Int[Array, " B"]


@dataclass(frozen=True)
class Documents:
    """Texts as token ids.

    Attributes:
        tokens: token ids of each document.
        labels: index into ``names`` of each document's label; zeros if there are no labels.
        names: the labels, such as tasks or domains; empty if the data has none.
    """

    tokens: Sequence[Integer[np.ndarray, " _"]]
    labels: Int[np.ndarray, " d"]
    names: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | Path, lm: LM) -> Self:
        """Read a file for a model.

        ``.npz`` is a prepared corpus (:class:`moejax.training.Corpus`). Its labels are its domains; a ``corpus.json``
        in the same folder names them. ``.jsonl`` has one document a line: an object with ``text`` and an optional
        ``label``. Any other file is UTF-8 text and one document. ``"sample"`` is the text that is bundled with the
        package.

        Raises:
            MoejaxError: the file is missing, its content does not fit its suffix, or it has no tokens.
            PromptError: the file holds text and the model has no tokenizer, or token ids are outside of the model's
                vocabulary.
        """
        path = find_text(path)
        if not path.is_file():
            raise MoejaxError(f"{path}: no such file; give a .npz corpus, a .jsonl, a text, or 'sample'.")
        if path.suffix.lower() == ".npz":
            return cls._of_corpus(path, lm)
        return cls.of(*read_texts(path), lm)

    @classmethod
    def of(cls, texts: Sequence[str], labels: Sequence[str | None] | None, lm: LM) -> Self:
        """Encode texts with the model's tokenizer, start tokens included.

        Args:
            labels: one for each text, or ``None`` for data without labels. If only some texts have a label, the others
                get the label ``"none"``.

        Raises:
            MoejaxError: the texts have no tokens.
            PromptError: the model has no tokenizer.
        """
        tokenizer = lm.need_tokenizer()
        tokens = [np.asarray(tokenizer.encode(text), np.int32) for text in texts]
        if labels is None or not any(label is not None for label in labels):
            return cls(tokens, np.zeros(len(tokens), int))._checked(lm)
        words = ["none" if label is None else label for label in labels]
        names = tuple(dict.fromkeys(words))
        return cls(tokens, np.array([names.index(word) for word in words], int), names)._checked(lm)

    @classmethod
    def _of_corpus(cls, path: Path, lm: LM) -> Self:
        try:
            corpus = Corpus.read(path)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, MoejaxError):
                raise
            raise MoejaxError(f"{path}: not a prepared corpus: {error}") from error
        description, domains = path.parent / "corpus.json", np.unique(corpus.domains)
        names = {int(d): f"domain {d}" for d in domains}
        if description.is_file():
            try:
                named = enumerate(json.loads(description.read_text("utf-8"))["domains"])
                names |= {i: str(domain["name"]) for i, domain in named if i in names}
            except (ValueError, KeyError, TypeError) as error:
                raise MoejaxError(f"{description}: it does not name the domains; repair or remove it.") from error
        labels = np.searchsorted(domains, corpus.domains)
        return cls(corpus.documents(), labels, tuple(names[int(d)] for d in domains))._checked(lm)

    def _checked(self, lm: LM) -> Self:
        if not any(len(tokens) for tokens in self.tokens):
            raise MoejaxError("the data has no tokens.")
        for tokens in self.tokens:
            if len(tokens):
                lm.check(tokens)
        return self

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True)
class Windows:
    """Batches of windows: documents cut into pieces of up to ``length`` tokens.

    Every token occurs once, with its successor in the document as its target. A window does not see the earlier windows
    of its document. Iteration yields :class:`WindowBatch`, the longest windows first.

    Attributes:
        documents: the data.
        length: tokens of a window, at most.
        batch: windows of a batch.
        limit: draw windows at random until they have this many tokens; all windows by default.
        seed: seed of that draw.

    Raises:
        MoejaxError: ``length``, ``batch`` or ``limit`` is not positive.
    """

    documents: Documents
    length: int = 512
    batch: int = 8
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("length", self.length), ("batch", self.batch), ("limit", self.limit)):
            if value is not None and value < 1:
                raise MoejaxError(f"{name}={value} must be positive.")

    @cached_property
    def _places(self) -> list[tuple[int, int, int]]:
        """Index of the document, first token and number of tokens of every window, the longest first."""
        places = [
            (d, start, min(self.length, len(tokens) - start))
            for d, tokens in enumerate(self.documents.tokens)
            for start in range(0, len(tokens), self.length)
        ]
        if self.limit is not None:
            order = np.random.default_rng(self.seed).permutation(len(places))
            before = np.cumsum([0, *(places[i][2] for i in order)])[:-1]
            places = [places[i] for i in order[before < self.limit]]
        return sorted(places, key=lambda place: -place[2])

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all windows."""
        return sum(size for _, _, size in self._places)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._places) // self.batch)

    def __iter__(self) -> Iterator[WindowBatch]:
        for first in range(0, len(self._places), self.batch):
            yield self._make(self._places[first : first + self.batch])

    def _make(self, places: list[tuple[int, int, int]]) -> WindowBatch:
        width = min(self.length, max(_MIN_WIDTH, 1 << (places[0][2] - 1).bit_length()))
        shape = (self.batch, width)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        valid, predicted = np.zeros(shape, bool), np.zeros(shape, bool)
        labels = np.zeros(self.batch, np.int32)
        for row, (document, start, size) in enumerate(places):
            ids = self.documents.tokens[document][start : start + size + 1]
            tokens[row, :size], valid[row, :size] = ids[:size], True
            targets[row, : len(ids) - 1], predicted[row, : len(ids) - 1] = ids[1:], True
            labels[row] = self.documents.labels[document]
        return WindowBatch(*map(jnp.asarray, (tokens, targets, valid, predicted, labels)))
