"""Token corpora, texts read from files, and random windows of a corpus."""

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
        """Tokenise the texts of a file that :func:`read_texts` reads.

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


def find_text(source: str | Path) -> Path:
    """Return the path of a text file.

    ``"sample"`` names the text that is bundled with moejax, unless a file of that name exists.
    """
    path, bundled = Path(source), BUNDLED / f"{source}.jsonl"
    return bundled if not path.exists() and bundled.is_file() else path


def read_texts(path: Path) -> tuple[list[str], list[str | None]]:
    """Read the texts of a file and their labels, ``None`` for a text without a label.

    In a ``.jsonl`` file each line is an object with the string ``text`` and, optionally, ``label``; it is one document.
    Any other file is UTF-8 text and one document.

    Raises:
        MoejaxError: the file is missing, is not UTF-8, or has a line that is not such an object.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise MoejaxError(f"{path}: no such file; give a .npz corpus, a .jsonl, a text, or 'sample'.") from error
    except UnicodeDecodeError as error:
        raise MoejaxError(f"{path}: not UTF-8 text (byte {error.start}).") from error
    return _parse_lines(path, text) if path.suffix == ".jsonl" else ([text], [None])


def _parse_lines(path: Path, text: str) -> tuple[list[str], list[str | None]]:
    """Return texts and labels of the lines of a ``.jsonl`` file; empty lines are skipped."""
    texts, labels = [], []
    # not splitlines(): JSON strings may contain other line separators, such as U+2028, but no newline
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            raise MoejaxError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise MoejaxError(f'{path}, line {number}: not an object with a string "text".')
        label = document.get("label")
        texts.append(document["text"])
        labels.append(None if label is None else str(label))
    return texts, labels
