"""Choosing tokens by beam search, in the steps and with the stopping rules of ``transformers``.

Each prompt has ``W`` running beams and ``W`` places for finished answers. A step ranks the continuations of all running
beams by their summed log-probability. Those among the best ``W`` that end become finished answers; the best ``W`` that
do not end become the running beams. Finished answers are ranked by their sum divided by ``length ** length_penalty``.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.generation.sampling import Sampling
from moejax.generation.step import DecodeStep, Generation, StaticOptions, answer_lengths, set_at

_EXCLUDED = -1e9
"""Added to the score of a beam that may not be chosen. Finite, so that excluded beams are still ordered."""


class _Answers(NamedTuple):
    """Token sequences with their scores, ``W`` or more (``Y``) of each prompt.

    Attributes:
        tokens: token ids.
        scores: the score that ranks a sequence.
        chosen_from: the running beam that each token was chosen from, if scores are kept.
        log_probs: log-probability of each token under the model, if scores are kept.
    """

    tokens: Int[Array, "B W A"]
    scores: Float[Array, "B W"]
    chosen_from: Int[Array, "B W A"] | None
    log_probs: Float[Array, "B W A"] | None

    def take(self, index: Int[Array, "B Y"]) -> Self:
        """The sequences at ``index`` of each prompt."""
        return jax.tree.map(lambda x: _take(x, index), self)

    def best(self, count: int, scores: Float[Array, "B W"]) -> tuple[Self, Int[Array, "B Y"]]:
        """The ``count`` best sequences by ``scores``, which become their scores, and their indices."""
        index = jax.lax.top_k(scores, count)[1]
        return self._replace(scores=scores).take(index), index


class Beams(NamedTuple):
    """The state of a beam search.

    Attributes:
        running: beams that go on, best first, with their summed log-probabilities as scores.
        origin: the running beam of the step before that each running beam continues.
        answers: finished answers, best first; places without an answer have the score -1e9.
        filled: True where ``answers`` holds an answer.
        hopeful: True if a prompt's running beams may still yield a better answer. Once False, its answers are final.
        step_scores: log-probabilities after processors of each running beam at each step, if scores are kept.
    """

    running: _Answers
    origin: Int[Array, "B W"]
    answers: _Answers
    filled: Bool[Array, "B W"]
    hopeful: Bool[Array, " B"]
    step_scores: Float[Array, "B W A V"] | None

    @classmethod
    def start(cls, logits: Float[Array, "Q V"], sampling: Sampling, options: StaticOptions) -> Self:
        """The state before the first token: all beams of a prompt are equal, so only the first may be continued."""
        (rows, vocabulary), beams, room = logits.shape, sampling.num_beams, options.max_new_tokens
        shape = (rows // beams, beams)
        excluded = jnp.full(shape, _EXCLUDED, logits.dtype)
        empty = _Answers(
            jnp.full((*shape, room), options.pad_id, jnp.int32),
            excluded,
            jnp.zeros((*shape, room), jnp.int32) if options.return_scores else None,
            jnp.zeros((*shape, room), logits.dtype) if options.return_scores else None,
        )
        return cls(
            running=empty._replace(scores=excluded.at[:, 0].set(0)),
            origin=jnp.zeros(shape, jnp.int32),
            answers=empty,
            filled=jnp.zeros(shape, bool),
            hopeful=jnp.ones(shape[0], bool),
            step_scores=jnp.zeros((*shape, room, vocabulary), logits.dtype) if options.return_scores else None,
        )

    @property
    def written(self) -> Int[Array, "Q A"]:
        """Tokens of the running beams, one row each."""
        return self.running.tokens.reshape(-1, self.running.tokens.shape[-1])

    @property
    def parents(self) -> Int[Array, " Q"]:
        """The row that each running beam continues."""
        prompts, beams = self.origin.shape
        return (self.origin + beams * jnp.arange(prompts)[:, None]).reshape(-1)

    def choose(self, step: DecodeStep, sampling: Sampling, options: StaticOptions) -> Self:
        """Continue the running beams, collect finished answers, and decide which prompts are still hopeful."""
        beams = sampling.num_beams
        candidates, origin, step_scores = self._continue_beams(step, sampling, options)
        ends = options.is_end(candidates.tokens[..., step.num_chosen]) | (step.num_chosen + 1 >= step.limit)
        running, index = candidates.best(beams, candidates.scores + jnp.where(ends, _EXCLUDED, 0))

        length = jnp.asarray(step.num_chosen + 1, candidates.scores.dtype)
        ranked = _rank(candidates.scores, length, sampling)
        # candidates behind the best W may go on in place of those that end, but may not become answers
        new = ends & (jnp.arange(ends.shape[1]) < beams)
        open_ = self.hopeful & ~self._has_all_answers(sampling)
        ranked += jnp.where(new, 0, _EXCLUDED) + jnp.where(open_, 0, _EXCLUDED)[:, None]
        merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self.answers, candidates)
        answers, kept = merged.best(beams, jnp.concatenate([self.answers.scores, ranked], axis=1))
        filled = _take(jnp.concatenate([self.filled, new], axis=1), kept)

        best_length = self._best_length(step.num_chosen + 1, sampling, options).astype(length.dtype)
        best_possible = _rank(running.scores[:, 0], best_length, sampling)
        worst = jnp.where(filled.all(1), answers.scores.min(1), _EXCLUDED)
        return self._replace(
            running=running,
            origin=_take(origin, index),
            answers=answers,
            filled=filled,
            hopeful=self.hopeful & (best_possible > worst),
            step_scores=step_scores,
        )

    def _continue_beams(
        self, step: DecodeStep, sampling: Sampling, options: StaticOptions
    ) -> tuple[_Answers, Int[Array, "B Y"], Float[Array, "B W A V"] | None]:
        """The best continuations, enough to hold ``W`` that do not end; the beams they continue; all step scores."""
        (prompts, beams), vocabulary = self.origin.shape, step.logits.shape[1]
        unprocessed = jax.nn.log_softmax(step.logits)
        processed = sampling.process(unprocessed, step.history, step.num_chosen, options.eos_ids)
        processed = processed.reshape(prompts, beams, vocabulary)
        total = (processed + self.running.scores[..., None]).reshape(prompts, -1)
        scores, index = jax.lax.top_k(total, beams * max(2, 1 + len(options.eos_ids)))
        origin, token = index // vocabulary, index % vocabulary
        candidates = self.running.take(origin)._replace(scores=scores)
        candidates = candidates._replace(tokens=set_at(candidates.tokens, token, step.num_chosen, 2))
        if self.step_scores is None or candidates.chosen_from is None or candidates.log_probs is None:
            return candidates, origin, None
        log_probs = jnp.take_along_axis(unprocessed.reshape(prompts, -1), index, axis=1)
        candidates = candidates._replace(
            chosen_from=set_at(candidates.chosen_from, origin, step.num_chosen, 2),
            log_probs=set_at(candidates.log_probs, log_probs, step.num_chosen, 2),
        )
        return candidates, origin, set_at(self.step_scores, processed, step.num_chosen, 2)

    def _has_all_answers(self, sampling: Sampling) -> Bool[Array, " B"] | bool:
        """Return whether each prompt has all the answers that ``early_stopping=True`` asks for."""
        return self.filled.all(1) if sampling.early_stopping is True else False

    def _best_length(self, length: Int[Array, ""] | int, sampling: Sampling, options: StaticOptions) -> Int[Array, ""]:
        """The length by which a running beam's score is judged: the present one, or with "never" the best for it."""
        if sampling.early_stopping != "never":
            return jnp.asarray(length)
        return jnp.where(jnp.asarray(sampling.length_penalty) > 0, options.max_new_tokens, length)

    def finished(self, sampling: Sampling) -> Bool[Array, ""]:
        """Return whether the answers of all prompts are final."""
        return ~(self.hopeful & ~self._has_all_answers(sampling)).any()

    def result(self, num_chosen: Int[Array, ""], sampling: Sampling, options: StaticOptions) -> Generation:
        """The best finished answers of each prompt, after ``num_chosen`` steps."""
        best = jax.tree.map(lambda x: x[:, : sampling.num_return_sequences], self.answers)
        tokens = best.tokens.reshape(-1, options.max_new_tokens)
        lengths = answer_lengths(tokens, num_chosen, options)
        generation = Generation(tokens, lengths, sequence_scores=best.scores.reshape(-1))
        if self.step_scores is None:
            return generation
        within = jnp.arange(options.max_new_tokens) < lengths[:, None]
        scores = jnp.take_along_axis(self.step_scores, best.chosen_from[..., None], axis=1)
        return generation._replace(
            scores=jnp.where(within[..., None], scores.reshape(*tokens.shape, -1), 0),
            log_probs=jnp.where(within, best.log_probs.reshape(tokens.shape), 0),
        )


def _rank(scores: Float[Array, "*s"], length: Array, sampling: Sampling) -> Float[Array, "*s"]:
    """The score that ranks sequences of ``length`` new tokens: ``scores / length ** length_penalty``."""
    return scores / length**sampling.length_penalty


def _take(x: Array, index: Array) -> Array:
    """``x[b, index[b, k]]``."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
