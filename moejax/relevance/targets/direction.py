"""A direction of the residual stream as a target."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.errors import PromptError
from moejax.lm import LM
from moejax.models import Decoder, Hidden
from moejax.relevance.seeds import Seeds, TargetValues, at_positions
from moejax.relevance.targets.base import Target, TargetTerms, checked_position, register_target
from moejax.rules import Reading


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StreamSeeds:
    """Products of directions with the residual stream.

    Attributes:
        positions: the token of each target.
        layer: the layer that reads the stream; the number of layers stands for the stream that leaves the last layer.
    """

    positions: Int[Array, "B N"]
    directions: Float[Array, "B N D"]
    layer: int = field(metadata={"static": True})

    @property
    def num_targets(self) -> int:
        return self.positions.shape[1]

    def read(self, decoder: Decoder, hidden: Hidden, reading: Reading) -> TargetValues:
        stream = hidden.stream
        if self.layer < len(hidden.entering):
            # gate and node as in the layer itself; the stream that leaves the last layer has passed both
            stream = reading.for_layer(self.layer).gate("tokens", hidden.entering[self.layer])
        at = at_positions(stream, self.positions).astype(self.directions.dtype)
        last = at_positions(hidden.stream, self.positions)
        ids = jnp.zeros((*self.positions.shape, 0), jnp.int32)
        return TargetValues((at * self.directions).sum(-1), ids, stop_gradient(decoder.logits(last)))


@register_target("direction")
@dataclass(frozen=True, eq=False)
class Direction(Target):
    """The residual stream that a layer reads, at one token, along a vector of the model's width D.

    The vector may be a probe's weight, a dictionary's feature, or a row of the identity for one of the stream's
    numbers. ``layer`` may be the number of layers: the stream that leaves the last layer.
    """

    vector: Any
    layer: int
    position: int = -1

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        if np.shape(self.vector) != (lm.config.model_dim,) or not 0 <= self.layer <= lm.config.num_layers:
            raise PromptError(
                f"a direction of shape {np.shape(self.vector)} at layer {self.layer}: the stream has "
                f"{lm.config.model_dim} numbers, and layers 0 to {lm.config.num_layers}."
            )
        return prompt, [TargetTerms(checked_position(self.position, len(prompt)), ())]

    def seeds(self, rows: list[list[TargetTerms]], dtype: DTypeLike) -> Seeds:
        positions = [[target.position for target in targets] for targets in rows]
        directions = jnp.broadcast_to(jnp.asarray(self.vector, dtype), (len(rows), 1, np.size(self.vector)))
        return StreamSeeds(jnp.asarray(positions, jnp.int32), directions, self.layer)

    def label(self, lm: LM, terms: TargetTerms, ids: np.ndarray) -> str:
        return f"stream {self.layer} along a direction"
