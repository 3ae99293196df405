"""A target in prompts, resolved: explain, ablate and the baselines make their arrays here.

A prompt and a target become the tokens to run and the seeds to read (:class:`ResolvedTarget`). Further functions run
several versions of one sequence side by side and read the same tokens in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.layers import Aux, BlockAux
from moejax.lm import LM, Prompt
from moejax.models import Decoder, Hidden
from moejax.models.padding import padded_length, right_pad, warn_beyond_context
from moejax.prompts import EncodedPrompt
from moejax.relevance.seeds import LogitSeeds, Seeds, TargetValues
from moejax.relevance.targets import Target, TargetLike, TargetTerms, checked_target
from moejax.rules import Gates, Reading


@dataclass(frozen=True)
class ResolvedTarget:
    """A target in B prompts: the sequences to run, and the targets to read from each of them.

    Attributes:
        lm, target: the model, and the target as it was asked.
        sequences: token ids of each sequence: the prompt, perhaps continued.
        prompts: each prompt as it was encoded.
        terms: the targets of each sequence.
        seeds: the same targets as arrays.
    """

    lm: LM
    target: Target
    sequences: list[list[int]]
    prompts: list[EncodedPrompt]
    terms: list[list[TargetTerms]]
    seeds: Seeds

    @classmethod
    def of(cls, lm: LM, prompts: Sequence[Prompt], target: TargetLike) -> Self:
        """Resolve ``target`` in each prompt.

        Raises:
            PromptError: as in :func:`moejax.explain`.
        """
        target = checked_target(target)
        encoded = [lm.encode(prompt) for prompt in prompts]
        resolved = [target.resolve(lm, ids) for ids in encoded]
        terms = [targets for _, targets in resolved]
        warn_beyond_context(lm.config, max(len(ids) for ids, _ in resolved))
        seeds = target.seeds(terms, lm.decoder.accumulation_dtype)
        return cls(lm, target, [ids for ids, _ in resolved], encoded, terms, seeds)

    @property
    def prompt_lengths(self) -> list[int]:
        """Number of tokens of each prompt."""
        return list(map(len, self.prompts))

    def roles(self, row: int) -> list[str]:
        """Return the role of each token of a sequence; what is behind a chat is the answer. Empty if it is no chat."""
        roles = self.prompts[row].roles
        return [] if roles is None else (roles + ["answer"] * len(self.sequences[row]))[: len(self.sequences[row])]

    @property
    def length(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(map(len, self.sequences))

    @property
    def num_cotangents(self) -> int:
        """Number of cotangents that a backward pass propagates for each sequence; a joint target has one."""
        return 1 if self.target.joint else max(map(len, self.terms))

    def tokens(self, gates: Gates | None = None, bucket: bool = True) -> Int[Array, "B T"]:
        """Return the sequences, padded at their ends.

        Args:
            gates: gates of the pass; if they hold for single tokens, sequences are padded to the longest only.
            bucket: pad further, to a length that other sequences share (:func:`padded_length`).
        """
        width = padded_length(self.lm.config, self.length, gates) if bucket else self.length
        return right_pad(self.sequences, width, self.lm.config.pad_id)

    def interventions(self, gates: Gates | None) -> Gates:
        """Return ``gates``, or no gates in place of ``None``.

        Raises:
            MoejaxError: they do not fit the model or the sequences.
        """
        shape = len(self.sequences), self.length
        return Gates() if gates is None else gates.check(self.lm.config, np.zeros(shape, np.int32))

    def labels(self, row: int, ids: Int[np.ndarray, "N J"]) -> list[str]:
        """Name the targets of a sequence for people; a joint target has one name.

        Args:
            ids: ids of the terms, with the best token filled in.
        """
        labels = [self.target.label(self.lm, terms, ids[n]) for n, terms in enumerate(self.terms[row])]
        return [" + ".join(labels)] if self.target.joint else labels

    def positions(self, row: int) -> Int[np.ndarray, " N"]:
        """Return the positions of the targets of a sequence; a joint target stands at its last position."""
        targets = self.terms[row][-1:] if self.target.joint else self.terms[row]
        return np.array([terms.position for terms in targets])


def repeat_rows(seeds: Seeds, rows: int) -> Seeds:
    """Repeat the seeds of one sequence for ``rows`` copies of it."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape[1:])), seeds)


def hidden_per_sequence(
    decoder: Decoder, tokens: Int[Array, "M T"], reading: Reading, embedded: Float[Array, "M T D"] | None = None
) -> Hidden:
    """Compute ``decoder.hidden`` with each row independent of the others, even if a layer couples sequences."""
    if not decoder.config.couples_sequences:
        return decoder.hidden(tokens, reading=reading, embedded=embedded)
    gates = jax.tree.map(lambda g: jnp.broadcast_to(g, (len(g), len(tokens), *g.shape[2:])), reading.gates)

    def run_one(tokens: Array, gates: Gates, embedded: Array | None) -> Hidden:
        of_row = replace(reading, gates=jax.tree.map(lambda g: g[:, None], gates))
        hidden = decoder.hidden(tokens[None], reading=of_row, embedded=None if embedded is None else embedded[None])
        # losses have no axis of sequences
        aux = [BlockAux(Aux(a.attention.routing), Aux(a.feed_forward.routing)) for a in hidden.aux]
        return jax.tree.map(lambda x: x[0], hidden._replace(aux=aux))

    return jax.vmap(run_one, in_axes=(0, 1, 0))(tokens, gates, embedded)


def read_first_rows_tokens(
    seeds: Seeds, decoder: Decoder, hidden: Hidden, reading: Reading
) -> tuple[TargetValues, Float[Array, "M N"]]:
    """Read the targets of M rows, with the tokens that the first row selects in all of them.

    Returns:
        The values to differentiate, and the exact values. The two differ for averages of logits: ``sum p z`` has the
        derivative of ``log sum exp z`` if ``p`` is constant, but is smaller by the entropy of ``p``.
    """
    values = seeds.read(decoder, hidden, reading)
    if not isinstance(seeds, LogitSeeds):
        return values, values.target
    seeds = replace(seeds, ids=jnp.broadcast_to(values.ids[:1], values.ids.shape))
    values = seeds.read(decoder, hidden, reading)
    return values, _exact(seeds, values)


def _exact(seeds: LogitSeeds, values: TargetValues) -> Float[Array, "M N"]:
    """Return the targets' values with ``log sum exp z`` in place of averages ``sum p z``."""
    named = jnp.take_along_axis(values.logits, values.ids, axis=-1)
    several = seeds.rivals.any(-1)
    of_rivals = _entropy(jnp.where(seeds.rivals | ~several[..., None], named, -jnp.inf)) * several
    return values.target - of_rivals - seeds.expected * _entropy(values.logits)


def _entropy(logits: Float[Array, "*b V"]) -> Float[Array, "*b"]:
    return jax.scipy.special.entr(jax.nn.softmax(logits)).sum(-1)
