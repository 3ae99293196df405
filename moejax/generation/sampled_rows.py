"""Choosing tokens row by row: the best token, or a random draw."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.generation.sampling import Sampling
from moejax.generation.step import DecodeStep, Generation, StaticOptions, answer_lengths, set_at


class SampledRows(NamedTuple):
    """The state of rows that are independent of each other.

    Attributes:
        written: new tokens, the pad id where a row has none.
        done: True if a row has ended.
        scores: what each token was chosen from, if scores are kept.
        log_probs: log-probability of each token under the model, if scores are kept.
    """

    written: Int[Array, "Q A"]
    done: Bool[Array, " Q"]
    scores: Float[Array, "Q A V"] | None
    log_probs: Float[Array, "Q A"] | None

    @classmethod
    def start(cls, logits: Float[Array, "Q V"], sampling: Sampling, options: StaticOptions) -> Self:
        """The state before the first token."""
        shape = (len(logits), options.max_new_tokens)
        return cls(
            jnp.full(shape, options.pad_id, jnp.int32),
            jnp.zeros(shape[0], bool),
            jnp.zeros((*shape, logits.shape[1]), logits.dtype) if options.return_scores else None,
            jnp.zeros(shape, logits.dtype) if options.return_scores else None,
        )

    @property
    def parents(self) -> None:
        """``None``: every row continues itself."""
        return None

    def choose(self, step: DecodeStep, sampling: Sampling, options: StaticOptions) -> Self:
        """Add one token to each row that has not ended."""
        processed = sampling.process(step.logits, step.history, step.num_chosen, options.eos_ids)
        limited = sampling.limited(processed)
        drawn = jnp.where(self.done, options.pad_id, sampling.draw(limited, step.keys).astype(jnp.int32))
        scores, log_probs = self.scores, self.log_probs
        if scores is not None and log_probs is not None:
            unprocessed = jnp.take_along_axis(jax.nn.log_softmax(step.logits), drawn[:, None], axis=1)[:, 0]
            scores = set_at(scores, jnp.where(self.done[:, None], 0, limited), step.num_chosen)
            log_probs = set_at(log_probs, jnp.where(self.done, 0, unprocessed), step.num_chosen)
        return self._replace(
            written=set_at(self.written, drawn, step.num_chosen),
            done=self.done | options.is_end(drawn),
            scores=scores,
            log_probs=log_probs,
        )

    def finished(self, sampling: Sampling) -> Bool[Array, ""]:
        """Return whether every row has ended."""
        return self.done.all()

    def result(self, num_chosen: Int[Array, ""], sampling: Sampling, options: StaticOptions) -> Generation:
        """Every row as an answer, after ``num_chosen`` steps."""
        return Generation(self.written, answer_lengths(self.written, num_chosen, options), self.scores, self.log_probs)
