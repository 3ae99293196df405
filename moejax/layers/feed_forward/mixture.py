"""Mixture-of-Experts feed-forward layer: route, grouped expert products, gated weighted sum, shared expert."""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.feed_forward.activation import GLU, Unit
from moejax.layers.feed_forward.dense import MLP, MLPConfig
from moejax.layers.feed_forward.experts import Experts
from moejax.layers.feed_forward.router import Router, RouterConfig
from moejax.layers.linear import Linear, matmul_f32_accum, normal
from moejax.ops.mxfp4 import BLOCK, MXFP4
from moejax.routing import Routing
from moejax.rules import Reading


@dataclass(frozen=True)
class MoEConfig:
    """Architecture of one MoE layer.

    Attributes:
        expert_bias: both products of an expert have biases.
        output_bias: one bias is added after the sum over experts.
        shared_dim: width of a shared expert with a sigmoid gate, that every token takes; none by default.
        packed: the experts' matrices are held as MXFP4, for inference and explanation only.

    Raises:
        ConfigError: packed, and a width is no multiple of the 32 values of a block.
    """

    model_dim: int
    expert_dim: int
    router: RouterConfig
    unit: Unit = GLU()
    expert_bias: bool = False
    output_bias: bool = False
    shared_dim: int | None = None
    packed: bool = False

    @property
    def num_ids(self) -> int:
        """Experts that a token may be routed to."""
        return self.router.num_experts

    @property
    def num_routed(self) -> int:
        """Experts with weights that a token may be routed to."""
        return self.router.num_experts

    @property
    def num_slots(self) -> int:
        """Routed slots of a token."""
        return self.router.num_selected

    @property
    def num_shared(self) -> int:
        """Shared experts under the gate ``shared``."""
        return int(self.shared_dim is not None)

    def __post_init__(self) -> None:
        if self.packed and (self.model_dim % BLOCK or self.expert_dim % BLOCK):
            raise ConfigError(
                f"experts of {self.model_dim} x {self.expert_dim} cannot be MXFP4, whose blocks have {BLOCK} values."
            )


@nnx.dataclass
class SharedExpert(nnx.Module):
    """An expert that every token takes, weighted by the sigmoid of a linear gate."""

    mlp: MLP = nnx.data()
    gate: Linear = nnx.data()

    def __call__(self, x: Float[Array, "B T D"], reading: Reading) -> Float[Array, "B T D"]:
        logit = reading.ledger_in("router", reading.linear(matmul_f32_accum, x, self.gate.weight))
        output = reading.ledger_in("router", self.mlp(x, reading)[:, :, None])
        mixed = reading.ledger_out("router", reading.rule.mix(jax.nn.sigmoid(logit).astype(x.dtype), output))
        return reading.gate("shared", mixed)[:, :, 0]


@nnx.dataclass
class MoE(nnx.Module):
    """Top-k mixture of experts; ``gate_up`` holds a matrix for each branch of the unit, the gate's first."""

    router: Router = nnx.data()
    gate_up: Float[Array, "E M F D"] | MXFP4 = nnx.data()
    down: Float[Array, "E D F"] | MXFP4 = nnx.data()
    gate_up_bias: Float[Array, "E M F"] | None = nnx.data()
    down_bias: Float[Array, "E D"] | None = nnx.data()
    bias: Float[Array, " D"] | None = nnx.data()
    shared: SharedExpert | None = nnx.data()
    config: MoEConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: MoEConfig, dtype: DTypeLike) -> Self:
        """Random weights, zero biases."""
        c, (k1, k2, k3, k4, k5) = config, jax.random.split(key, 5)
        experts, hidden, dim = c.router.num_experts, c.expert_dim, c.model_dim
        matrices = MXFP4.random if c.packed else lambda key, shape: normal(key, shape, dtype)
        shared = None
        if c.shared_dim is not None:
            mlp = MLP.init(k4, MLPConfig(dim, c.shared_dim, c.unit), dtype)
            shared = SharedExpert(mlp, Linear.init(k5, dim, 1, bias=False, dtype=dtype))
        return cls(
            Router.init(k1, c.router, dim, dtype),
            matrices(k2, (experts, c.unit.branches, hidden, dim)),
            matrices(k3, (experts, dim, hidden)),
            jnp.zeros((experts, c.unit.branches, hidden), dtype) if c.expert_bias else None,
            jnp.zeros((experts, dim), dtype) if c.expert_bias else None,
            jnp.zeros(dim, dtype) if c.output_bias else None,
            shared,
            c,
        )

    @property
    def experts(self) -> Experts:
        """The routed experts."""
        return Experts(self.gate_up, self.down, self.gate_up_bias, self.down_bias, self.config.unit)

    def __call__(self, x: Float[Array, "B T D"], reading: Reading) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns the output and the routing of every token."""
        routing, assignment = self.router(x, reading)
        y = self.experts.mixed(x[:, :, None], assignment, routing.weights, routing.ids, reading)
        y = reading.add_bias(y, self.bias)
        return (y if self.shared is None else reading.rule.add(y, self.shared(x, reading))), routing
