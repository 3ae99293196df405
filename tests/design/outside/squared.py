"""A layer that the package does not have: softmax top-k whose weights are squared and sum to one."""

from jaxtyping import Array, Float, Int

from moejax import MoeLayer, register_moe


@register_moe("squared")
class SquaredMoE(MoeLayer):
    """The base class with other weights."""

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"], Float[Array, "B T R"]]:
        weights, selected, scores = super().topk_expert(gate_logits)
        return weights**2 / (weights**2).sum(-1, keepdims=True), selected, scores
