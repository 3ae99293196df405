"""The options of a generation under the names of transformers, and what ``generation_config.json`` says of them."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

from moejax.errors import MoejaxError
from moejax.generation.sampling import Sampling

_DRAW = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What transformers draws with if neither the caller nor the model says."""

_ALIASES = {"eos_token_id": "eos_ids", "pad_token_id": "pad_id", "bad_words_ids": "bad_words"}
"""From names of transformers to those of this library, where they differ."""


@dataclass(frozen=True)
class GenerateOptions:
    """Options of a generation, as :meth:`moejax.LM.generate_tokens` takes them.

    Attributes:
        max_new_tokens: most new tokens of an answer.
        sampling: how tokens are chosen.
        seed: determines the draw.
        eos_ids: tokens that end an answer.
        pad_id: fills answers behind their end.
        stop_strings: texts at which an answer ends; they are kept.
        streamer: an object with ``put(ids)`` and ``end()``, or a function of a text, told of every new token.
        max_time: seconds after which no further token is begun.
    """

    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: tuple[int, ...]
    pad_id: int
    stop_strings: tuple[str, ...] = ()
    streamer: Any = None
    max_time: float | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any], stored: Mapping[str, Any], usual: Mapping[str, Any], prompt: int) -> Self:
        """Return the options for these arguments.

        The stored ends always hold. The stored settings of a draw hold if ``do_sample`` is true, so that a plain call
        stays greedy.

        Args:
            given: the caller's arguments, under the names of this library or of transformers; ``None`` is absent.
            stored: the fields of ``generation_config.json``.
            usual: the model's ``eos_ids`` and ``pad_id``.
            prompt: number of tokens of the longest prompt.

        Raises:
            MoejaxError: an argument that is not known, or a value that does not fit.
        """
        words = {_ALIASES.get(name, name): value for name, value in given.items() if value is not None}
        if words.pop("use_cache", True) is not True:
            raise MoejaxError("use_cache=False: generation always keeps what it has read.")
        words.pop("tokenizer", None)
        draws = words.pop("do_sample", None)
        if draws is False and words.get("temperature", 0):
            raise MoejaxError("do_sample=False takes the best token: leave the temperature out.")
        if draws:
            words = {name: _or(stored.get(name), value) for name, value in _DRAW.items()} | words
        _length(words, prompt)
        known = {f.name for f in fields(cls)} - {"sampling"} | {f.name for f in fields(Sampling)}
        if unknown := [name for name in words if name not in known]:
            raise MoejaxError(_unknown(unknown[0], known))
        settings = {f.name: words.pop(f.name) for f in fields(Sampling) if f.name in words}
        stops = words.pop("stop_strings", None) or stored.get("stop_strings") or ()
        return cls(
            sampling=Sampling(**settings),
            max_new_tokens=int(words.pop("max_new_tokens", 32)),
            seed=int(words.pop("seed", 0)),
            eos_ids=_ids(words.pop("eos_ids", usual["eos_ids"])),
            pad_id=int(words.pop("pad_id", usual["pad_id"])),
            stop_strings=(stops,) if isinstance(stops, str) else tuple(stops),
            **words,
        )


@dataclass
class Watcher:
    """Looks at new tokens while they are generated: tells a streamer, and ends answers at stop strings.

    Attributes:
        decode: from token ids to text; ``None`` if nobody looks on.
        eos_ids: tokens that end an answer.
        stop_strings: texts that end an answer.
        streamer: as in :class:`GenerateOptions`.
        every: how many tokens are generated between two looks.
    """

    decode: Callable[[Sequence[int]], str] | None
    eos_ids: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    streamer: Any = None
    _told: int = field(default=0, init=False)
    _text: str = field(default="", init=False)

    @property
    def every(self) -> int:
        return 1 if self.streamer is not None else 8

    def __call__(self, tokens: np.ndarray) -> bool:
        """Look at the tokens so far, ``[B A]``; return true if all answers have met a stop string."""
        rows = [self.cut(row) for row in tokens.tolist()]
        if self.streamer is not None:
            self._tell(rows[0])
        return bool(self.stop_strings) and all(len(row) < tokens.shape[1] or self.stops(row) for row in rows)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Tell the streamer the prompt, as transformers does."""
        if self.streamer is None:
            return
        if len(prompts) != 1:
            raise MoejaxError("a streamer shows one prompt's answer; generate the prompts one by one.")
        if hasattr(self.streamer, "put"):
            self.streamer.put(np.asarray(prompts))

    def end(self, row: Sequence[int]) -> None:
        """Tell the streamer what is left of the answer ``row``, and that it has ended."""
        if self.streamer is not None:
            self._tell(row, last=True)
            if hasattr(self.streamer, "end"):
                self.streamer.end()

    def cut(self, row: Sequence[int]) -> list[int]:
        """The tokens of an answer up to and without the one that ended it, and up to and with its first stop string."""
        end = next((i for i, token in enumerate(row) if token in self.eos_ids), len(row))
        row = list(row[:end])
        if not self.stops(row):
            return row
        low, high = 0, len(row)  # the text of the first `high` tokens has a stop string, that of `low` has none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.stops(row[:middle]) else (middle, high)
        return row[:high]

    def stops(self, row: Sequence[int]) -> bool:
        """Return whether the text of an answer has a stop string."""
        if not self.stop_strings or self.decode is None:
            return False
        text = self.decode(row)
        return any(stop in text for stop in self.stop_strings)

    def _tell(self, row: Sequence[int], last: bool = False) -> None:
        if hasattr(self.streamer, "put"):
            for token in row[self._told :]:
                self.streamer.put(np.array([token]))
        elif self.decode is not None:
            text = self.decode(row)
            # a character whose bytes are not complete yet waits for them
            if (last or not text.endswith("\N{REPLACEMENT CHARACTER}")) and len(text) > len(self._text):
                self.streamer(text[len(self._text) :])
                self._text = text
        self._told = max(self._told, len(row))


def _length(words: dict[str, Any], prompt: int) -> None:
    """Replace lengths that count the prompt by those that do not."""
    for whole, new, least in (("max_length", "max_new_tokens", 1), ("min_length", "min_new_tokens", 0)):
        if (length := words.pop(whole, None)) is None or new in words:
            continue
        if least and length - prompt < least:
            raise MoejaxError(f"{whole}={length} leaves no room for an answer to a prompt of {prompt} tokens.")
        words[new] = max(int(length) - prompt, least)


def _unknown(name: str, known: set[str]) -> str:
    names = known | set(_ALIASES) | {"do_sample", "max_length", "min_length"}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(names))}."
    return f"generate has no option {name!r}; {hint}"


def _ids(value: Any) -> tuple[int, ...]:
    """One id, several, or an array of them, as a tuple."""
    return tuple(int(i) for i in np.atleast_1d(np.asarray(value, int)).ravel())


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
