"""A target that the package does not have: a number of the stream, summed over all tokens, with seeds of its own."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax import LM
from moejax.models import Decoder, Hidden
from moejax.relevance import Target, register_target
from moejax.relevance.seeds import TargetValues
from moejax.relevance.targets import TargetTerms
from moejax.rules import Reading


@register_target("stream-sum")
@dataclass(frozen=True)
class StreamSum(Target):
    """The sum of one of the stream's numbers over the tokens of the prompt, as it leaves the last layer."""

    number: int

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        return prompt, [TargetTerms(position=len(prompt) - 1, terms=())]

    def seeds(self, rows: list[list[TargetTerms]], dtype: Any) -> "StreamSumSeeds":
        ends = jnp.asarray([[target.position for target in targets] for targets in rows], jnp.int32)
        return StreamSumSeeds(ends, jnp.full(ends.shape, self.number, jnp.int32), jnp.ones(ends.shape, dtype))

    def label(self, lm: LM, terms: TargetTerms, ids: np.ndarray) -> str:
        return f"sum of number {self.number} of the stream"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StreamSumSeeds:
    """Seeds that no target of the package has: they read every position."""

    ends: Int[Array, "B N"]
    numbers: Int[Array, "B N"]
    factors: Float[Array, "B N"]

    @property
    def num_targets(self) -> int:
        return self.ends.shape[1]

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        last = jnp.take_along_axis(hidden.stream, self.ends[..., None], axis=1)
        counted: Bool[Array, "B N T"] = jnp.arange(hidden.stream.shape[1]) <= self.ends[..., None]
        numbers = jnp.take_along_axis(jnp.moveaxis(hidden.stream, -1, 1), self.numbers[..., None], axis=1)
        values = jnp.where(counted, numbers.astype(self.factors.dtype), 0).sum(-1) * self.factors
        ids = jnp.zeros((*self.ends.shape, 0), jnp.int32)
        return TargetValues(values, ids, jax.lax.stop_gradient(decoder.logits(last)))
