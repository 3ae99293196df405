"""What the loop over tokens hands to a way of choosing them, and what it gets back."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.errors import MoejaxError


@dataclass(frozen=True)
class Plan:
    """What a compiled program is made for.

    Attributes:
        max_new_tokens: room for each row's answer.
        eos_ids: tokens that end a row.
        pad_id: what a row is filled with behind its end.
        return_scores: keep the scores of every token.
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

    def ends(self, tokens: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Which tokens end a row."""
        return jnp.isin(tokens, jnp.array(self.eos_ids, jnp.int32))


class Turn(NamedTuple):
    """One step of the loop. ``B`` rows: those of one prompt (draws or beams) lie side by side.

    Attributes:
        logits: of the next token.
        history: the tokens so far as processors read them, if a processor asks for them.
        step: tokens chosen so far.
        limit: the number of tokens at which every row ends.
        keys: this step's own, one for each row.
    """

    logits: Float[Array, "B V"]
    history: Int[Array, "B S"] | None
    step: Int[Array, ""] | int
    limit: Int[Array, ""] | int
    keys: Key[Array, " B"]


class Generation(NamedTuple):
    """What was generated; ``B`` counts answers, those of one prompt side by side, best first if searched for.

    Attributes:
        tokens: ids, filled with the pad id behind the end.
        lengths: how many of them are the answer, the token that ended it included.
        scores: what each token was chosen from: logits after processors and limits, of beam search log-probabilities
            after processors. Zero behind the end. Only if asked for.
        log_probs: log-probability of each token under the model itself, before processors and limits. Zero behind the
            end. Only if asked for.
        sequence_scores: what beams are ranked by: sum of processed log-probabilities / length ** length_penalty.
            Only of beam search.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    scores: Float[Array, "B N V"] | None = None
    log_probs: Float[Array, "B N"] | None = None
    sequence_scores: Float[Array, " B"] | None = None


def put(into: Array, new: Array, step: Int[Array, ""] | int, axis: int = 1) -> Array:
    """``into`` with ``new`` at position ``step`` of ``axis``, which ``new`` lacks."""
    return jax.lax.dynamic_update_index_in_dim(into, new.astype(into.dtype), step, axis)


def lengths(tokens: Int[Array, "B N"], step: Int[Array, ""], plan: Plan) -> Int[Array, " B"]:
    """Of each row, up to and with its first end; without one, the steps that were taken."""
    ends = plan.ends(tokens)
    first = jnp.where(ends.any(1), jnp.argmax(ends, axis=1), tokens.shape[1])
    return jnp.minimum(first + 1, step)
