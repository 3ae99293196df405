"""Dense gated feed-forward layer: that of layers without experts, and a shared expert's."""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.glu import GLU
from moejax.layers.linear import matmul, normal
from moejax.rules import Reading


@dataclass(frozen=True)
class MLPConfig:
    """Architecture of one dense feed-forward layer.

    Attributes:
        bias: all three products have biases.
    """

    model_dim: int
    hidden_dim: int
    glu: GLU = GLU()
    bias: bool = False


@nnx.dataclass
class MLP(nnx.Module):
    """``output(glu(gate x, up x))``; the two halves of ``input`` are the gate's and the linear branch's matrices."""

    input: Float[Array, "2 F D"] = nnx.data()
    output: Float[Array, "D F"] = nnx.data()
    input_bias: Float[Array, "2 F"] | None = nnx.data()
    output_bias: Float[Array, " D"] | None = nnx.data()
    config: MLPConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: MLPConfig, dtype: DTypeLike) -> Self:
        """Random weights, zero biases."""
        c, (k1, k2) = config, jax.random.split(key)
        return cls(
            normal(k1, (2, c.hidden_dim, c.model_dim), dtype),
            normal(k2, (c.model_dim, c.hidden_dim), dtype),
            jnp.zeros((2, c.hidden_dim), dtype) if c.bias else None,
            jnp.zeros(c.model_dim, dtype) if c.bias else None,
            c,
        )

    def __call__(self, x: Float[Array, "B T D"], reading: Reading) -> Float[Array, "B T D"]:
        halves = reading.linear(matmul, x, self.input, self.input_bias, self.config.glu.slope)
        gate, up = jnp.unstack(halves, axis=-2)
        return reading.linear(matmul, self.config.glu(gate, up, reading), self.output, self.output_bias)
