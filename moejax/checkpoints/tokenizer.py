"""The tokenizer of a model: an adapter over whatever its folder, or the caller, has."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from moejax.checkpoints.files import check_read_by_others, inside, read_object
from moejax.errors import CheckpointError, PromptError
from moejax.hugging_face import auto_tokenizer

_OTHER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
"""Files that hold a tokenizer where there is no ``tokenizer.json``."""

_GENERIC = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that add nothing to ``tokenizer.json``."""

_ANCHORS = ("\n", "a", ".", "0")
"""Texts that a continuation is appended to. One that does not merge with it is enough."""

_MAX_BYTES = 4
"""The most tokens that one character may be spread over, one for each byte."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode a part of a character to."""


class Tokenizer:
    """Converts text to token ids and back.

    Attributes:
        backend: the tokenizer of the ``tokenizers`` library, one of transformers, or any object with ``encode(text)``
            and ``decode(ids)``.
        folder: the model folder that it was read from, if any.
    """

    def __init__(self, backend: Any, folder: Path | None = None) -> None:
        self.backend, self.folder = backend, folder
        self._encode = _accepting(backend.encode, "add_special_tokens")
        self._decode = _accepting(backend.decode, "skip_special_tokens", "clean_up_tokenization_spaces")

    @classmethod
    def wrap(cls, tokenizer: Any) -> Self:
        """Return the adapter of any tokenizer object.

        Raises:
            PromptError: it has no methods ``encode`` and ``decode``.
        """
        if isinstance(tokenizer, cls):
            return tokenizer
        if not (callable(getattr(tokenizer, "encode", None)) and callable(getattr(tokenizer, "decode", None))):
            raise PromptError(f"{type(tokenizer).__name__} is no tokenizer: it has no encode and decode.")
        return cls(tokenizer)

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Read the tokenizer of a model folder; return ``None`` if it has none.

        ``tokenizer.json`` is read by itself where the folder adds nothing to it; otherwise transformers reads the
        folder.

        Raises:
            CheckpointError: a file cannot be read, or is a link that leaves the folder.
        """
        check_read_by_others(folder)
        path = inside(folder, "tokenizer.json")
        config = read_object(folder, "tokenizer_config.json", CheckpointError) or {}
        if path is None:
            if not any(inside(folder, name) for name in _OTHER_FILES):
                return None
            return cls(auto_tokenizer(folder), folder)
        if _adds_to_file(config, folder):
            return cls(auto_tokenizer(folder), folder)
        backend = _read_file(path)
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, folder)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text; ``special`` adds the template's tokens, such as a start token.

        A start token that the text has already, as a rendered chat template does, is not added a second time.

        Raises:
            PromptError: the text holds half a surrogate pair, which is no character.
        """
        try:
            ids = _ids(self._encode(text, add_special_tokens=special))
        except (UnicodeEncodeError, TypeError) as error:
            if not isinstance(text, str) or text.isprintable():
                raise
            raise PromptError(f"the text is not valid Unicode: {text!r:.80}.") from error
        if special and len(ids) > 1 and ids[0] == ids[1]:
            plain = _ids(self._encode(text, add_special_tokens=False))
            if plain[:1] == ids[:1]:  # the text begins with its start token
                return ids[1:]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._text(ids, skip_special_tokens=True)

    def _text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        # the clean-up of old tokenizers removes spaces, so that pieces would no longer add up to the text
        return self._decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; joined, they are the text of all, special tokens included.

        If the bytes of one character are spread over several tokens, the first has the character and the others are
        empty.
        """
        pieces: list[str] = []
        before = start = 0  # the tokens from `before` to `start` are the context in which new ones are read
        for end in range(1, len(ids) + 1):
            context = self._text(ids[before:start]) if start > before else ""
            new = self._text(ids[before:end])[len(context) :]
            if new.endswith(_UNFINISHED) and end - start < _MAX_BYTES and end < len(ids):
                continue
            pieces += [new, *[""] * (end - start - 1)]
            before, start = start, end
        return pieces

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each of several tokens that do not follow each other, as it stands within a text."""
        anchors = (self.encode(text, special=False) for text in _ANCHORS)
        anchor = next((anchor for anchor in anchors if len(anchor) == 1), [])
        context = self._text(anchor)
        return [self._without_space(self._text([*anchor, i])[len(context) :], i) for i in ids]

    def _without_space(self, text: str, token: int) -> str:
        """The text of a token, less a space that the tokenizer puts between any two tokens."""
        alone = text.removeprefix(" ")
        between = alone != text and self.encode(alone, special=False) == self.encode(text, special=False) == [token]
        return alone if between else text

    def token_id(self, text: str) -> int:
        """Return the id of a text that is exactly one token within a longer text.

        ``" Paris"`` is the token that begins a word, ``"Paris"`` the one that continues a text without a space. Where
        only the other exists as one token, as at a text's beginning, it is taken.

        Raises:
            PromptError: the text is several tokens, or no token.
        """
        ids = self.continuation(text)
        if len(ids) != 1 and len(alone := self.encode(text, special=False)) == 1:
            return alone[0]
        if len(ids) != 1:
            shown = ", ".join(repr(p) for p in self.token_texts(ids)) or "no tokens"
            raise PromptError(f"{text!r} is {len(ids)} tokens, not one: {shown}. Name a single token, or its id.")
        return ids[0]

    def continuation(self, text: str) -> list[int]:
        """Return the token ids of a text that goes on after another: a space is there only if the text has it."""
        for anchor in _ANCHORS:
            before, both = (self.encode(part, special=False) for part in (anchor, anchor + text))
            if both[: len(before)] == before and self._text(both) == self._text(before) + text:
                return both[len(before) :]
        return self.encode(text, special=False)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, those of added tokens included."""
        count = getattr(self.backend, "get_vocab_size", None)
        return count() if count else len(self.backend)

    @cached_property
    def full(self) -> Any:
        """The tokenizer of transformers, which knows chat templates.

        Raises:
            PromptError: there is none: the tokenizer is an object without templates, and came without a folder.
        """
        if hasattr(self.backend, "apply_chat_template"):
            return self.backend
        if self.folder is None:
            raise PromptError("this tokenizer has no chat template; pass text, or load(.., tokenizer=) with one.")
        return auto_tokenizer(self.folder)

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text without special tokens, and where in the text each begins and ends."""
        fast = getattr(self.backend, "backend_tokenizer", self.backend)
        if isinstance(fast, tokenizers.Tokenizer):
            encoding = fast.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        ids, ends, place = self.encode(text, special=False), [], 0
        for piece in self.pieces(ids):
            ends.append((place, place + len(piece)))
            place += len(piece)
        return ids, ends

    @cached_property
    def digest(self) -> str:
        """What tells this tokenizer from another: a digest of its file, or its class and size where it has none."""
        fast = getattr(self.backend, "backend_tokenizer", self.backend)
        text = fast.to_str() if hasattr(fast, "to_str") else f"{type(self.backend)} {self.vocab_size}"
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a folder."""
        if isinstance(self.backend, tokenizers.Tokenizer):
            self.backend.save(str(folder / "tokenizer.json"))
        elif hasattr(self.backend, "save_pretrained"):
            self.backend.save_pretrained(str(folder))


def check_tokenizer(folder: Path) -> None:
    """Raise ``CheckpointError`` if the ``tokenizer.json`` of a folder cannot be read; without one, do nothing."""
    if (path := inside(folder, "tokenizer.json")) is not None:
        _read_file(path)


def _read_file(path: Path) -> tokenizers.Tokenizer:
    """Read a ``tokenizer.json``."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer file: {error}") from error


def _ids(encoded: Any) -> list[int]:
    """The ids of what ``encode`` returned."""
    return [int(i) for i in getattr(encoded, "ids", encoded)]


def _accepting(method: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Return ``method`` without those of the options ``names`` that it does not take."""
    parameters = inspect.signature(method).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters} & {*names} if not anything else {*names}

    def call(value: Any, **options: Any) -> Any:
        return method(value, **{name: option for name, option in options.items() if name in taken})

    return call


def _adds_to_file(config: Mapping[str, Any], folder: Path) -> bool:
    """Return whether ``tokenizer_config.json`` changes what ``tokenizer.json`` alone would do."""
    if config.get("tokenizer_class") not in _GENERIC:
        return True
    if config.get("add_bos_token") is not None or config.get("add_eos_token") is not None:
        return True
    listed = {*(config.get("added_tokens_decoder") or ())}
    listed |= {str(i) for i in (read_object(folder, "added_tokens.json", CheckpointError) or {}).values()}
    if not listed:
        return False
    added = (read_object(folder, "tokenizer.json", CheckpointError) or {}).get("added_tokens") or ()
    return not listed <= {str(token.get("id")) for token in added if isinstance(token, dict)}
