"""Self-attention of every supported family, differing by configuration."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.ops.attention import attention
from moejax.ops.rope import rotate
from moejax.rules import Reading


@dataclass(frozen=True)
class AttentionConfig:
    """Architecture of one attention layer.

    Attributes:
        qk_norm: RMSNorm of queries and keys over the whole projected width (``"full"``) or none.
        clip: symmetric limit on queries, keys and values, after their norms and before rotation.
        bias: the four projections have biases.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qk_norm: Literal["full"] | None = None
    clip: float | None = None
    bias: bool = False


class KeyValue(NamedTuple):
    """Keys and values of one layer, rotated, one row for each cache slot."""

    k: Float[Array, "B S G C"]
    v: Float[Array, "B S G C"]


class Context(NamedTuple):
    """What all layers of one forward pass share.

    Attributes:
        cosine, sine: rotation of each token.
        mask: which cache slots (or tokens, without a cache) each token may see.
        start: first cache slot to write; unused without a cache.
    """

    cosine: Float[Array, "B T C"]
    sine: Float[Array, "B T C"]
    mask: Bool[Array, "B T S"]
    start: Int[Array, ""] | int = 0


@nnx.dataclass
class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, optional q/k norms and clipping."""

    query: Linear = nnx.data()
    key: Linear = nnx.data()
    value: Linear = nnx.data()
    output: Linear = nnx.data()
    query_norm: RMSNorm | None = nnx.data()
    key_norm: RMSNorm | None = nnx.data()
    config: AttentionConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: AttentionConfig, dtype: DTypeLike) -> Self:
        """Random projections, unit norms."""
        c, keys = config, jax.random.split(key, 4)
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        shapes = [(c.model_dim, q_width), (c.model_dim, kv_width), (c.model_dim, kv_width), (q_width, c.model_dim)]
        q, k, v, o = (Linear.init(k, *shape, bias=c.bias, dtype=dtype) for k, shape in zip(keys, shapes, strict=True))
        q_norm, k_norm = (RMSNorm.init(w, c.norm_eps, dtype) if c.qk_norm else None for w in (q_width, kv_width))
        return cls(q, k, v, o, q_norm, k_norm, config)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KeyValue | None, reading: Reading
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Returns the output and the keys and values: those of ``x``, or the whole cache with them written into it."""
        q, k, v = self._project(x, reading)
        q, k = rotate(q, context.cosine, context.sine), rotate(k, context.cosine, context.sine)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), context.start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), context.start, axis=1)

        def attend(q: Array, k: Array, v: Array) -> Array:
            q, k, v = reading.rule.attention_inputs(q, k, v)
            return attention(q, k, v, context.mask, scale=self.config.head_dim**-0.5)

        heads = reading.gate("heads", reading.book("softmax", attend, q, k, v))
        return self.output(heads.reshape(*x.shape[:2], -1), reading), KeyValue(k, v)

    def _project(self, x: Array, reading: Reading) -> tuple[Array, Array, Array]:
        c = self.config
        q, k, v = self.query(x, reading), self.key(x, reading), self.value(x, reading)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q, reading), self.key_norm(k, reading)
        if c.clip is not None:
            limit = c.clip
            q, k, v = (reading.book("clamp", lambda t: reading.rule.clamp(t, -limit, limit), t) for t in (q, k, v))
        q, k, v = (t.reshape(*t.shape[:2], -1, c.head_dim) for t in (q, k, v))
        return q, k, v
