"""The router of a mixture, whatever its experts compute: logits, then scores, selection and weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.linear import matmul_f32_accum, normal
from moejax.ops.experts import Assignment, assign
from moejax.ops.top_k import top_k
from moejax.routing import SCORES, WEIGHTS, Routing, route
from moejax.routing.selection import GROUP_SCORES, biased, group_limited
from moejax.rules import Reading


@dataclass(frozen=True)
class RouterConfig:
    """Architecture of a router.

    Attributes:
        num_experts: ``E``.
        num_selected: slots of a token ``K``.
        score: scores of all experts from their logits, a name in :data:`moejax.routing.SCORES`.
        weigh: weights of the selected experts from their scores, a name in :data:`moejax.routing.WEIGHTS`.
        scale: factor on the weights (``routed_scaling_factor`` of DeepSeek).
        bias: the logits have a bias.
        selection_bias: the selection looks at the scores plus a bias, which balances loads and enters no weight
            (DeepSeek-V3, arXiv 2412.19437).
        num_groups, num_selected_groups: a token's experts come from its best groups only; experts of a group stand
            side by side.
        group_score: rank of a group from its experts' scores, a name in :data:`moejax.routing.GROUP_SCORES`.
        mesh: devices over which the weights lie, if there are several; over its axis ``expert`` experts are split.

    Raises:
        ConfigError: an unknown name, more slots than experts, or groups that do not divide the experts or do not hold
            enough of them.
    """

    num_experts: int
    num_selected: int
    score: str = "softmax"
    weigh: str = "raw"
    scale: float = 1.0
    bias: bool = False
    selection_bias: bool = False
    num_groups: int = 1
    num_selected_groups: int = 1
    group_score: str = "top2"
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.num_selected > self.num_experts:
            raise ConfigError(f"num_experts_per_tok={self.num_selected} is more than num_experts={self.num_experts}.")
        tables = {"score": SCORES, "weigh": WEIGHTS, "group_score": GROUP_SCORES}
        for name, table in tables.items():
            if (value := getattr(self, name)) not in table:
                raise ConfigError(f"{name}={value!r} is unknown; choose from {', '.join(table)}.")
        check_groups(self.num_experts, self.num_selected, self.num_groups, self.num_selected_groups)


def check_groups(experts: int, selected: int, groups: int, kept: int) -> None:
    """Raise ``ConfigError`` unless ``groups`` divide the experts and the ``kept`` ones hold as many as are selected."""
    if not 1 <= kept <= groups or experts % groups or kept * experts // groups < selected:
        raise ConfigError(
            f"num_groups={groups}, num_selected_groups={kept}: groups must divide the {experts} experts, and those "
            f"selected, no more than there are, must hold {selected}."
        )


@nnx.dataclass
class Router(nnx.Module):
    """Linear router in float32 or wider.

    Attributes:
        weight: a row for each router output.
        bias: added to the logits.
        selection_bias: added to the scores that the selection looks at, without a gradient; the weights do not see it.
    """

    weight: Float[Array, "R D"] = nnx.data()
    bias: Float[Array, " R"] | None = nnx.data()
    selection_bias: Float[Array, " R"] | None = nnx.data()
    config: RouterConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: RouterConfig, model_dim: int, dtype: DTypeLike, std: float = 0.02) -> Self:
        """Random weights, zero biases. The selection bias is float32, since its steps are small."""
        experts = config.num_experts
        return cls(
            normal(key, (experts, model_dim), dtype, std),
            jnp.zeros(experts, dtype) if config.bias else None,
            jnp.zeros(experts, jnp.float32) if config.selection_bias else None,
            config,
        )

    def __call__(self, x: Float[Array, "B T D"], reading: Reading, prefix: str = "") -> tuple[Routing, Assignment]:
        """Where every token goes, and the same for the grouped products.

        Args:
            prefix: names another set of gates and nodes, such as ``"attention_"``.
        """
        c = self.config
        batch = x.shape[:-1]
        routing = self.select(
            reading.node(f"{prefix}router_logits", self.logits(x, reading)),
            score=lambda z: reading.node(f"{prefix}router_scores", SCORES[c.score](z)),
            selectable=reading.by_expert(f"{prefix}selectable", batch),
            weight_factors=reading.by_expert(f"{prefix}routing_weights", batch),
        )
        weights = reading.node(f"{prefix}expert_weights", routing.weights, routing.ids)
        routing = routing._replace(weights=weights)
        return routing, assign(routing.ids.reshape(-1, c.num_selected), c.num_experts, mesh=c.mesh)

    def logits(self, x: Float[Array, "B T D"], reading: Reading) -> Float[Array, "B T R"]:
        """Router logits, where the ledger's operation ``router`` begins."""
        return reading.ledger_in("router", reading.linear(matmul_f32_accum, x, self.weight, self.bias))

    def select(
        self,
        logits: Float[Array, "B T R"],
        *,
        selectable: Float[Array, "B T R"] | None = None,
        weight_factors: Float[Array, "B T R"] | None = None,
        **other: Any,
    ) -> Routing:
        """:func:`moejax.routing.route` as the configuration asks for it.

        Args:
            selectable, weight_factors: gates on being selected and on the weights.
            other: arguments of ``route`` that replace the configuration's: ``score``, ``weigh``, ``adjust``.
        """
        c = self.config
        chosen: dict[str, Any] = {"score": SCORES[c.score], "weigh": self._weigh, "adjust": self._adjust} | other
        return route(
            logits,
            c.num_selected,
            selectable=selectable,
            weight_factors=weight_factors,
            top_k=partial(top_k, mesh=c.mesh),
            **chosen,
        )

    @property
    def _weigh(self) -> Callable[[Array], Array]:
        c = self.config
        weigh = WEIGHTS[c.weigh]
        return weigh if c.scale == 1 else lambda scores: c.scale * weigh(scores)

    @property
    def _adjust(self) -> Callable[[Array], Array] | None:
        """What the selection looks at, from the scores; ``None`` for the scores themselves."""
        c, bias = self.config, self.selection_bias
        if bias is None and c.num_groups == 1:
            return None

        def adjust(scores: Array) -> Array:
            scores = scores if bias is None else biased(scores, bias.astype(scores.dtype))
            if c.num_groups == 1:
                return scores
            return group_limited(scores, c.num_groups, c.num_selected_groups, c.group_score)

        return adjust

    def with_leaves(self, **leaves: Array) -> Self:
        """A copy of the router with other leaves."""
        copy = jax.tree.map(lambda leaf: leaf, self)
        for name, leaf in leaves.items():
            setattr(copy, name, nnx.data(leaf))
        return copy
