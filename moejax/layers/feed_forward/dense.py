"""Dense feed-forward layer: that of layers without experts, and a shared expert's."""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.feed_forward.activation import GLU, Unit
from moejax.layers.linear import matmul, normal
from moejax.rules import Reading


@dataclass(frozen=True)
class MLPConfig:
    """Architecture of one dense feed-forward layer.

    Attributes:
        bias: all products have biases.
    """

    model_dim: int
    hidden_dim: int
    unit: Unit = GLU()
    bias: bool = False


@nnx.dataclass
class MLP(nnx.Module):
    """``output(unit(input x))``; the entries of ``input`` are the matrices of the unit's branches, the gate's first."""

    input: Float[Array, "M F D"] = nnx.data()
    output: Float[Array, "O F"] = nnx.data()
    input_bias: Float[Array, "M F"] | None = nnx.data()
    output_bias: Float[Array, " O"] | None = nnx.data()
    config: MLPConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: MLPConfig, dtype: DTypeLike) -> Self:
        """Random weights, zero biases."""
        c, (k1, k2) = config, jax.random.split(key)
        shape, branches = (c.hidden_dim, c.model_dim), c.unit.branches
        return cls(
            normal(k1, (branches, *shape), dtype),
            normal(k2, shape[::-1], dtype),
            jnp.zeros((branches, c.hidden_dim), dtype) if c.bias else None,
            jnp.zeros(c.model_dim, dtype) if c.bias else None,
            c,
        )

    def __call__(self, x: Float[Array, "B T D"], reading: Reading) -> Float[Array, "B T O"]:
        unit = self.config.unit
        hidden = reading.linear(matmul, x, self.input, self.input_bias, unit.slope)
        return reading.linear(matmul, unit(hidden, reading), self.output, self.output_bias)
