"""Choosing tokens row by row: the best one, or a draw."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.generation.sampling import Sampling
from moejax.generation.step import Generation, Plan, Turn, lengths, put


class Draws(NamedTuple):
    """The state of rows that have nothing to do with each other."""

    written: Int[Array, "B N"]
    done: Bool[Array, " B"]
    scores: Float[Array, "B N V"] | None
    log_probs: Float[Array, "B N"] | None

    @classmethod
    def start(cls, logits: Float[Array, "B V"], sampling: Sampling, plan: Plan) -> Self:
        """Before the first token."""
        shape = (len(logits), plan.max_new_tokens)
        return cls(
            jnp.full(shape, plan.pad_id, jnp.int32),
            jnp.zeros(shape[0], bool),
            jnp.zeros((*shape, logits.shape[1]), logits.dtype) if plan.return_scores else None,
            jnp.zeros(shape, logits.dtype) if plan.return_scores else None,
        )

    @property
    def parents(self) -> None:
        """Every row continues itself."""
        return None

    def choose(self, turn: Turn, sampling: Sampling, plan: Plan) -> Self:
        """One more token for each row that has not ended."""
        processed = sampling.process(turn.logits, turn.history, turn.step, plan.eos_ids)
        limited = sampling.limited(processed)
        drawn = jnp.where(self.done, plan.pad_id, sampling.draw(limited, turn.keys).astype(jnp.int32))
        scores, log_probs = self.scores, self.log_probs
        if scores is not None and log_probs is not None:
            plain = jnp.take_along_axis(jax.nn.log_softmax(turn.logits), drawn[:, None], axis=1)[:, 0]
            scores = put(scores, jnp.where(self.done[:, None], 0, limited), turn.step)
            log_probs = put(log_probs, jnp.where(self.done, 0, plain), turn.step)
        return self._replace(
            written=put(self.written, drawn, turn.step),
            done=self.done | plan.ends(drawn),
            scores=scores,
            log_probs=log_probs,
        )

    def finished(self, sampling: Sampling) -> Bool[Array, ""]:
        """Every row has drawn an end."""
        return self.done.all()

    def result(self, step: Int[Array, ""], sampling: Sampling, plan: Plan) -> Generation:
        """Every row is an answer."""
        return Generation(self.written, lengths(self.written, step, plan), self.scores, self.log_probs)
