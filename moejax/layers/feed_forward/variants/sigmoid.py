"""Sigmoid routing: renormalised as in DeepSeek-V3, or as sigma-MoE publishes it."""

from dataclasses import dataclass, replace
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from moejax.layers.feed_forward.moe_args import MoeArgs
from moejax.layers.feed_forward.moe_layer import MoeLayer
from moejax.layers.feed_forward.registry import register_moe
from moejax.layers.feed_forward.router import RouterConfig
from moejax.routing.losses import entropy_loss
from moejax.routing.selection import drop_experts
from moejax.routing.weights import renormalised


@register_moe("smoe_sigmoidgating")
class SigmoidMoE(MoeLayer):
    """Each expert's own sigmoid, the best ``K``, weights renormalised.

    The balance loss looks at the sigmoids over their sum; LibMoE's at the softmax of the logits.
    """

    def router_config(self) -> RouterConfig:
        return replace(super().router_config(), score="sigmoid")

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"], Float[Array, "B T R"]]:
        weights, selected, scores = self.select(gate_logits)
        return weights, selected, jax.nn.softmax(gate_logits, axis=-1) if self.args.compat else renormalised(scores)


@dataclass(frozen=True)
class SigmaArgs(MoeArgs):
    """``expert_dropout``: share of the experts that a training step leaves out."""

    balance_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    activation: str = "relu"
    expert_bias: bool = False
    expert_dropout: float = 0.0


@register_moe("sigma_moe")
class SigmaMoE(MoeLayer):
    """sigma-MoE (Csordas et al., arXiv 2310.10837, section 5): sigmoids as they are, ReLU experts without biases.

    Balanced by the entropy of the mean softmax of the logits, and by leaving experts out in training.
    """

    Args = SigmaArgs

    def router_config(self) -> RouterConfig:
        return replace(super().router_config(), score="sigmoid", weigh="raw")

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"], Float[Array, "B T R"]]:
        options: dict[str, Any] = {}
        rate, key = self.args.expert_dropout, self.key
        if rate and key is not None:
            options["adjust"] = lambda scores: drop_experts(scores, key, rate, self.num_selected)
        weights, selected, _ = self.select(gate_logits, **options)
        return weights, selected, jax.nn.softmax(gate_logits, axis=-1)

    def balanceloss(
        self, selected_experts: Int[Array, "B T K"], gate_softmax: Float[Array, "B T R"]
    ) -> Float[Array, ""]:
        """Minus the entropy of the mean distribution, in nats (equations 20 and 21)."""
        return entropy_loss(gate_softmax, self.mask)
