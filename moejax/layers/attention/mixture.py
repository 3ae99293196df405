"""Mixture of attention experts (JetMoE, Shen et al., arXiv 2404.07413; Zhang et al., arXiv 2210.05144).

An expert is a pair of query and output projections; all experts share keys and values. The router's weight multiplies
the output projection only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.attention.grouped_query import KeyValue, attend, attention_activations
from moejax.layers.feed_forward.expert_stack import combine
from moejax.layers.feed_forward.experts import buffer_rows, expert_linear, random_matrices, unpacked_values
from moejax.layers.feed_forward.router import Router, RouterConfig
from moejax.layers.linear import Linear
from moejax.layers.parts import ActivationSizes, Aux, Axes, Call, PartConfig, Sizes
from moejax.layers.rotary import Rotary
from moejax.ops.packed import FORMATS, Packed, with_packed_axes
from moejax.ops.rope import Rope


@dataclass(frozen=True)
class MixtureAttentionConfig(PartConfig):
    """Architecture of one mixture of attention experts; each expert has as many heads as there are key/value heads.

    Attributes:
        model_dim: width of the residual stream ``D``.
        num_kv_heads, head_dim: key/value heads ``G`` and their width ``C``.
        router: which experts a token takes.
        rope: frequencies of the rotary positions; ``None`` for a layer without positions.
        packed: the format in which the experts' matrices are held; empty for plain arrays.

    Raises:
        ConfigError: there is no such format, or it cannot hold rows of the experts' widths.
    """

    model_dim: int
    num_kv_heads: int
    head_dim: int
    router: RouterConfig
    rope: Rope | None = None
    packed: str = ""

    def __post_init__(self) -> None:
        if self.packed:
            FORMATS.find(self.packed).check(self.model_dim, self.num_kv_heads * self.head_dim)

    @property
    def num_heads(self) -> int:
        """Query heads of a token: the heads of its routed slots, slot by slot."""
        return self.num_kv_heads * self.router.num_selected

    @property
    def sizes(self) -> Sizes:
        experts = self.router.num_experts
        return Sizes(
            num_experts=experts,
            num_weighted=experts,
            num_selected=self.router.num_selected,
            num_router_outputs=experts,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            couples_sequences=self.rope is not None and self.rope.by_length,
            packed=self.packed,
        )

    @property
    def rotary(self) -> Rotary | None:
        return None if self.rope is None else Rotary(self.rope, self.head_dim)

    @property
    def axes(self) -> Mapping[str, Axes]:
        return {
            "router.weight": (None, "model"),
            "router.bias": (None,),
            **with_packed_axes({"query": ("expert", "kv_heads", "model"), "output": ("expert", "model", "kv_heads")}),
            # rows of keys stand before rows of values, so no contiguous part holds whole heads
            "key_value.weight": (None, "model"),
            "bias": (None,),
        }

    def init(self, key: PRNGKeyArray, dtype: DTypeLike) -> "MixtureAttention":
        return MixtureAttention.init(key, self, dtype)

    def init_cache(self, batch: int, positions: int, dtype: DTypeLike) -> KeyValue:
        return KeyValue.empty((batch, positions, self.num_kv_heads, self.head_dim), dtype)

    def activations(self, batch: int, tokens: int, itemsize: int) -> ActivationSizes:
        of_attention = attention_activations(self.sizes, batch, tokens)
        rows, slots, width = batch * tokens, self.router.num_selected, self.num_kv_heads * self.head_dim
        buffers = buffer_rows(rows, slots, self.router.num_experts, itemsize, self.model_dim, width)
        largest = (buffers + rows * slots) * (self.model_dim + width)
        unpacked = unpacked_values(self.packed, self.router.num_experts, *2 * [(width, self.model_dim)])
        return of_attention._replace(largest=max(of_attention.largest, largest), unpacked=unpacked)

    def on_mesh(self, mesh: Mesh | None) -> Self:
        return replace(self, router=replace(self.router, mesh=mesh))

    def pack(self, packed: str) -> Self:
        return replace(self, packed=packed)


@nnx.dataclass
class MixtureAttention(nnx.Module):
    """Head ``h`` belongs to slot ``h // G`` and reads key/value head ``h % G``."""

    router: Router = nnx.data()
    query: Float[Array, "E GC D"] | Packed = nnx.data()
    output: Float[Array, "E D GC"] | Packed = nnx.data()
    key_value: Linear = nnx.data()
    bias: Float[Array, " D"] = nnx.data()
    config: MixtureAttentionConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: MixtureAttentionConfig, dtype: DTypeLike) -> Self:
        """Random weights, zero bias."""
        c, (k1, k2, k3, k4) = config, jax.random.split(key, 4)
        width, matrices = c.num_kv_heads * c.head_dim, random_matrices(c.packed, dtype)
        return cls(
            Router.init(k1, c.router, c.model_dim, dtype),
            matrices(k2, (c.router.num_experts, width, c.model_dim)),
            matrices(k3, (c.router.num_experts, c.model_dim, width)),
            Linear.init(k4, c.model_dim, 2 * width, bias=False, dtype=dtype),
            jnp.zeros(c.model_dim, dtype),
            c,
        )

    def run(
        self, x: Float[Array, "B T D"], call: Call, cache: KeyValue | None = None
    ) -> tuple[Float[Array, "B T D"], KeyValue, Aux]:
        """The output, the keys and values (the whole cache, if one is given), and the routing."""
        c, reading = self.config, call.reading
        batch, tokens = x.shape[:2]
        slots, groups = c.router.num_selected, c.num_kv_heads
        routing, assignment = self.router(x, reading, "attention_")
        q = expert_linear(x[:, :, None], self.query, assignment, reading)
        k, v = jnp.split(self.key_value(x, reading), 2, axis=-1)
        k, v = (t.reshape(batch, tokens, groups, c.head_dim) for t in (k, v))
        # the attention product counts the heads of one key/value head together, here they lie one slot apart
        q = q.reshape(batch, tokens, slots, groups, c.head_dim).swapaxes(2, 3)
        heads, stored = attend(q.reshape(batch, tokens, -1, c.head_dim), k, v, call, cache)
        heads = heads.reshape(batch, tokens, groups, slots, c.head_dim).swapaxes(2, 3)
        heads = reading.gate("heads", heads.reshape(batch, tokens, -1, c.head_dim))
        outputs = expert_linear(heads.reshape(batch, tokens, slots, -1), self.output, assignment, reading)
        y = combine(outputs, routing.weights, routing.ids, reading, prefix="attention_")
        return reading.add_bias(y, self.bias), stored, Aux(routing)
