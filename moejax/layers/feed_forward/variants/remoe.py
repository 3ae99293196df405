"""ReMoE: ReLU routing, differentiable everywhere, with a controlled sparsity (Wang et al., arXiv 2412.14711)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.layers.feed_forward.moe_args import MoeArgs
from moejax.layers.feed_forward.moe_layer import MoeLayer, RouteCounts
from moejax.layers.feed_forward.registry import register_moe
from moejax.routing.core import keep_sum
from moejax.routing.losses import mean_over
from moejax.routing.scores import relu


@dataclass(frozen=True)
class ReLUArgs(MoeArgs):
    """``l1_initial`` and ``l1_growth``: the coefficient of the sparsity loss at first, and its factor at a step."""

    router_z_loss_coef: float = 0.0
    l1_initial: float = 1e-8
    l1_growth: float = 1.2

    UNUSED: ClassVar[tuple[str, ...]] = ("balance_loss_coef",)


@register_moe("remoe")
class ReLUMoE(MoeLayer):
    """Every expert with a positive logit computes, weighted by it: ``K`` of them on average, any number for a token.

    The balance loss is an L1 penalty that counts more on experts used more; its coefficient grows or shrinks at every
    step by the sign of the difference between the wanted sparsity ``1 - K / E`` and the batch's.
    """

    Args = ReLUArgs

    def add_weights(self, args: ReLUArgs) -> None:
        self.log_l1 = jnp.log(self.args.l1_initial)

    @property
    def counts(self) -> RouteCounts:
        return super().counts._replace(slots=self.num_of_experts)

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T R"], Int[Array, "B T R"], Float[Array, "B T R"]]:
        """A slot for every expert, best first; those with weight zero carry nothing."""
        scores = relu(gate_logits)
        weights, selected = jax.lax.top_k(scores, self.num_of_experts)
        batch = gate_logits.shape[:-1]
        if (selectable := self.by_route("selectable", batch)) is not None:
            weights = jnp.where(jnp.take_along_axis(selectable, selected, axis=-1) > 0, weights, 0)
        if (routing_weights := self.by_route("routing_weights", batch)) is not None:
            weights = keep_sum(weights, jnp.take_along_axis(routing_weights, selected, axis=-1))
        return weights, selected, scores

    def balanceloss(
        self, selected_experts: Int[Array, "B T R"], gate_softmax: Float[Array, "B T R"]
    ) -> Float[Array, ""]:
        """Mean over tokens of ``sum_e f_e ReLU(z_e)``, ``f_e`` the expert's load over its fair share (equation 11)."""
        active = (gate_softmax > 0).astype(gate_softmax.dtype)
        load = mean_over(active, self.mask, (0, 1))
        self.record("active_experts", load.sum())
        share = load * (self.num_of_experts / self.num_selected)
        return (jax.lax.stop_gradient(share) * mean_over(gate_softmax, self.mask, (0, 1))).sum()

    def combine_loss(
        self,
        selected_experts: Int[Array, "B T R"],
        gate_softmax: Float[Array, "B T R"],
        gate_logits: Float[Array, "B T R"],
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """As in the base class, with the current L1 coefficient in place of ``balance_loss_coef``."""
        _, balance, z = super().combine_loss(selected_experts, gate_softmax, gate_logits)
        coefficient = jax.lax.stop_gradient(jnp.exp(self.log_l1.astype(balance.dtype)))
        return coefficient * balance + self.args.router_z_loss_coef * z, balance, z

    def after_step(self, load: Float[Array, " S"], info: Mapping[str, Array]) -> Self:
        """The layer with the coefficient of the next step."""
        # sparser than wanted is fewer active experts than K
        direction = jnp.sign(info["active_experts"] - self.num_selected)
        return self.replace(log_l1=self.log_l1 + direction * jnp.log(self.args.l1_growth))
