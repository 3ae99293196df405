"""The tokenizer of a model, read from its ``tokenizer.json``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import tokenizers

from moejax.errors import CheckpointError, PromptError


class Tokenizer:
    """Converts text to token ids and back.

    Attributes:
        backend: the tokenizer of the ``tokenizers`` library.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Read the tokenizer of a model folder; return ``None`` if it has no ``tokenizer.json``.

        Raises:
            CheckpointError: the file cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer file: {error}") from error
        backend.no_padding()
        backend.no_truncation()
        return cls(backend)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text; ``special`` adds the template's tokens, such as a start token."""
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.backend.decode(list(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token id by itself; special tokens are included."""
        return [self.backend.decode([i], skip_special_tokens=False) for i in ids]

    def token_id(self, text: str) -> int:
        """Return the id of a text that is exactly one token.

        Raises:
            PromptError: the text is several tokens, or no token.
        """
        ids = self.encode(text, special=False)
        if len(ids) != 1:
            shown = ", ".join(repr(p) for p in self.pieces(ids)) or "no tokens"
            raise PromptError(f"{text!r} is {len(ids)} tokens, not one: {shown}. Name a single token, or its id.")
        return ids[0]
