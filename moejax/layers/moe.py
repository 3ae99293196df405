"""Mixture-of-Experts feed-forward layer: route, grouped expert products, gated weighted sum."""

from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.linear import Linear, normal, wide_matmul
from moejax.ops.activation import SLOPES
from moejax.ops.experts import Assignment, assign, expert_matmul
from moejax.routing import SCORES, WEIGHTS, Routing, route
from moejax.rules import Reading


@dataclass(frozen=True)
class MoEConfig:
    """Architecture of one MoE layer.

    Attributes:
        score: scores of all experts, a name in ``routing.SCORES``.
        weigh: weights of the selected, a name in ``routing.WEIGHTS``.
        activation: of the gate, a name in ``ops.activation.SLOPES``.
    """

    model_dim: int
    expert_dim: int
    num_experts: int
    num_selected: int
    score: Literal["softmax", "logits"] = "softmax"
    weigh: Literal["raw", "renormalised", "softmax"] = "raw"
    activation: str = "silu"


@nnx.dataclass
class MoE(nnx.Module):
    """Top-k mixture of gated experts; the two halves of ``gate_up`` are the gate's and the linear branch's matrices."""

    router: Linear = nnx.data()
    gate_up: Float[Array, "E 2 F D"] = nnx.data()
    down: Float[Array, "E D F"] = nnx.data()
    config: MoEConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: MoEConfig, dtype: DTypeLike) -> Self:
        """Random weights."""
        c, (k1, k2, k3) = config, jax.random.split(key, 3)
        return cls(
            Linear.init(k1, c.model_dim, c.num_experts, bias=False, dtype=dtype),
            normal(k2, (c.num_experts, 2, c.expert_dim, c.model_dim), dtype),
            normal(k3, (c.num_experts, c.model_dim, c.expert_dim), dtype),
            c,
        )

    def __call__(self, x: Float[Array, "B T D"], reading: Reading) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns the output and the routing of every token."""
        c, rule = self.config, reading.rule
        logits = reading.add_bias(rule.linear(wide_matmul, x, self.router.weight), self.router.bias)
        logits = reading.enter("router", logits)
        routing = route(logits, c.num_selected, score=SCORES[c.score], weigh=WEIGHTS[c.weigh])
        outputs = reading.enter("router", self._experts(x, routing, reading))
        mixed = reading.leave("router", rule.mix(routing.weights.astype(x.dtype), outputs))
        return reading.gate_experts(mixed, routing.ids).sum(-2), routing

    def _experts(self, x: Array, routing: Routing, reading: Reading) -> Float[Array, "B T K D"]:
        """Every routed slot's expert output, before its weight."""
        c, rule = self.config, reading.rule
        batch_shape = routing.ids.shape
        assignment = assign(routing.ids.reshape(-1, c.num_selected), c.num_experts)
        halves = self.gate_up.reshape(c.num_experts, -1, c.model_dim)
        product = rule.linear(_per_expert(assignment), x.reshape(-1, 1, c.model_dim), halves)
        gate, up = jnp.split(product.reshape(*batch_shape, -1), 2, axis=-1)
        hidden = reading.book("activation", lambda g, u: rule.gated(SLOPES[c.activation], g, u), gate, up)
        hidden = hidden.reshape(-1, c.num_selected, c.expert_dim)
        return rule.linear(_per_expert(assignment), hidden, self.down).reshape(*batch_shape, c.model_dim)


def _per_expert(assignment: Assignment):
    return lambda x, weight: expert_matmul(x, weight, assignment)
