"""What the decode loop gives to a way of choosing tokens (sampled rows or beams), and what generation returns."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.errors import MoejaxError


@dataclass(frozen=True)
class StaticOptions:
    """The options that are static under ``jit``: other values need another program.

    Attributes:
        max_new_tokens: most new tokens of a row (``A``).
        eos_ids: token ids that end a row.
        pad_id: token id that fills a row behind its end.
        return_scores: keep the scores of every token.

    Raises:
        MoejaxError: no room for a token, or a negative token id.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    return_scores: bool

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MoejaxError(f"max_new_tokens={self.max_new_tokens}: at least 1 is needed.")
        if min(self.eos_ids, default=0) < 0 or self.pad_id < 0:
            raise MoejaxError(f"eos_ids={self.eos_ids}, pad_id={self.pad_id}: token ids are not negative.")

    def is_end(self, tokens: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Return whether each token ends a row."""
        return jnp.isin(tokens, jnp.array(self.eos_ids, jnp.int32))


class DecodeStep(NamedTuple):
    """The inputs of one choice of tokens, a row ``Q`` for each beam or draw; rows of one prompt lie side by side.

    Attributes:
        logits: logits of the next token.
        history: prompt and new tokens as processors read them; ``None`` if no processor needs them.
        num_chosen: number of tokens that each row has chosen before this step.
        limit: number of tokens at which every row ends.
        keys: random keys of this step, one for each row.
    """

    logits: Float[Array, "Q V"]
    history: Int[Array, "Q Z"] | None
    num_chosen: Int[Array, ""] | int
    limit: Int[Array, ""] | int
    keys: Key[Array, " Q"]


class Generation(NamedTuple):
    """The generated tokens; ``B`` counts answers. Answers to one prompt lie side by side, beams with the best first.

    Attributes:
        tokens: token ids, filled with the pad id behind the end of an answer.
        lengths: number of tokens of each answer, with the token that ended it.
        scores: what each token was chosen from: logits after processors and limits, or in beam search
            log-probabilities after processors. Zero behind the end. ``None`` unless asked for.
        log_probs: log-probability of each token under the model alone, before processors and limits. Zero behind the
            end. ``None`` unless asked for.
        sequence_scores: the score that ranks beams: sum of processed log-probabilities / length ** length_penalty.
            ``None`` without beam search.
        finite: for each prompt, whether the largest logit of every step was finite; if not, its tokens mean nothing.
    """

    tokens: Int[Array, "B A"]
    lengths: Int[Array, " B"]
    scores: Float[Array, "B A V"] | None = None
    log_probs: Float[Array, "B A"] | None = None
    sequence_scores: Float[Array, " B"] | None = None
    finite: Bool[Array, " P"] | None = None

    def __repr__(self) -> str:
        shown = {name: value for name, value in self._replace(finite=None)._asdict().items() if value is not None}
        fields = [f"{name}={_short(value)}" for name, value in shown.items()]
        return f"Generation({', '.join(fields)})"


def _short(value: object) -> str:
    """Dtype and shape of an array, ``int32[3,12]``; the ``repr`` of anything else that stands in a tree."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return repr(value) if shape is None or dtype is None else f"{dtype}[{','.join(map(str, shape))}]"


def set_at(array: Array, values: Array, index: Int[Array, ""] | int, axis: int = 1) -> Array:
    """``array`` with ``values`` at ``index`` of ``axis``; ``values`` has no such axis."""
    return jax.lax.dynamic_update_index_in_dim(array, values.astype(array.dtype), index, axis)


def answer_lengths(tokens: Int[Array, "B A"], num_chosen: Int[Array, ""], options: StaticOptions) -> Int[Array, " B"]:
    """Number of tokens of each row up to and with its first end; without an end, all ``num_chosen`` tokens."""
    ends = options.is_end(tokens)
    first = jnp.where(ends.any(1), jnp.argmax(ends, axis=1), tokens.shape[1])
    return jnp.minimum(first + 1, num_chosen)
