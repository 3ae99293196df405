"""The options of a generation, named as in DLBacktrace and ``transformers``."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from moejax.dlbacktrace.inputs import token_ids
from moejax.errors import MoejaxError, PromptError
from moejax.lm import LM


@dataclass(frozen=True)
class BacktraceSettings:
    """The options that ``run_task`` takes beside its named parameters; ``None`` stands for an option's default.

    Attributes:
        max_new_tokens: most tokens to generate; 50 by default.
        min_new_tokens: number of new tokens before which a text may not end.
        max_length, min_length: the same with the longest prompt counted too, where the others are not given.
        max_time: seconds after which no further token is begun.
        do_sample: whether tokens are drawn; by default if a temperature, ``top_k`` or ``top_p`` asks for it.
        top_k, top_p: limits of a draw; setting one of them draws tokens instead of taking the best.
        seed: seed of the draw.
        repetition_penalty: above 1, tokens that have occurred become less likely.
        no_repeat_ngram_size: no sequence of this many tokens occurs twice.
        bad_words_ids: sequences of token ids that are never completed.
        num_beams: number of beams; above 1, beam search.
        length_penalty, early_stopping: see :class:`moejax.generation.Sampling`; beam search only.
        num_return_sequences: number of answers to each prompt; each is explained.
        eos_token_id: one token id or several that end an answer; by default the tokenizer's, else the model's.
        bos_token_id: token id that an empty prompt begins with.
        pad_token_id: token id that fills answers behind their end.
        explain_tokens: the steps to explain: ``"all"``, ``"none"``, a number of first steps, or indices of steps.
        dlb_tokens_count: a number of first steps to explain, under the name that DLBacktrace's pages use.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    max_length: int | None = None
    min_length: int | None = None
    max_time: float | int | None = None
    do_sample: bool | None = None
    top_k: int | None = None
    top_p: float | int | None = None
    seed: int | None = None
    repetition_penalty: float | int | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Any = None
    num_beams: int | None = None
    length_penalty: float | int | None = None
    early_stopping: bool | str | None = None
    num_return_sequences: int | None = None
    eos_token_id: Any = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    explain_tokens: Any = "all"
    dlb_tokens_count: int | None = None

    @classmethod
    def from_options(cls, options: dict[str, Any], tokenizer: Any) -> Self:
        """The settings in keyword arguments; special tokens that are not given are taken from the tokenizer.

        Raises:
            TypeError: an option that does not exist, or two that say the same.
        """
        if options.get("dlb_tokens_count") is not None and options.get("explain_tokens") is not None:
            raise TypeError("dlb_tokens_count is explain_tokens under another name: give one of them.")
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"unknown option {', '.join(map(repr, unknown))}; known are {', '.join(known)}.")
        special = ("eos_token_id", "bos_token_id", "pad_token_id")
        filled = {name: getattr(tokenizer, name, None) for name in special}
        return cls(**filled | {name: value for name, value in options.items() if value is not None})

    def for_generation(self, lm: LM, temperature: float | int | None, longest: int) -> dict[str, Any]:
        """The settings as keyword arguments of :meth:`moejax.LM.generate_tokens`.

        A temperature of 1, the default, draws only if ``top_k``, ``top_p`` or ``do_sample`` ask for it.

        Args:
            longest: tokens of the longest prompt.

        Raises:
            MoejaxError: ``max_length`` leaves no room for an answer, or a draw is both wanted and not.
        """
        asks = bool(self.top_k) or self.top_p not in (None, 1) or temperature not in (None, 0, 1)
        if self.do_sample is False and asks:
            raise MoejaxError("do_sample=False takes the best token: leave temperature, top_k and top_p out.")
        draws = asks or bool(self.do_sample)
        if self.max_new_tokens is None and self.max_length is not None and self.max_length <= longest:
            raise PromptError(f"a prompt of {longest} tokens leaves no room in max_length={self.max_length}.")
        most = 50 if self.max_length is None else self.max_length - longest
        least = None if self.min_length is None else max(0, self.min_length - longest)
        several = (self.num_return_sequences or 1) > 1 and (self.num_beams or 1) == 1
        chosen = {
            "max_new_tokens": most if self.max_new_tokens is None else self.max_new_tokens,
            "min_new_tokens": least if self.min_new_tokens is None else self.min_new_tokens,
            "max_time": None if self.max_time is None else float(self.max_time),
            "temperature": (1.0 if temperature is None else float(temperature)) if draws or several else 0.0,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "bad_words": self.bad_words_ids,
            "num_beams": self.num_beams,
            "length_penalty": self.length_penalty,
            "early_stopping": self.early_stopping,
            "num_return_sequences": self.num_return_sequences,
            "eos_ids": token_ids(self.eos_token_id),
            "pad_id": lm.config.pad_id if self.pad_token_id is None else self.pad_token_id,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    def explained(self, count: int) -> list[int]:
        """Indices of the steps to explain, out of ``count`` steps.

        Raises:
            MoejaxError: a value that ``explain_tokens`` may not have.
        """
        which = self.explain_tokens if self.dlb_tokens_count is None else self.dlb_tokens_count
        if isinstance(which, str) and which in ("all", "none"):
            return list(range(count)) if which == "all" else []
        if isinstance(which, int | np.integer) and not isinstance(which, bool) and which >= 0:
            return list(range(min(int(which), count)))
        chosen = list(which) if isinstance(which, Iterable) and not isinstance(which, str) else [None]
        if not all(isinstance(i, int | np.integer) and i >= 0 for i in chosen):
            raise MoejaxError(f"explain_tokens={which!r}: 'all', 'none', a number of steps, or indices of steps.")
        return [i for i in range(count) if i in chosen]
