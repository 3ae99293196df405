"""FlatDecoder token corpora, texts of files, and random windows of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, PRNGKeyArray

from moejax.checkpoints.folder import BUNDLED
from moejax.checkpoints.tokenizer import Tokenizer
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

    @classmethod
    def of_texts(cls, path: Path, tokenizer: Tokenizer, end: int) -> Self:
        """The texts of a file (:func:`read_texts`), each followed by the token ``end``; labels become domains.

        Raises:
            MoejaxError: the file is missing or is not what its name says.
        """
        texts, labels = read_texts(path)
        rows = [np.array([*tokenizer.encode(text, special=False), end], np.int32) for text in texts]
        names = list(dict.fromkeys(labels))
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        return cls(np.concatenate(rows), starts, np.array([names.index(label) for label in labels]))

    def split(self, share: float) -> tuple[Self, Self]:
        """This corpus without its last ``share`` of tokens, and these; a document may be cut."""
        cut = len(self.tokens) - round(len(self.tokens) * share)
        before, after = self.starts < cut, self.starts >= cut
        first = type(self)(self.tokens[:cut], self.starts[before], self.domains[before])
        # what is left of a cut document goes on there
        starts = np.unique([0, *(self.starts[after] - cut)]) if cut < len(self.tokens) else self.starts[:0]
        domains = self.domains[np.searchsorted(self.starts, starts + cut, side="right") - 1]
        return first, type(self)(self.tokens[cut:], starts, domains)

    def documents(self) -> list[np.ndarray]:
        """Each document's tokens, its end-of-text included."""
        return np.split(self.tokens, self.starts[1:])


def windows(tokens: Integer[Array, " n"], key: PRNGKeyArray, count: int, length: int) -> Int[Array, "B T"]:
    """``count`` windows of ``length`` tokens at uniformly random places; ``key`` determines them."""
    starts = jax.random.randint(key, (count,), 0, len(tokens) - length + 1)
    return tokens[starts[:, None] + jnp.arange(length)].astype(jnp.int32)


def find_text(source: str | Path) -> Path:
    """The file of some data: ``source`` itself, or ``"sample"``, the text that is bundled, if no file has that name."""
    path, bundled = Path(source), BUNDLED / f"{source}.jsonl"
    return bundled if not path.exists() and bundled.is_file() else path


def read_texts(path: Path) -> tuple[list[str], list[str | None]]:
    """Texts of a file, and their labels.

    ``.jsonl``: one document a line, an object with ``text`` and, if it has one, ``label``. Anything else is UTF-8 text,
    and one document as a whole.

    Raises:
        MoejaxError: the file is missing, or is not what its name says.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise MoejaxError(f"{path}: no such file; give a .npz corpus, a .jsonl, a text, or 'sample'.") from error
    except UnicodeDecodeError as error:
        raise MoejaxError(f"{path}: not UTF-8 text (byte {error.start}).") from error
    return _parse_lines(path, text) if path.suffix == ".jsonl" else ([text], [None])


def _parse_lines(path: Path, text: str) -> tuple[list[str], list[str | None]]:
    texts, labels = [], []
    # of all that ends a line, JSON strings may hold any but the newline
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise MoejaxError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise MoejaxError(f'{path}, line {number}: not an object with a string "text".')
        label = found.get("label")
        texts.append(found["text"])
        labels.append(None if label is None else str(label))
    return texts, labels
