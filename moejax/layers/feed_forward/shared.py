"""Shared experts: what every token takes beside its routed experts (DeepSeekMoE, arXiv 2401.06066; Qwen2-MoE)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.feed_forward.activation import GLU, HiddenActivation
from moejax.layers.feed_forward.dense import DOWN_AXES, MLP, UP_AXES, MLPConfig
from moejax.layers.feed_forward.module_experts import SumOfModules
from moejax.layers.linear import Linear, matmul_f32_accum
from moejax.layers.parts import Axes
from moejax.rules import Reading


@dataclass(frozen=True)
class SharedConfig:
    """Architecture of the shared experts of a mixture, held as one dense layer.

    Attributes:
        hidden_dim: hidden units of all shared experts together.
        unit: from the first product to the hidden units.
        bias: both products have biases.
        routed: the output is weighted by the sigmoid of a linear router of one output (Qwen2-MoE).
    """

    hidden_dim: int
    unit: HiddenActivation = GLU()
    bias: bool = False
    routed: bool = False


SHARED_AXES: Mapping[str, Axes] = {
    "shared.mlp.gate_up": UP_AXES,
    "shared.mlp.down": DOWN_AXES,
    "shared.mlp.gate_up_bias": (None, "hidden"),
    "shared.mlp.down_bias": (None,),
    "shared.router.weight": (None, "model"),
}
"""Logical axes of the leaves, by their paths in the mixture."""


@nnx.dataclass
class SharedExpert(nnx.Module):
    """An expert that every token takes; with a ``router``, weighted by the sigmoid of its one output."""

    mlp: MLP | SumOfModules = nnx.data()
    router: Linear | None = nnx.data(default=None)

    @classmethod
    def init(
        cls, keys: tuple[PRNGKeyArray, PRNGKeyArray], config: SharedConfig, model_dim: int, dtype: DTypeLike
    ) -> Self:
        """Random weights, zero biases; one key for the dense layer and one for its router."""
        mlp = MLP.init(keys[0], MLPConfig(model_dim, config.hidden_dim, config.unit, config.bias), dtype)
        return cls(mlp, Linear.init(keys[1], model_dim, 1, bias=False, dtype=dtype) if config.routed else None)

    def __call__(self, x: Float[Array, "B T D"], reading: Reading) -> Float[Array, "B T O"]:
        if self.router is None:
            return reading.gate("shared", self.mlp(x, reading)[:, :, None])[:, :, 0]
        logit = reading.ledger_in("router", reading.linear(matmul_f32_accum, x, self.router.weight))
        output = reading.ledger_in("router", self.mlp(x, reading)[:, :, None])
        mixed = reading.ledger_out("router", reading.rule.mix(jax.nn.sigmoid(logit).astype(x.dtype), output))
        return reading.gate("shared", mixed)[:, :, 0]
