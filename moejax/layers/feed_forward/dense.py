"""Dense feed-forward layer, for layers without experts and for shared experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.feed_forward.activation import GLU, HiddenActivation
from moejax.layers.linear import matmul, normal
from moejax.layers.parts import ActivationSizes, Aux, Axes, Call, PartConfig, Sizes
from moejax.rules import Reading

UP_AXES: Axes = (None, "hidden", "model")
DOWN_AXES: Axes = ("model", "hidden")


@dataclass(frozen=True)
class MLPConfig(PartConfig):
    """Architecture of one dense feed-forward layer.

    Attributes:
        model_dim: width of the residual stream ``D``.
        hidden_dim: hidden units ``F``.
        unit: from the first product to the hidden units.
        bias: both products have biases.
    """

    model_dim: int
    hidden_dim: int
    unit: HiddenActivation = GLU()
    bias: bool = False

    @property
    def sizes(self) -> Sizes:
        return Sizes(dense_dim=self.hidden_dim)

    @property
    def axes(self) -> Mapping[str, Axes]:
        return {"gate_up": UP_AXES, "down": DOWN_AXES, "gate_up_bias": (None, "hidden"), "down_bias": (None,)}

    def init(self, key: PRNGKeyArray, dtype: DTypeLike) -> "MLP":
        return MLP.init(key, self, dtype)

    def activations(self, batch: int, tokens: int, itemsize: int) -> ActivationSizes:
        rows = batch * tokens
        return ActivationSizes(
            kept=4 * rows * self.hidden_dim,
            largest=8 * rows * self.model_dim,
            unrouted=rows * (self.model_dim + 2 * self.hidden_dim),
        )


@nnx.dataclass
class MLP(nnx.Module):
    """``down(unit(gate_up x))``; ``gate_up`` has a matrix for each branch ``M`` of the unit, the gate's first."""

    gate_up: Float[Array, "M F D"] = nnx.data()
    down: Float[Array, "O F"] = nnx.data()
    gate_up_bias: Float[Array, "M F"] | None = nnx.data()
    down_bias: Float[Array, " O"] | None = nnx.data()
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

    @property
    def hidden_dim(self) -> int:
        """Hidden units ``F``."""
        return self.down.shape[-1]

    def __call__(self, x: Float[Array, "B T D"], reading: Reading) -> Float[Array, "B T O"]:
        unit = self.config.unit
        hidden = reading.linear(matmul, x, self.gate_up, self.gate_up_bias, unit.slope)
        return reading.linear(matmul, unit(hidden, reading), self.down, self.down_bias)

    def run(self, x: Float[Array, "B T D"], call: Call, cache: None = None) -> tuple[Float[Array, "B T O"], None, Aux]:
        """The layer as a part of a block: its output, no cache, and nothing to tell."""
        return self(x, call.reading), None, Aux()
