"""Seeds: the targets of a compiled pass as arrays. A target's own kind of seeds stands beside it in ``targets/``."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from moejax.models import Decoder, Hidden
from moejax.rules import Reading

BEST = -1
"""Token id that stands for the token with the largest logit, which is known only after the forward pass."""


class TargetValues(NamedTuple):
    """Values of N targets for each sequence, read from one forward pass.

    Attributes:
        target: the values, to be differentiated.
        ids: ids of each target's J terms, with :data:`BEST` replaced: tokens, or experts of a router's choice.
        logits: next-token logits at the targets' positions, not differentiated.
    """

    target: Float[Array, "B N"]
    ids: Int[Array, "B N J"]
    logits: Float[Array, "B N V"]


@runtime_checkable
class Seeds(Protocol):
    """N targets for each of B sequences, as a pytree; the first two axes of every leaf are B and N."""

    @property
    def num_targets(self) -> int:
        """The number N of targets of a sequence."""
        ...

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        """Compute the targets' values from a forward pass.

        Args:
            hidden: the results of the forward pass before the head.
            reading: the reading of that pass, for all layers.
        """
        ...


def at_positions(x: Float[Array, "B T O"], positions: Int[Array, "B N"]) -> Float[Array, "B N O"]:
    """Select the rows of ``x`` at the targets' positions."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitSeeds:
    """Sums of logits ``z``: ``sum signs z[ids] - mean average(z) - expected sum(p z)`` with ``p = softmax(z)``.

    Attributes:
        positions: the token whose successor each target predicts.
        ids: token ids of a target's J terms; :data:`BEST` stands for the token with the largest logit.
        signs: factors of the terms.
        rivals: terms that count ``-p[id] / (sum of p over the rivals)`` in place of their sign.
        mean: factor of the average logit of all tokens.
        expected: factor of the expected logit.
        dense: true if any ``mean`` or ``expected`` is not zero; all logits take part in the backward pass then.
    """

    positions: Int[Array, "B N"]
    ids: Int[Array, "B N J"]
    signs: Float[Array, "B N J"]
    rivals: Bool[Array, "B N J"]
    mean: Float[Array, "B N"]
    expected: Float[Array, "B N"]
    dense: bool = field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, positions: Int[Array, "B N"], ids: Int[Array, "B N J"], signs: Float[Array, "B N J"]) -> Self:
        """Make seeds of sums of named logits alone."""
        zeros = jnp.zeros(positions.shape, signs.dtype)
        return cls(positions, ids, signs, jnp.zeros(ids.shape, bool), zeros, zeros)

    @property
    def num_targets(self) -> int:
        return self.positions.shape[1]

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        stream = at_positions(hidden.stream, self.positions)
        logits = stop_gradient(decoder.logits(stream))
        ids = jnp.where(self.ids == BEST, jnp.argmax(logits, axis=-1, keepdims=True), self.ids)
        named = jnp.take_along_axis(logits, ids, axis=-1)
        signs = jnp.where(self.rivals, -jax.nn.softmax(named, axis=-1, where=self.rivals), self.signs)
        last = reading.for_layer(-1)
        normed = decoder.norm(stream, last)
        if not self.dense:
            # only the rows of the head that the seeds name take part in the backward pass
            rows = decoder.named_logits(normed, ids, last)
            return TargetValues((rows * signs).sum(-1), ids, logits)
        background = self.mean[..., None] / logits.shape[-1] + self.expected[..., None] * jax.nn.softmax(logits)
        one_hot = jax.nn.one_hot(ids, logits.shape[-1], dtype=logits.dtype)
        every = decoder.head_product(normed, last)
        return TargetValues((every * ((one_hot * signs[..., None]).sum(-2) - background)).sum(-1), ids, logits)
