"""The settings of a generation, and the choice of a token that they amount to."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moejax.errors import MoejaxError
from moejax.generation import processors


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Greedy by default; a draw with a temperature; a search with several beams.

    A pytree: a compiled program serves all values of the numbers named in ``NEUTRAL``, except that one at its neutral
    value is off and not in the program.

    Attributes:
        temperature: zero is greedy; otherwise a draw from the softmax of the logits divided by it.
        top_k: draw from the ``top_k`` best tokens, and those tied with the last of them; zero keeps all.
        top_p: draw from the smallest set of best tokens whose probability reaches ``top_p``, after ``top_k``.
        min_new_tokens: no end of text before so many tokens.
        repetition_penalty: above one, tokens of the prompt and the answer so far become less likely.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice, the prompt included; zero allows all.
        bad_words: sequences of token ids that are never completed.
        num_beams: beam search with so many beams, if more than one.
        length_penalty: beams are compared by their log-probability divided by their length to this power.
        early_stopping: when the search for a prompt ends, once it has ``num_beams`` finished answers: at once (True),
            when the best running beam at its present length is no better than the worst of them (False), or when
            it cannot become so at any length up to the limit (``"never"``).
        num_return_sequences: answers for each prompt: independent draws, or the best beams.

    Raises:
        MoejaxError: a value out of its range, or one that could have no effect beside the others.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: Sequence[Sequence[int]] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    NEUTRAL: ClassVar[dict[str, float | int]] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "min_new_tokens": 0,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
    }

    def __post_init__(self) -> None:
        words = tuple(tuple(int(token) for token in word) for word in self.bad_words)
        object.__setattr__(self, "bad_words", words)
        for wrong, mend in self._wrongs():
            if wrong:
                raise MoejaxError(mend)
        for name, neutral in self.NEUTRAL.items():
            # a whole number given for a float would be another type of input, hence another program
            object.__setattr__(self, name, type(neutral)(getattr(self, name)))

    def _wrongs(self) -> list[tuple[bool, str]]:
        s, beams = self, self.num_beams
        several = s.num_return_sequences
        return [
            (not 0 <= s.temperature < float("inf"), f"temperature={s.temperature}: 0 (greedy) or a positive number."),
            (s.top_k < 0, f"top_k={s.top_k}: a number of tokens, or 0 to keep all."),
            (not 0 < s.top_p <= 1, f"top_p={s.top_p}: a probability above 0, or 1 to keep all."),
            (s.min_new_tokens < 0, f"min_new_tokens={s.min_new_tokens}: 0 or more."),
            (not 0 < s.repetition_penalty < float("inf"), f"repetition_penalty={s.repetition_penalty}: above 0."),
            (
                s.no_repeat_ngram_size < 0,
                f"no_repeat_ngram_size={s.no_repeat_ngram_size}: a length, or 0 for no limit.",
            ),
            (not all(s.bad_words), "bad_words holds an empty sequence: give each at least one token id."),
            (min((min(w) for w in s.bad_words if w), default=0) < 0, "bad_words holds a negative token id."),
            (beams < 1, f"num_beams={beams}: at least 1 is needed."),
            (not isfinite(s.length_penalty), f"length_penalty={s.length_penalty}: a number."),
            (
                not isinstance(s.early_stopping, bool) and s.early_stopping != "never",
                f"early_stopping={s.early_stopping!r}: True, False or 'never'.",
            ),
            (several < 1, f"num_return_sequences={several}: at least 1 is needed."),
            (
                s.temperature == 0 and (s.top_k > 0 or s.top_p < 1),
                f"top_k={s.top_k}, top_p={s.top_p} limit a draw, and temperature=0 draws nothing: give a temperature.",
            ),
            (
                beams > 1 and s.temperature > 0,
                f"num_beams={beams} is a search, temperature={s.temperature} a draw: set one of them only.",
            ),
            (
                beams == 1 and (s.length_penalty != 1 or s.early_stopping is not False),
                "length_penalty and early_stopping are of beam search: set num_beams to 2 or more.",
            ),
            (
                several > (beams if beams > 1 else several),
                f"num_return_sequences={several} of num_beams={beams}: ask for at most as many as there are beams.",
            ),
            (
                several > 1 and beams == 1 and s.temperature == 0,
                f"num_return_sequences={several} of a greedy choice are equal: give a temperature, or num_beams.",
            ),
        ]

    def tree_flatten(self) -> tuple[list[Any], tuple[tuple[str, Any], ...]]:
        """The numbers that are on, as leaves; everything else is static."""
        static = tuple((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in self.NEUTRAL)
        return [getattr(self, name) if self._on(name) else None for name in self.NEUTRAL], static

    @classmethod
    def tree_unflatten(cls, static: tuple[tuple[str, Any], ...], leaves: Sequence[Any]) -> "Sampling":
        # JAX also builds trees of placeholders, which the constructor would rightly refuse
        made = object.__new__(cls)
        numbers = zip(cls.NEUTRAL.items(), leaves, strict=True)
        for name, value in (*static, *((name, off if leaf is None else leaf) for (name, off), leaf in numbers)):
            object.__setattr__(made, name, value)
        return made

    def _on(self, name: str) -> bool:
        if name == "length_penalty":
            return self.num_beams > 1
        value = getattr(self, name)
        return isinstance(value, jax.Array) or value != self.NEUTRAL[name]

    @property
    def rows(self) -> int:
        """How many rows a prompt takes in the batch."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @property
    def reads_history(self) -> bool:
        """Whether :meth:`process` looks at the tokens so far."""
        return self._on("repetition_penalty") or self.no_repeat_ngram_size > 0 or bool(self.bad_words)

    def process(
        self,
        logits: Float[Array, "B V"],
        history: Int[Array, "B S"] | None,
        count: Int[Array, ""] | int,
        eos_ids: tuple[int, ...] = (),
    ) -> Float[Array, "B V"]:
        """Logits after what is asked of the text, in the order of ``transformers``; ``count`` tokens are generated.

        ``history`` as in :mod:`moejax.generation.processors`; needed if :attr:`reads_history`.
        """
        if self.reads_history:
            assert history is not None
            if self._on("repetition_penalty"):
                logits = processors.penalise_repetition(logits, history, self.repetition_penalty)
            if self.no_repeat_ngram_size:
                logits = processors.forbid_repeated_ngrams(logits, history, self.no_repeat_ngram_size)
            # whether a text may end is for min_new_tokens to say
            if words := [word for word in self.bad_words if len(word) > 1 or word[0] not in eos_ids]:
                logits = processors.forbid_words(logits, history, words)
        if self._on("min_new_tokens"):
            logits = processors.forbid_early_end(logits, count, self.min_new_tokens, eos_ids)
        return logits

    def limited(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Tempered logits, minus infinity where top-k (first) or top-p (on what is left) leaves a token out."""
        if self._on("temperature"):
            logits = processors.temper(logits, self.temperature)
        if self.top_k:
            logits = processors.keep_top_k(logits, self.top_k)
        if self._on("top_p"):
            logits = processors.keep_top_p(logits, self.top_p)
        return logits

    def draw(self, limited: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        """One token for each row by its key, from logits that :meth:`limited` returned."""
        if self._on("temperature"):
            return jax.vmap(jax.random.categorical)(keys, limited)
        return jnp.argmax(limited, axis=-1)
