"""Expert choice: experts take tokens (Zhou et al., arXiv 2202.09368)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.layers.feed_forward.moe_args import MoeArgs
from moejax.layers.feed_forward.moe_layer import MoeLayer, RouteCounts
from moejax.layers.feed_forward.registry import register_moe
from moejax.routing.core import keep_sum
from moejax.routing.selection import expert_choice


@dataclass(frozen=True)
class ExpertChoiceArgs(MoeArgs):
    """Loads are even by construction, so that there is no balance loss."""

    balance_loss_coef: float = 0.0


@register_moe("expert_choice")
class ExpertChoiceMoE(MoeLayer):
    """Each expert takes the ``K / E`` of the tokens that score it highest, weighted by their softmax over experts.

    Whether a token is taken depends on the other tokens, later ones and other sequences among them. A decoder with
    this layer is not causal: its held-out loss is too good, and it generates one token at a time from experts that
    take every token.
    """

    Args = ExpertChoiceArgs

    @property
    def counts(self) -> RouteCounts:
        return super().counts._replace(slots=self.num_of_experts)

    @property
    def couples_sequences(self) -> bool:
        return True

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T R"], Int[Array, "B T R"], Float[Array, "B T R"]]:
        """A slot for every expert, best first; those that did not take the token have weight zero."""
        scores = jax.nn.softmax(gate_logits, axis=-1)
        seen, batch = scores.reshape(-1, self.num_of_experts), gate_logits.shape[:-1]
        mask, selectable = self.mask, self.by_route("selectable", batch)
        open_ = jnp.ones(seen.shape, bool) if selectable is None else selectable.reshape(seen.shape) > 0
        capacity = math.ceil(len(seen) * self.num_selected / self.num_of_experts)
        taken = expert_choice(jnp.where(open_, seen, -jnp.inf), capacity, None if mask is None else mask.reshape(-1))
        # an expert without enough tokens to choose from took some that are closed to it
        taken &= open_
        weights, selected = jax.lax.top_k(jnp.where(taken.reshape(scores.shape), scores, 0), self.num_of_experts)
        if (routing_weights := self.by_route("routing_weights", batch)) is not None:
            weights = keep_sum(weights, jnp.take_along_axis(routing_weights, selected, axis=-1))
        return weights, selected, scores
