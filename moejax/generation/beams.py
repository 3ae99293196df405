"""Choosing tokens by beam search, in the steps and with the stopping rules of ``transformers``.

A prompt has ``M`` running beams and ``M`` slots for finished answers. A step ranks the continuations of all running
beams by their summed log-probability. Of the best ``M``, those that end are finished answers; the best ``M`` that do
not end run on. Finished answers compete by their sum divided by ``length ** length_penalty``.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.generation.sampling import Sampling
from moejax.generation.step import Generation, Plan, Turn, lengths, put

# What takes a beam out of the running; finite, so that an order remains among those that are out.
_OUT = -1e9


class _Answers(NamedTuple):
    """Several answers to each prompt.

    Attributes:
        tokens: ids.
        scores: what they are ranked by.
        slots: the running beam that each token was chosen from, if scores are kept.
        log_probs: of each token under the model, if scores are kept.
    """

    tokens: Int[Array, "B M N"]
    scores: Float[Array, "B M"]
    slots: Int[Array, "B M N"] | None
    log_probs: Float[Array, "B M N"] | None

    def take(self, which: Int[Array, "B K"]) -> Self:
        """``which`` of them."""
        return jax.tree.map(lambda x: _take(x, which), self)

    def best(self, count: int, scores: Float[Array, "B M"]) -> tuple[Self, Int[Array, "B K"]]:
        """The ``count`` best by ``scores``, which become their scores, and where they stood."""
        which = jax.lax.top_k(scores, count)[1]
        return self._replace(scores=scores).take(which), which


class Beams(NamedTuple):
    """The state of a beam search.

    Attributes:
        running: beams that go on, best first, scored by summed log-probability.
        origin: the running beam that each of them continues.
        answers: finished ones, best first; slots not yet filled score -1e9.
        filled: which of these slots hold an answer.
        hopeful: whether a prompt's running beams may still yield a better answer. Once false, its answers stand.
        step_scores: log-probabilities after processors of each running beam at each step, if scores are kept.
    """

    running: _Answers
    origin: Int[Array, "B M"]
    answers: _Answers
    filled: Bool[Array, "B M"]
    hopeful: Bool[Array, " B"]
    step_scores: Float[Array, "B M N V"] | None

    @classmethod
    def start(cls, logits: Float[Array, "R V"], sampling: Sampling, plan: Plan) -> Self:
        """Before the first token: all beams are equal, so only the first may be continued."""
        (rows, vocabulary), beams, room = logits.shape, sampling.num_beams, plan.max_new_tokens
        shape = (rows // beams, beams)
        out = jnp.full(shape, _OUT, logits.dtype)
        empty = _Answers(
            jnp.full((*shape, room), plan.pad_id, jnp.int32),
            out,
            jnp.zeros((*shape, room), jnp.int32) if plan.return_scores else None,
            jnp.zeros((*shape, room), logits.dtype) if plan.return_scores else None,
        )
        return cls(
            running=empty._replace(scores=out.at[:, 0].set(0)),
            origin=jnp.zeros(shape, jnp.int32),
            answers=empty,
            filled=jnp.zeros(shape, bool),
            hopeful=jnp.ones(shape[0], bool),
            step_scores=jnp.zeros((*shape, room, vocabulary), logits.dtype) if plan.return_scores else None,
        )

    @property
    def written(self) -> Int[Array, "R N"]:
        """The running beams' tokens, a row each."""
        return self.running.tokens.reshape(-1, self.running.tokens.shape[-1])

    @property
    def parents(self) -> Int[Array, " R"]:
        """The row that each running beam continues."""
        prompts, beams = self.origin.shape
        return (self.origin + beams * jnp.arange(prompts)[:, None]).reshape(-1)

    def choose(self, turn: Turn, sampling: Sampling, plan: Plan) -> Self:
        """Continue, finish, and see whether it is worth going on."""
        beams = sampling.num_beams
        candidates, origin, step_scores = self._continued(turn, sampling, plan)
        ends = plan.ends(candidates.tokens[..., turn.step]) | (turn.step + 1 >= turn.limit)
        running, which = candidates.best(beams, candidates.scores + jnp.where(ends, _OUT, 0))

        length = jnp.asarray(turn.step + 1, candidates.scores.dtype)
        ranked = candidates.scores / length**sampling.length_penalty
        # continuations behind the best M only fill the ranks of those that end
        new = ends & (jnp.arange(ends.shape[1]) < beams)
        open_ = self.hopeful & ~self._full(sampling)
        ranked += jnp.where(new, 0, _OUT) + jnp.where(open_, 0, _OUT)[:, None]
        merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self.answers, candidates)
        answers, kept = merged.best(beams, jnp.concatenate([self.answers.scores, ranked], axis=1))
        filled = _take(jnp.concatenate([self.filled, new], axis=1), kept)

        hoped = self._hoped_length(turn.step + 1, sampling, plan).astype(length.dtype)
        hope = running.scores[:, 0] / hoped**sampling.length_penalty
        worst = jnp.where(filled.all(1), answers.scores.min(1), _OUT)
        return self._replace(
            running=running,
            origin=_take(origin, which),
            answers=answers,
            filled=filled,
            hopeful=self.hopeful & (hope > worst),
            step_scores=step_scores,
        )

    def _continued(
        self, turn: Turn, sampling: Sampling, plan: Plan
    ) -> tuple[_Answers, Int[Array, "B K"], Float[Array, "B M N V"] | None]:
        """The best continuations, as many as are needed for ``M`` that do not end, and the beams they continue."""
        (prompts, beams), vocabulary = self.origin.shape, turn.logits.shape[1]
        plain = jax.nn.log_softmax(turn.logits)
        processed = sampling.process(plain, turn.history, turn.step, plan.eos_ids)
        processed = processed.reshape(prompts, beams, vocabulary)
        total = (processed + self.running.scores[..., None]).reshape(prompts, -1)
        scores, flat = jax.lax.top_k(total, beams * max(2, 1 + len(plan.eos_ids)))
        origin, token = flat // vocabulary, flat % vocabulary
        taken = self.running.take(origin)._replace(scores=scores)
        taken = taken._replace(tokens=put(taken.tokens, token, turn.step, 2))
        if self.step_scores is None or taken.slots is None or taken.log_probs is None:
            return taken, origin, None
        chosen = jnp.take_along_axis(plain.reshape(prompts, -1), flat, axis=1)
        taken = taken._replace(
            slots=put(taken.slots, origin, turn.step, 2), log_probs=put(taken.log_probs, chosen, turn.step, 2)
        )
        return taken, origin, put(self.step_scores, processed, turn.step, 2)

    def _full(self, sampling: Sampling) -> Bool[Array, " B"] | bool:
        """Which prompts have all the answers that early stopping asks for."""
        return self.filled.all(1) if sampling.early_stopping is True else False

    def _hoped_length(self, length: Int[Array, ""] | int, sampling: Sampling, plan: Plan) -> Int[Array, ""]:
        """The length by which a running beam's sum is divided to see how good it may become."""
        if sampling.early_stopping != "never":
            return jnp.asarray(length)
        return jnp.where(jnp.asarray(sampling.length_penalty) > 0, plan.max_new_tokens, length)

    def finished(self, sampling: Sampling) -> Bool[Array, ""]:
        """No prompt's answers can change."""
        return ~(self.hopeful & ~self._full(sampling)).any()

    def result(self, step: Int[Array, ""], sampling: Sampling, plan: Plan) -> Generation:
        """The best finished answers of each prompt."""
        best = jax.tree.map(lambda x: x[:, : sampling.num_return_sequences], self.answers)
        tokens = best.tokens.reshape(-1, plan.max_new_tokens)
        length = lengths(tokens, step, plan)
        found = Generation(tokens, length, sequence_scores=best.scores.reshape(-1))
        if self.step_scores is None:
            return found
        within = jnp.arange(plan.max_new_tokens) < length[:, None]
        scores = jnp.take_along_axis(self.step_scores, best.slots[..., None], axis=1)
        return found._replace(
            scores=jnp.where(within[..., None], scores.reshape(*tokens.shape, -1), 0),
            log_probs=jnp.where(within, best.log_probs.reshape(tokens.shape), 0),
        )


def _take(x: Array, which: Array) -> Array:
    """``x[b, which[b, k]]``."""
    return jnp.take_along_axis(x, which.reshape(*which.shape, *[1] * (x.ndim - 2)), axis=1)
