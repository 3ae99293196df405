"""The router of a mixture, whatever its experts compute."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.linear import Linear, matmul_f32_accum
from moejax.ops.experts import Assignment, assign
from moejax.ops.top_k import top_k
from moejax.routing import SCORES, WEIGHTS, Routing, route
from moejax.rules import Reading


@dataclass(frozen=True)
class RouterConfig:
    """Architecture of a router.

    Attributes:
        score: scores of all experts, a name in ``routing.SCORES``.
        weigh: weights of the selected, a name in ``routing.WEIGHTS``.
        mesh: devices over which the weights lie, if there are several; over its axis ``expert`` experts are split.
    """

    num_experts: int
    num_selected: int
    score: Literal["softmax", "logits"] = "softmax"
    weigh: Literal["raw", "renormalised", "softmax"] = "raw"
    bias: bool = False
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.num_selected > self.num_experts:
            raise ConfigError(f"num_experts_per_tok={self.num_selected} is more than num_experts={self.num_experts}.")


@nnx.dataclass
class Router(nnx.Module):
    """Linear router in float32."""

    linear: Linear = nnx.data()
    config: RouterConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: RouterConfig, model_dim: int, dtype: DTypeLike) -> Self:
        """Random weights."""
        return cls(Linear.init(key, model_dim, config.num_experts, bias=config.bias, dtype=dtype), config)

    def __call__(self, x: Float[Array, "B T D"], reading: Reading, prefix: str = "") -> tuple[Routing, Assignment]:
        """Where every token goes, and the same for the grouped products; ``prefix`` names the gates."""
        c = self.config
        logits = reading.ledger_in("router", reading.linear(matmul_f32_accum, x, self.linear.weight, self.linear.bias))
        routing = route(
            logits,
            c.num_selected,
            score=SCORES[c.score],
            weigh=WEIGHTS[c.weigh],
            selectable=reading.by_expert(f"{prefix}selectable", x.shape[:-1]),
            weight_factors=reading.by_expert(f"{prefix}routing_weights", x.shape[:-1]),
            top_k=partial(top_k, mesh=c.mesh),
        )
        return routing, assign(routing.ids.reshape(-1, c.num_selected), c.num_experts, mesh=c.mesh)
