"""Self-attention of every supported family, differing by configuration."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.ops.attention import attention
from moejax.ops.rope import rotate
from moejax.rules import Reading


@dataclass(frozen=True)
class AttentionConfig:
    """Architecture of one attention layer.

    Attributes:
        qk_norm: RMSNorm of queries and keys over the whole projected width (``"full"``) or each head (``"head"``).
        clip: symmetric limit on queries, keys and values, after their norms and before rotation.
        bias: queries, keys and values have biases.
        output_bias: the output projection has a bias.
        window: how many tokens back a token sees, itself included; all by default.
        sinks: one learned logit for each head takes part in its softmax.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qk_norm: Literal["full", "head"] | None = None
    clip: float | None = None
    bias: bool = False
    output_bias: bool = False
    window: int | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_heads} is not divisible by num_key_value_heads={self.num_kv_heads}."
            )


class KeyValue(NamedTuple):
    """Keys and values of one layer, rotated, one row for each cache slot."""

    k: Float[Array, "B S G C"]
    v: Float[Array, "B S G C"]


class Context(NamedTuple):
    """What the layers of one forward pass are given beside the stream.

    Attributes:
        cosine, sine: rotation of each token.
        mask: which cache slots (or tokens, without a cache) each token may see; ``None`` for all tokens up to its own.
        distance: how many slots back each slot lies.
        valid: tokens that are not padding.
        start: first cache slot to write; unused without a cache.
        key: randomness of a training step, the layer's own.
        previous: what the layer below handed to this layer's router.
    """

    cosine: Float[Array, "B T C"]
    sine: Float[Array, "B T C"]
    mask: Bool[Array, "B T S"] | None
    distance: Int[Array, "T S"]
    valid: Bool[Array, "B T"]
    start: Int[Array, ""] | int = 0
    key: PRNGKeyArray | None = None
    previous: Float[Array, "B T R"] | None = None


def attend(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G C"],
    context: Context,
    cache: KeyValue | None,
    reading: Reading,
    *,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B T H C"], KeyValue]:
    """Rotate, write the cache if there is one, attend. Returns the heads, and the keys and values attended to."""
    q, k = rotate(q, context.cosine, context.sine), rotate(k, context.cosine, context.sine)
    if cache is not None:
        k = jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), context.start, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), context.start, axis=1)
    mask = context.mask
    if mask is not None and window is not None:
        mask &= context.distance < window

    def product(q: Array, k: Array, v: Array, temperature: float = 1.0) -> Array:
        scale = q.shape[-1] ** -0.5 / temperature
        cooled = sinks if sinks is None or temperature == 1 else sinks / temperature
        # a product at another temperature only stands in for a derivative
        edges = reading.taps.get("edges") if temperature == 1 else None
        causal = cache is None
        return attention(q, k, v, mask, scale=scale, sinks=cooled, edges=edges, causal=causal, window=window)

    heads = reading.book("softmax", partial(reading.rule.attention, product), q, k, v)
    return heads, KeyValue(k, v)


@nnx.dataclass
class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and what else its configuration asks for.

    Queries, keys and values are one product, since three small ones leave half of a GPU idle. Its weight ``[G, R + 2,
    C, D]`` has for each key/value head those of the ``R`` query heads that read it, then of its key and its value: what
    belongs together stays so where heads are split over devices.
    """

    query_key_value: Linear = nnx.data()
    output: Linear = nnx.data()
    query_norm: RMSNorm | None = nnx.data()
    key_norm: RMSNorm | None = nnx.data()
    sinks: Float[Array, " H"] | None = nnx.data()
    config: AttentionConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: AttentionConfig, dtype: DTypeLike) -> Self:
        """Random projections, unit norms, zero biases and sinks."""
        c, (k1, k2) = config, jax.random.split(key)
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        rows = (c.num_kv_heads, c.num_heads // c.num_kv_heads + 2, c.head_dim)
        norm_widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (q_width, kv_width)
        q_norm, k_norm = (RMSNorm.init(w, c.norm_eps, dtype) if c.qk_norm else None for w in norm_widths)
        return cls(
            Linear.init(k1, c.model_dim, rows, bias=c.bias, dtype=dtype),
            Linear.init(k2, q_width, c.model_dim, bias=c.output_bias, dtype=dtype),
            q_norm,
            k_norm,
            jnp.zeros(c.num_heads, dtype) if c.sinks else None,
            c,
        )

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KeyValue | None, reading: Reading
    ) -> tuple[Float[Array, "B T D"], KeyValue, None]:
        """Returns the output, the keys and values (the whole cache, if one is given), and no routing."""
        q, k, v = self._project(x, reading)
        window, sinks = self.config.window, self.sinks
        heads, stored = attend(q, k, v, context, cache, reading, window=window, sinks=sinks)
        heads = reading.gate("heads", heads)
        return self.output(heads.reshape(*x.shape[:2], -1), reading), stored, None

    def _project(self, x: Array, reading: Reading) -> tuple[Array, Array, Array]:
        c, (batch, tokens, _) = self.config, x.shape
        every = self.query_key_value(x, reading)
        q, k, v = every[..., :-2, :], every[..., -2, :], every[..., -1, :]
        if c.qk_norm is not None:
            assert self.query_norm is not None
            assert self.key_norm is not None
            # over all heads of a token, or each
            shape = (batch, tokens, -1) if c.qk_norm == "full" else (batch, tokens, -1, c.head_dim)
            q = self.query_norm(q.reshape(shape), reading)
            k = self.key_norm(k.reshape(shape), reading)
        if c.clip is not None:
            limit = c.clip
            q, k, v = (reading.book("clamp", lambda t: reading.rule.clamp(t, -limit, limit), t) for t in (q, k, v))
        q, k, v = (t.reshape(batch, tokens, -1, c.head_dim) for t in (q, k, v))
        return q, k, v
