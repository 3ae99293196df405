"""A layer of one's own in the shape of LibMoE's guide; ``moejax train --plugin`` runs this file."""

import jax
import jax.numpy as jnp

from moejax import MoeLayer, register_moe


@register_moe("my_moe_model")
class MyMoELayer(MoeLayer):
    """Every method that the guide names is called or overridden; the z-loss counts double."""

    def __init__(
        self, in_embed_dim=768, out_embed_dim=768, num_of_experts=4, num_selected=2, expert=None, args=None
    ) -> None:
        super().__init__(in_embed_dim, out_embed_dim, num_of_experts, num_selected, expert, args)
        self.sharpness = jnp.ones(())

    def zloss(self, gate_logits, gate_softmax=None):
        return 2 * super().zloss(gate_logits, gate_softmax)

    def balanceloss(self, selected_experts, gate_softmax):
        return super().balanceloss(selected_experts, gate_softmax)

    def topk_expert(self, gate_logits):
        return super().topk_expert(self.sharpness.astype(gate_logits.dtype) * gate_logits)

    def forward(self, x, return_id_experts=False):
        gate_logits = self.gate(x)
        weights, selected_experts, gate_softmax = self.topk_expert(gate_logits)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True).astype(x.dtype)

        output = jnp.zeros((x.shape[0], x.shape[1], self.out_embed_dim), x.dtype)
        output = self.compute_moe(selected_experts, weights, output, x)

        auxiliary_loss, balance_loss, router_z_loss = self.combine_loss(selected_experts, gate_softmax, gate_logits)
        infor_aux = {
            "balance_loss": jax.lax.stop_gradient(balance_loss),
            "router_z_loss": jax.lax.stop_gradient(router_z_loss),
            "expert_confidence": jax.lax.stop_gradient(weights.max(-1).mean()),
        }
        return output, auxiliary_loss, None, infor_aux
