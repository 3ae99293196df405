"""The router of a mixture, whatever its experts compute."""

from dataclasses import dataclass
from typing import Literal, Self

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.linear import Linear, wide_matmul
from moejax.ops.experts import Assignment, assign, expert_matmul
from moejax.ops.mxfp4 import MXFP4
from moejax.routing import SCORES, WEIGHTS, Routing, route
from moejax.rules import Reading
from moejax.rules.rule import Slope


@dataclass(frozen=True)
class RouterConfig:
    """Architecture of a router.

    Attributes:
        score: scores of all experts, a name in ``routing.SCORES``.
        weigh: weights of the selected, a name in ``routing.WEIGHTS``.
    """

    num_experts: int
    num_selected: int
    score: Literal["softmax", "logits"] = "softmax"
    weigh: Literal["raw", "renormalised", "softmax"] = "raw"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.num_selected > self.num_experts:
            raise ConfigError(f"num_experts_per_tok={self.num_selected} is more than num_experts={self.num_experts}.")


@nnx.dataclass
class Router(nnx.Module):
    """Linear router in float32 and the algebra of its mixture: route, multiply per expert, combine."""

    linear: Linear = nnx.data()
    config: RouterConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: RouterConfig, model_dim: int, dtype: DTypeLike) -> Self:
        """Random weights."""
        return cls(Linear.init(key, model_dim, config.num_experts, bias=config.bias, dtype=dtype), config)

    def __call__(self, x: Float[Array, "B T D"], reading: Reading, prefix: str = "") -> tuple[Routing, Assignment]:
        """Where every token goes, and the same for the grouped products; ``prefix`` names the gates."""
        c = self.config
        logits = reading.enter("router", reading.linear(wide_matmul, x, self.linear.weight, self.linear.bias))
        routing = route(
            logits,
            c.num_selected,
            score=SCORES[c.score],
            weigh=WEIGHTS[c.weigh],
            choices=reading.by_expert(f"{prefix}choices", x.shape[:-1]),
            shares=reading.by_expert(f"{prefix}shares", x.shape[:-1]),
        )
        return routing, assign(routing.ids.reshape(-1, c.num_selected), c.num_experts)

    def combine(
        self, outputs: Float[Array, "B T K D"], routing: Routing, reading: Reading, prefix: str = ""
    ) -> Float[Array, "B T D"]:
        """Gated weighted sum of the routed slots' outputs; ``prefix`` names the gates."""
        weights = routing.weights.astype(outputs.dtype)
        mixed = reading.leave("router", reading.rule.mix(weights, reading.enter("router", outputs)))
        return reading.rule.combine(reading.gate_experts(mixed, routing.ids, prefix))


def expert_linear(
    x: Float[Array, "B T KorOne D"],
    weight: Float[Array, "E *M D"] | MXFP4,
    bias: Float[Array, "E *M"] | None,
    assignment: Assignment,
    reading: Reading,
    slope: Slope | None = None,
) -> Float[Array, "B T K *M"]:
    """``weight[e] x + bias[e]`` for the expert ``e`` of every routed slot; ``slope`` as in :meth:`Rule.linear`."""
    batch, tokens = x.shape[:2]

    def product(x: Array, weight: Array | MXFP4) -> Array:
        rows = expert_matmul(x.reshape(batch * tokens, *x.shape[2:]), weight, assignment)
        return rows.reshape(batch, tokens, *rows.shape[1:])

    if bias is not None:
        chosen = bias[assignment.ids]
        bias = chosen.reshape(batch, tokens, *chosen.shape[1:]).astype(x.dtype)
    return reading.linear(product, x, weight, bias, slope)
