"""A layer as LibMoE's guide shapes it, with experts of one's own: modules of Flax."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import MoeLayer, register_moe


class FeedForward(nnx.Module):
    """An expert: any module that maps ``[N D]`` to ``[N O]``, each token by itself."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(inputs, 4 * outputs, rngs=rngs)
        self.norm = nnx.RMSNorm(4 * outputs, rngs=rngs)
        self.down = nnx.Linear(4 * outputs, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.norm(self.up(x))))


@register_moe("from_libmoe")
class MyMoELayer(MoeLayer):
    """Softmax routing over such experts; it tells how sure the router is."""

    def __init__(
        self, in_embed_dim=768, out_embed_dim=768, num_of_experts=4, num_selected=2, expert=None, args=None
    ) -> None:
        # in a decoder nobody gives an expert, so the layer makes its own
        expert = expert or partial(FeedForward, in_embed_dim, out_embed_dim)
        super().__init__(in_embed_dim, out_embed_dim, num_of_experts, num_selected, expert, args)

    def forward(self, x, return_id_experts=False):
        gate_logits = self.gate(x)
        weights, selected_experts, gate_softmax = self.topk_expert(gate_logits)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True).astype(x.dtype)

        output = jnp.zeros((*x.shape[:2], self.out_embed_dim), x.dtype)
        output = self.compute_moe(selected_experts, weights, output, x)
        auxiliary_loss, balance_loss, router_z_loss = self.combine_loss(selected_experts, gate_softmax, gate_logits)

        self.log_metrics["confidence"] = weights.max(-1).mean()
        return output, auxiliary_loss, None, {"balance_loss": balance_loss, "router_z_loss": router_z_loss}


if __name__ == "__main__":
    x = jax.random.normal(jax.random.key(0), (3, 7, 24))
    layer = MyMoELayer(in_embed_dim=24, out_embed_dim=20, num_of_experts=6, num_selected=2)
    output, auxiliary_loss, _, infor_aux = layer(x, return_id_experts=True)
    print(output.shape, sorted(infor_aux))

    # sparse upcycling: six copies of one module compute what it did
    dense = FeedForward(24, 20, rngs=nnx.Rngs(1))
    upcycled = MyMoELayer(24, 20, 6, 2, expert=dense)
    print("difference from the dense module:", float(jnp.abs(upcycled(x)[0] - dense(x)).max()))
    assert jnp.allclose(upcycled(x)[0], dense(x), atol=1e-5)
