"""TC-MoE: ternary choice, an expert counts as +1, -1 or not at all (Yan et al., ICLR 2025)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.layers.feed_forward.moe_args import MoeArgs
from moejax.layers.feed_forward.moe_layer import MoeLayer, RouteCounts
from moejax.layers.feed_forward.registry import register_moe
from moejax.routing import Routing, null_reward
from moejax.routing.losses import mean_over
from moejax.routing.scores import ternary


@dataclass(frozen=True)
class TernaryArgs(MoeArgs):
    """``reward_coef``: of the probability that goes to null routes."""

    reward_coef: float = 1e-5


@register_moe("smoe_tcmoe")
class TernaryMoE(MoeLayer):
    """Routes ``+e``, ``-e`` for every expert, and ``K`` null routes, which cost nothing.

    A selected route's weight is its probability over that of all selected routes that compute and of all null routes.
    Where a token selects both signs of an expert, the two weights are added. In LibMoE the later of the two
    replaces the earlier (as a null route does to the expert whose id it has modulo ``E``), and the balance loss
    multiplies each sequence's probabilities with the counts of the whole batch, without the factor ``E``.
    """

    Args = TernaryArgs

    @property
    def counts(self) -> RouteCounts:
        experts, null = self.num_of_experts, self.num_selected
        return super().counts._replace(ids=experts + null, null=null, router_outputs=2 * experts + null)

    def route_ids(self) -> Int[Array, " R"]:
        routes = jnp.arange(self.counts.router_outputs)
        return jnp.where(routes < self.num_of_experts, routes, routes - self.num_of_experts)

    def zero_computation_experts(self, x: Float[Array, "B T D"]) -> list[None]:
        """Null routes."""
        return [None] * self.num_selected

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"], Float[Array, "B T R"]]:
        experts = self.num_of_experts
        weights, selected, p = self.select(gate_logits, lambda z: jax.nn.softmax(ternary(z, experts)), "raw")
        computing = jnp.where(selected < 2 * experts, weights, 0).sum(-1, keepdims=True)
        total = computing + p[..., 2 * experts :].sum(-1, keepdims=True)
        return weights / jnp.maximum(total, 1e-6), selected, p

    def routes_to_experts(
        self, selected_experts: Int[Array, "B T K"], weights: Float[Array, "B T K"]
    ) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
        """Experts with signed weights; of two slots with one expert the first carries both, the second nothing."""
        experts, slots = self.num_of_experts, jnp.arange(self.num_selected)
        ids = self.route_ids()[selected_experts]
        signed = jnp.where(selected_experts < experts, weights, -weights)
        signed = jnp.where(selected_experts < 2 * experts, signed, 0)
        if self.args.compat:
            # there null routes are experts too, whose outputs count zero times
            alias = selected_experts % experts
            last = ~((alias[..., :, None] == alias[..., None, :]) & (slots[None, :] > slots[:, None])).any(-1)
            return ids, jnp.where(last, signed, 0)
        same = ids[..., :, None] == ids[..., None, :]
        first = ~(same & (slots[None, :] < slots[:, None])).any(-1)
        return ids, jnp.where(first, (same * signed[..., None, :]).sum(-1), 0)

    def balanceloss(
        self, selected_experts: Int[Array, "B T K"], gate_softmax: Float[Array, "B T R"]
    ) -> Float[Array, ""]:
        """Balance of the experts, both signs together, over the slots and the probability that are not null."""
        experts = self.num_of_experts
        p = gate_softmax[..., : 2 * experts]
        p = p[..., :experts] + p[..., experts:]
        p = p / p.sum(-1, keepdims=True)
        computes = selected_experts < 2 * experts
        ids = jnp.where(computes, self.route_ids()[selected_experts], experts)
        if self.args.compat:
            return self._libmoe_balance(ids, p)
        return self.balance(Routing(p, p, ids, computes.astype(p.dtype)))

    def _libmoe_balance(self, ids: Int[Array, "B T K"], p: Float[Array, "B T E"]) -> Float[Array, ""]:
        valid = jnp.ones(ids.shape[:-1], bool) if self.mask is None else self.mask
        chosen = (ids[..., None] == jnp.arange(self.num_of_experts)).sum(-2).astype(p.dtype) * valid[..., None]
        by_sequence = jnp.maximum(chosen.sum((1, 2)), 1)
        share = jax.lax.stop_gradient(chosen.sum((0, 1)) / by_sequence[:, None])
        return mean_over((share * mean_over(p, valid, (1,))).sum(-1), valid.any(-1), (0,))

    def combine_loss(
        self,
        selected_experts: Int[Array, "B T K"],
        gate_softmax: Float[Array, "B T R"],
        gate_logits: Float[Array, "B T R"],
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """As in the base class, and the reward for null routes."""
        auxiliary_loss, balance, z = super().combine_loss(selected_experts, gate_softmax, gate_logits)
        reward = null_reward(gate_softmax[..., 2 * self.num_of_experts :], self.mask)
        self.record("null_probability", -reward)
        return auxiliary_loss + self.args.reward_coef * reward, balance, z
