"""Mixtures with a shared expert: DeepSeekMoE (arXiv 2401.06066) and DeepSeek-V3 (arXiv 2412.19437)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.errors import ConfigError
from moejax.layers.feed_forward.activation import GLU, Activation, HiddenActivation
from moejax.layers.feed_forward.call_view import Info
from moejax.layers.feed_forward.dense import MLP, MLPConfig
from moejax.layers.feed_forward.initial_experts import Expert, stack_experts
from moejax.layers.feed_forward.moe_args import MoeArgs
from moejax.layers.feed_forward.moe_layer import MoeLayer
from moejax.layers.feed_forward.registry import register_moe
from moejax.layers.feed_forward.router import RouterConfig
from moejax.layers.feed_forward.shared import SharedExpert
from moejax.routing.losses import Scope
from moejax.routing.selection import balanced_bias
from moejax.routing.weights import renormalised


@dataclass(frozen=True)
class SharedArgs(MoeArgs):
    """``num_shared``: shared experts, held as one of that many times the width of a routed expert."""

    num_shared: int = 1


@register_moe("smoe_share")
class SharedMoE(MoeLayer):
    """Shared experts beside the routed ones, whose softmax weights are not renormalised; both are added.

    ``expert`` gives the routed experts and one more, the last, which is the shared one.

    In LibMoE the last of the ``E`` experts is the shared one, ``K - 1`` of the others are selected, with weights that
    sum to one, and each side counts one half, so that a layer of copies computes what the copied layer did.

    Raises:
        ConfigError: LibMoE's layer with a single slot, which would route nothing.
    """

    Args = SharedArgs

    def __init__(
        self,
        in_embed_dim: int = 768,
        out_embed_dim: int = 768,
        num_of_experts: int = 4,
        num_selected: int = 2,
        expert: Expert | None = None,
        args: Any = None,
    ) -> None:
        args = self.Args.of(args)
        if args.compat:
            if num_selected < 2:
                raise ConfigError(f"num_selected={num_selected}: the shared expert takes one slot of at least two.")
            num_of_experts, num_selected = num_of_experts - 1, num_selected - 1
        widths = in_embed_dim, out_embed_dim
        given = None if expert is None else stack_experts(expert, num_of_experts + 1, *widths, args.draw("experts"))
        routed = given if given is None else given.only(slice(-1))
        super().__init__(*widths, num_of_experts, num_selected, routed, args)
        copies = 1 if args.compat else args.num_shared
        shared = self._drawn(args, copies) if given is None else given.only(slice(-1, None)).summed(copies)
        self.shared = SharedExpert(shared)

    def _drawn(self, args: SharedArgs, copies: int) -> MLP:
        unit: HiddenActivation = GLU(args.activation) if args.gated else Activation(args.activation)
        hidden = copies * (args.expert_dim or self.out_embed_dim)
        k1, k2 = jax.random.split(args.draw("shared"))
        return MLP(
            self._initial(k1, (unit.branches, hidden, self.in_embed_dim), args.std_expert),
            self._initial(k2, (self.out_embed_dim, hidden), args.std_expert),
            jnp.zeros((unit.branches, hidden)) if args.expert_bias else None,
            jnp.zeros(self.out_embed_dim) if args.expert_bias else None,
            MLPConfig(self.in_embed_dim, hidden, unit, args.expert_bias),
        )

    def router_config(self) -> RouterConfig:
        return replace(super().router_config(), weigh="renormalised" if self.args.compat else "raw")

    def forward(
        self, x: Float[Array, "B T D"], return_id_experts: bool = False
    ) -> tuple[Float[Array, "B T O"], Float[Array, ""], None, Info]:
        routed, auxiliary_loss, _, info = super().forward(x, return_id_experts)
        assert self.shared is not None
        shared = self.shared(x, self.reading)
        if self.args.compat:
            shared, routed = 0.5 * shared, 0.5 * routed
        return self.reading.rule.add(routed, shared), auxiliary_loss, None, info


@dataclass(frozen=True)
class DeepSeekV3Args(SharedArgs):
    """Settings of :class:`DeepSeekV3MoE`.

    Attributes:
        num_groups, num_selected_groups: a token's experts come from the best groups only.
        routed_scaling_factor: times the renormalised weights.
        bias_update_rate: of the balancing bias, at every optimiser step.
    """

    balance_loss_coef: float = 0.0001
    router_z_loss_coef: float = 0.0
    balance_scope: Scope = "sequence"
    num_groups: int = 1
    num_selected_groups: int = 1
    routed_scaling_factor: float = 2.5
    bias_update_rate: float = 0.001


@register_moe("smoe_sharev3")
class DeepSeekV3MoE(SharedMoE):
    """DeepSeek-V3: sigmoid scores, selection by scores plus a balancing bias within the best groups, a shared expert.

    The bias has no gradient and no share in the weights; :meth:`after_step` moves it. LibMoE's layer of this name has
    neither bias nor groups nor scale: it is ``smoe_share`` with sigmoids.

    Raises:
        ConfigError: groups that do not divide the experts, or do not hold enough of them.
    """

    Args = DeepSeekV3Args

    def router_config(self) -> RouterConfig:
        a, base = self.args, replace(super().router_config(), score="sigmoid", weigh="renormalised")
        if a.compat:
            return base
        groups = {"num_groups": a.num_groups, "num_selected_groups": a.num_selected_groups}
        return replace(base, **groups, scale=a.routed_scaling_factor, selection_bias=True)

    @property
    def router_bias(self) -> Array | None:
        """The balancing bias of the selection ``[E]``."""
        return self.router.selection_bias

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"], Float[Array, "B T R"]]:
        weights, selected, scores = self.select(gate_logits)
        return weights, selected, jax.nn.softmax(gate_logits, axis=-1) if self.args.compat else renormalised(scores)

    def balanceloss(
        self, selected_experts: Int[Array, "B T K"], gate_softmax: Float[Array, "B T R"]
    ) -> Float[Array, ""]:
        """Counts the best ``K`` scores, as they were selected without bias and groups (equation 18)."""
        if self.args.compat is None:
            selected_experts = jax.lax.top_k(gate_softmax, self.num_selected)[1]
        return super().balanceloss(selected_experts, gate_softmax)

    def after_step(self, load: Float[Array, " S"], info: Mapping[str, Array]) -> Self:
        """The layer with its bias moved towards even loads."""
        if self.router_bias is None:
            return self
        moved = balanced_bias(self.router_bias, load, self.args.bias_update_rate)
        return self.replace(router_bias=moved)
