"""The options of a generation under the names that DLBacktrace and ``transformers`` have for them."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from moejax.dlbacktrace.inputs import token_ids
from moejax.errors import MoejaxError
from moejax.lm import LM


@dataclass(frozen=True)
class Settings:
    """Options of ``run_task`` beside its named ones; ``None`` stands for an option's default.

    Attributes:
        max_new_tokens: most tokens to generate.
        min_new_tokens: no end of text before so many.
        max_time: seconds after which no further token is begun.
        top_k, top_p: limits of a draw; setting one draws instead of taking the best.
        seed: of the draw.
        repetition_penalty: above 1, tokens that occurred become less likely.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice.
        bad_words_ids: sequences of token ids that are never completed.
        num_beams: beam search with so many.
        length_penalty, early_stopping: of beam search.
        num_return_sequences: answers for each prompt; each is explained.
        eos_token_id: one token or several that end an answer; of the tokenizer, else of the model, if not given.
        bos_token_id: what an empty prompt begins with.
        pad_token_id: what fills ended answers.
        explain_tokens: the steps to explain: ``"all"``, ``"none"``, the first so many, or their indices.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    max_time: float | int | None = None
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

    @classmethod
    def of(cls, options: dict[str, Any], tokenizer: Any) -> Self:
        """From keyword arguments; a tokenizer fills in special tokens that are not given.

        Raises:
            TypeError: an option that does not exist.
        """
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"unknown option {', '.join(map(repr, unknown))}; known are {', '.join(known)}.")
        special = ("eos_token_id", "bos_token_id", "pad_token_id")
        filled = {name: getattr(tokenizer, name, None) for name in special}
        return cls(**filled | {name: value for name, value in options.items() if value is not None})

    def for_generation(self, lm: LM, temperature: float | int | None) -> dict[str, Any]:
        """As :meth:`moejax.LM.generate_tokens` takes them.

        A temperature of one, the default, draws only if ``top_k`` or ``top_p`` limit the draw.
        """
        draws = bool(self.top_k) or self.top_p not in (None, 1) or temperature not in (None, 0, 1)
        several = (self.num_return_sequences or 1) > 1 and (self.num_beams or 1) == 1
        chosen = {
            "max_new_tokens": 50 if self.max_new_tokens is None else self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
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
        """Which of ``count`` steps to explain.

        Raises:
            MoejaxError: something else than ``explain_tokens`` may be.
        """
        which = self.explain_tokens
        if isinstance(which, str) and which in ("all", "none"):
            return list(range(count)) if which == "all" else []
        if isinstance(which, int | np.integer) and not isinstance(which, bool) and which >= 0:
            return list(range(min(int(which), count)))
        chosen = list(which) if isinstance(which, Iterable) and not isinstance(which, str) else [None]
        if not all(isinstance(i, int | np.integer) and i >= 0 for i in chosen):
            raise MoejaxError(f"explain_tokens={which!r}: 'all', 'none', a number of steps, or indices of steps.")
        return [i for i in range(count) if i in chosen]
