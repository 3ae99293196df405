"""The settings of a generation, and the choice of a token by them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moejax.errors import MoejaxError
from moejax.generation import processors


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the best token (default), a draw with a temperature, or a search with several beams.

    A pytree. Its leaves are the numbers named in ``NEUTRAL``, so that one compiled program serves all their values. A
    number at its neutral value is no leaf: its step is left out of the program. All other fields are static.

    Attributes:
        temperature: 0 takes the best token; otherwise tokens are drawn from the softmax of logits / temperature.
        top_k: draw from the ``top_k`` best tokens, and those tied with the last of them; 0 keeps all.
        top_p: draw from the smallest set of best tokens whose probability reaches ``top_p``, after ``top_k``.
        min_new_tokens: number of new tokens before which a text may not end.
        repetition_penalty: above 1, tokens of the prompt and the answer so far become less likely.
        no_repeat_ngram_size: no sequence of this many tokens occurs twice, the prompt included; 0 allows all.
        bad_words: sequences of token ids that are never completed.
        num_beams: number of beams of a prompt; 1 does not search.
        length_penalty: beams are ranked by their log-probability / length ** length_penalty.
        early_stopping: when the search for a prompt ends, once it has ``num_beams`` finished answers. True: at once.
            False: when the best running beam at its present length is no better than the worst of the answers.
            ``"never"``: when no length up to the limit could make it better.
        num_return_sequences: number of answers to each prompt: independent draws, or the best beams.

    Raises:
        MoejaxError: a value out of its range, or a value that could have no effect beside the others.
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
        # a frozen dataclass refuses assignment, so normalised values are written past it
        vars(self).update(bad_words=tuple(tuple(int(token) for token in word) for word in self.bad_words))
        self._check_ranges()
        self._check_combinations()
        # an integer given for a float would be another type of input and need another program
        vars(self).update({name: type(neutral)(getattr(self, name)) for name, neutral in self.NEUTRAL.items()})

    def _check_ranges(self) -> None:
        check = self._check
        check(0 <= self.temperature < float("inf"), "temperature={temperature}: 0 (greedy) or a positive number.")
        check(self.top_k >= 0, "top_k={top_k}: a number of tokens, or 0 to keep all.")
        check(0 < self.top_p <= 1, "top_p={top_p}: a probability above 0, or 1 to keep all.")
        check(self.min_new_tokens >= 0, "min_new_tokens={min_new_tokens}: 0 or more.")
        check(0 < self.repetition_penalty < float("inf"), "repetition_penalty={repetition_penalty}: above 0.")
        check(
            self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size={no_repeat_ngram_size}: a length, or 0 for no limit."
        )
        check(all(self.bad_words), "bad_words holds an empty sequence: give each at least one token id.")
        check(all(min(word) >= 0 for word in self.bad_words), "bad_words holds a negative token id.")
        check(self.num_beams >= 1, "num_beams={num_beams}: at least 1 is needed.")
        check(isfinite(self.length_penalty), "length_penalty={length_penalty}: a number.")
        check(
            isinstance(self.early_stopping, bool) or self.early_stopping == "never",
            "early_stopping={early_stopping!r}: True, False or 'never'.",
        )
        check(self.num_return_sequences >= 1, "num_return_sequences={num_return_sequences}: at least 1 is needed.")

    def _check_combinations(self) -> None:
        """Refuse values that would have no effect beside the others."""
        check, draws, searches = self._check, self.temperature > 0, self.num_beams > 1
        check(
            draws or (self.top_k == 0 and self.top_p == 1),
            "top_k={top_k}, top_p={top_p} limit a draw, and temperature=0 draws nothing: give a temperature.",
        )
        check(
            not (searches and draws),
            "num_beams={num_beams} is a search, temperature={temperature} a draw: set one of them only.",
        )
        check(
            searches or (self.length_penalty == 1 and self.early_stopping is False),
            "length_penalty and early_stopping apply to beam search only: set num_beams to 2 or more.",
        )
        check(
            not searches or self.num_return_sequences <= self.num_beams,
            "num_return_sequences={num_return_sequences} of num_beams={num_beams}: ask for at most as many as there are"
            " beams.",
        )
        check(
            searches or draws or self.num_return_sequences == 1,
            "num_return_sequences={num_return_sequences} of a greedy choice are equal: give a temperature, or"
            " num_beams.",
        )

    def _check(self, holds: bool, message: str) -> None:
        """Raise unless ``holds``; ``message`` names fields in braces, filled in only then."""
        if not holds:
            raise MoejaxError(message.format(**vars(self)))

    def tree_flatten(self) -> tuple[list[Any], tuple[tuple[str, Any], ...]]:
        """The numbers that are not neutral as leaves, all other fields as static data."""
        static = tuple((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in self.NEUTRAL)
        return [getattr(self, name) if self._is_on(name) else None for name in self.NEUTRAL], static

    @classmethod
    def tree_unflatten(cls, static: Iterable[tuple[str, Any]], leaves: Iterable[Any]) -> Self:
        """The settings again. Leaves may be arrays or JAX's placeholders, which the constructor would refuse."""
        sampling = object.__new__(cls)
        neutral = cls.NEUTRAL.items()
        numbers = {name: off if leaf is None else leaf for (name, off), leaf in zip(neutral, leaves, strict=True)}
        vars(sampling).update(static, **numbers)
        return sampling

    def _is_on(self, name: str) -> bool:
        """Return whether a number of ``NEUTRAL`` has an effect, and hence a place in the program."""
        if name == "length_penalty":
            return self.num_beams > 1
        value = getattr(self, name)
        return isinstance(value, jax.Array) or value != self.NEUTRAL[name]

    @property
    def rows_per_prompt(self) -> int:
        """Number of rows that a prompt takes in the batch."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @property
    def reads_history(self) -> bool:
        """True if :meth:`process` reads the tokens so far."""
        return self._is_on("repetition_penalty") or self.no_repeat_ngram_size > 0 or bool(self.bad_words)

    def process(
        self,
        logits: Float[Array, "Q V"],
        history: Int[Array, "Q Z"] | None,
        count: Int[Array, ""] | int,
        eos_ids: tuple[int, ...] = (),
    ) -> Float[Array, "Q V"]:
        """Logits after the processors, in the order of ``transformers``.

        Args:
            history: the tokens so far as in :mod:`moejax.generation.processors`; needed if :attr:`reads_history`.
            count: number of new tokens so far.
            eos_ids: token ids that end a text.
        """
        if self.reads_history:
            assert history is not None
            if self._is_on("repetition_penalty"):
                logits = processors.penalise_repetition(logits, history, self.repetition_penalty)
            if self.no_repeat_ngram_size:
                logits = processors.forbid_repeated_ngrams(logits, history, self.no_repeat_ngram_size)
            # as in transformers, only min_new_tokens forbids the end of a text
            if words := [word for word in self.bad_words if len(word) > 1 or word[0] not in eos_ids]:
                logits = processors.forbid_words(logits, history, words)
        if self._is_on("min_new_tokens"):
            logits = processors.forbid_early_end(logits, count, self.min_new_tokens, eos_ids)
        return logits

    def limited(self, logits: Float[Array, "Q V"]) -> Float[Array, "Q V"]:
        """Logits divided by the temperature, minus infinity for tokens outside ``top_k`` or then ``top_p``."""
        if self._is_on("temperature"):
            logits = processors.temper(logits, self.temperature)
        if self.top_k:
            logits = processors.keep_top_k(logits, self.top_k)
        if self._is_on("top_p"):
            logits = processors.keep_top_p(logits, self.top_p)
        return logits

    def draw(self, limited: Float[Array, "Q V"], keys: Key[Array, " Q"]) -> Int[Array, " Q"]:
        """One token for each row, by its key, from logits that :meth:`limited` returned."""
        if self._is_on("temperature"):
            return jax.vmap(jax.random.categorical)(keys, limited)
        return jnp.argmax(limited, axis=-1)
