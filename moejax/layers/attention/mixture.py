"""Mixture of attention experts (JetMoE, Shen et al., arXiv 2404.07413; Zhang et al., arXiv 2210.05144).

An expert is a pair of query and output projections; all experts share keys and values. The router's weight multiplies
the output projection only.
"""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.attention.grouped_query import Context, KeyValue, attend
from moejax.layers.feed_forward.experts import combine, expert_linear
from moejax.layers.feed_forward.router import Router, RouterConfig
from moejax.layers.linear import Linear, normal
from moejax.routing import Routing
from moejax.rules import Reading


@dataclass(frozen=True)
class MixtureAttentionConfig:
    """Architecture of one mixture of attention experts; each has as many heads as there are key/value heads."""

    model_dim: int
    num_kv_heads: int
    head_dim: int
    router: RouterConfig

    @property
    def num_heads(self) -> int:
        """Heads of a token: those of its routed slots, slot by slot."""
        return self.num_kv_heads * self.router.num_selected


@nnx.dataclass
class MixtureAttention(nnx.Module):
    """Head ``h`` belongs to slot ``h // G`` and reads key/value head ``h % G``."""

    router: Router = nnx.data()
    query: Float[Array, "E GC D"] = nnx.data()
    output: Float[Array, "E D GC"] = nnx.data()
    key_value: Linear = nnx.data()
    bias: Float[Array, " D"] = nnx.data()
    config: MixtureAttentionConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: MixtureAttentionConfig, dtype: DTypeLike) -> Self:
        """Random weights, zero bias."""
        c, (k1, k2, k3, k4) = config, jax.random.split(key, 4)
        width = c.num_kv_heads * c.head_dim
        return cls(
            Router.init(k1, c.router, c.model_dim, dtype),
            normal(k2, (c.router.num_experts, width, c.model_dim), dtype),
            normal(k3, (c.router.num_experts, c.model_dim, width), dtype),
            Linear.init(k4, c.model_dim, 2 * width, bias=False, dtype=dtype),
            jnp.zeros(c.model_dim, dtype),
            c,
        )

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KeyValue | None, reading: Reading
    ) -> tuple[Float[Array, "B T D"], KeyValue, Routing]:
        """Returns the output, the keys and values (the whole cache, if one is given), and the routing."""
        c = self.config
        batch, tokens = x.shape[:2]
        slots, groups = c.router.num_selected, c.num_kv_heads
        routing, assignment = self.router(x, reading, "attention_")
        q = expert_linear(x[:, :, None], self.query, assignment, reading)
        k, v = jnp.split(self.key_value(x, reading), 2, axis=-1)
        k, v = (t.reshape(batch, tokens, groups, c.head_dim) for t in (k, v))
        # the attention product counts the heads of one key/value head together, here they lie one slot apart
        q = q.reshape(batch, tokens, slots, groups, c.head_dim).swapaxes(2, 3)
        heads, stored = attend(q.reshape(batch, tokens, -1, c.head_dim), k, v, context, cache, reading)
        heads = heads.reshape(batch, tokens, groups, slots, c.head_dim).swapaxes(2, 3)
        heads = reading.gate("heads", heads.reshape(batch, tokens, -1, c.head_dim))
        outputs = expert_linear(heads.reshape(batch, tokens, slots, -1), self.output, assignment, reading)
        y = combine(outputs, routing.weights, routing.ids, reading, prefix="attention_")
        return reading.add_bias(y, self.bias), stored, routing
