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
    """Architecture of one dense feed-forward layer."""

    model_dim: int
    hidden_dim: int
    glu: GLU = GLU()


@nnx.dataclass
class MLP(nnx.Module):
    """``output(glu(gate x, up x))``; the two halves of ``input`` are the gate's and the linear branch's matrices."""

    input: Float[Array, "2 F D"] = nnx.data()
    output: Float[Array, "D F"] = nnx.data()
    config: MLPConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: MLPConfig, dtype: DTypeLike) -> Self:
        """Random weights."""
        k1, k2 = jax.random.split(key)
        shape = (config.hidden_dim, config.model_dim)
        return cls(normal(k1, (2, *shape), dtype), normal(k2, shape[::-1], dtype), config)

    def __call__(self, x: Float[Array, "B T D"], reading: Reading) -> Float[Array, "B T D"]:
        gate, up = jnp.unstack(reading.linear(matmul, x, self.input, slope=self.config.glu.slope), axis=-2)
        return reading.linear(matmul, self.config.glu(gate, up, reading), self.output)
