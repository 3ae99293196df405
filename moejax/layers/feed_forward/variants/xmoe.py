"""X-MoE: cosine routing in a low dimension (Chi et al., arXiv 2204.09179)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moejax.layers.feed_forward.moe_args import MoeArgs
from moejax.layers.feed_forward.moe_layer import MoeLayer
from moejax.layers.feed_forward.registry import register_moe
from moejax.layers.linear import matmul
from moejax.routing.scores import cosine

_LIBMOE_NORM = 1.5


@dataclass(frozen=True)
class XMoEArgs(MoeArgs):
    """``temperature``: initial value of the learned one; ``router_dim``: by default half the number of experts."""

    temperature: float = 0.3
    router_dim: int | None = None


@register_moe("xmoe")
class XMoE(MoeLayer):
    """Logits are cosines of the projected token and the experts' embeddings over a learned temperature.

    LibMoE's temperature is constant, its embeddings have norm 1.5, its z-loss does not see the temperature, and its
    weights are a softmax of the selected probabilities.
    """

    Args = XMoEArgs

    def add_weights(self, args: XMoEArgs) -> None:
        self.reduction = self._initial(args.draw("reduction"), (self._width, self.in_embed_dim), args.std_gate)
        self.log_temperature = jnp.array(math.log(args.temperature))

    @property
    def _width(self) -> int:
        return self.args.router_dim or max(1, self.num_of_experts // 2)

    def init_gate_weights(self, std: float = 0.02, *, key: PRNGKeyArray) -> Float[Array, "R W"]:
        """The experts' embeddings."""
        return self._initial(key, (self.counts.router_outputs, self._width), std)

    def gate(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        reduced = matmul(self.reading.ledger_in("router", x), self.reduction)
        if self.args.compat:
            return cosine(reduced, self.gate_weight, 1 / _LIBMOE_NORM)
        return cosine(reduced, self.gate_weight, jnp.exp(self.log_temperature))

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"], Float[Array, "B T R"]]:
        if not self.args.compat:
            return super().topk_expert(gate_logits)
        return self.select(gate_logits, lambda z: jax.nn.softmax(z / self.args.temperature), "softmax")
