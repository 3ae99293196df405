"""Grouped-query self-attention (Ainslie et al., arXiv 2305.13245), with what its families add by configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.parts import ActivationSizes, Aux, Axes, Call, PartConfig, Sizes
from moejax.layers.rotary import Rotary, turn
from moejax.ops.attention import attention, block_size
from moejax.ops.rope import Rope
from moejax.rules import Reading
from moejax.rules.rule import AttentionProduct


@dataclass(frozen=True)
class AttentionConfig(PartConfig):
    """Architecture of one grouped-query attention layer.

    Attributes:
        model_dim: width of the residual stream ``D``.
        num_heads, num_kv_heads, head_dim: query heads ``H``, key/value heads ``G``, and their width ``C``.
        norm_eps: epsilon of the norms of queries and keys.
        rope: frequencies of the rotary positions; ``None`` for a layer without positions.
        rotary_dim: how many dimensions of a head rotate; all by default.
        rotates_neighbours: pairs of neighbouring dimensions rotate, in place of one of each half of a head.
        scale: factor on the scores before their softmax; ``C ** -0.5`` by default.
        qk_norm: RMSNorm of queries and keys over the whole projected width (``"full"``) or over each head (``"head"``).
        norm: class of these norms.
        norms_rotated: they stand after rotation (Hunyuan), in place of before.
        clip: symmetric limit on queries, keys and values, after their norms and before rotation.
        bias: queries, keys and values have biases.
        output_bias: the output projection has a bias.
        window: how many tokens back a token sees, itself included; all by default.
        sinks: one learned logit for each head takes part in its softmax (GPT-OSS).
        gated: the heads are multiplied by the sigmoid of a linear map of the layer's input (AFMoE).

    Raises:
        ConfigError: ``num_kv_heads`` does not divide ``num_heads``.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope | None = None
    rotary_dim: int | None = None
    rotates_neighbours: bool = False
    scale: float | None = None
    qk_norm: Literal["full", "head"] | None = None
    norm: type[RMSNorm] = RMSNorm
    norms_rotated: bool = False
    clip: float | None = None
    bias: bool = False
    output_bias: bool = False
    window: int | None = None
    sinks: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_heads} is not divisible by num_key_value_heads={self.num_kv_heads}."
            )

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=self.window or 0,
            couples_sequences=self.rope is not None and self.rope.by_length,
        )

    @property
    def rotary(self) -> Rotary | None:
        if self.rope is None:
            return None
        return Rotary(self.rope, self.rotary_dim or self.head_dim, self.rotates_neighbours)

    @property
    def axes(self) -> Mapping[str, Axes]:
        return {
            "query_key_value.weight": ("kv_heads", None, None, "model"),
            "query_key_value.bias": ("kv_heads", None, None),
            "output.weight": ("model", "heads"),
            "output.bias": (None,),
            "query_norm.weight": (None,),
            "key_norm.weight": (None,),
            "sinks": ("heads",),
            "gate.weight": ("heads", "model"),
        }

    def init(self, key: PRNGKeyArray, dtype: DTypeLike) -> "Attention":
        return Attention.init(key, self, dtype)

    def init_cache(self, batch: int, positions: int, dtype: DTypeLike) -> "KeyValue":
        return KeyValue.empty((batch, positions, self.num_kv_heads, self.head_dim), dtype)

    def activations(self, batch: int, tokens: int, itemsize: int) -> ActivationSizes:
        return attention_activations(self.sizes, batch, tokens)


class KeyValue(NamedTuple):
    """The cache of an attention layer: rotated keys, and values, a row for each cache position."""

    k: Float[Array, "B S G C"]
    v: Float[Array, "B S G C"]

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: DTypeLike) -> Self:
        """Zeros of shape ``[B S G C]``."""
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def attention_activations(sizes: Sizes, batch: int, tokens: int) -> ActivationSizes:
    """The estimate for attention of these sizes: queries, keys and values are kept.

    The largest temporaries are cotangents of the pattern and, in two layouts, of the scores of a block of queries.
    """
    scores = batch * sizes.num_heads * tokens
    kept = 6 * batch * tokens * sizes.num_heads * sizes.head_dim
    return ActivationSizes(kept, 3 * scores * min(tokens, block_size(tokens, scores)))


def attend(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G Cv"],
    call: Call,
    cache: KeyValue | None,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B T H Cv"], KeyValue]:
    """Rotate queries and keys, write the cache if there is one, and attend.

    Args:
        scale: factor on the scores; ``C ** -0.5`` by default.
        window, sinks: as in :class:`AttentionConfig`.

    Returns:
        The heads' outputs, and the keys and values attended to (the whole cache, if one is given).
    """
    q, k = turn(q, call.rotation), turn(k, call.rotation)
    if cache is not None:
        k = jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), call.start, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), call.start, axis=1)
    heads = softmax_attention(q, k, v, call, causal=cache is None, scale=scale, window=window, sinks=sinks)
    return heads, KeyValue(k, v)


def softmax_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G Cv"],
    call: Call,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H Cv"]:
    """The heads from rotated queries and keys, under the rule of the call's reading.

    Args:
        causal: keys and values are those of the call's own tokens, not of a cache.
        scale, window, sinks: as in :func:`attend`.
    """
    reading, mask = call.reading, call.mask
    if mask is not None and window is not None:
        assert call.distance is not None
        mask &= call.distance < window

    def product(q: Array, k: Array, v: Array, temperature: float = 1.0) -> Array:
        factor = (q.shape[-1] ** -0.5 if scale is None else scale) / temperature
        cooled = sinks if sinks is None or temperature == 1 else sinks / temperature
        # a product at another temperature only stands in for a derivative
        edges = reading.edges() if temperature == 1 else None
        return attention(q, k, v, mask, scale=factor, sinks=cooled, edges=edges, causal=causal, window=window)

    read_edges(reading, product, q, k)
    return reading.book("softmax", partial(reading.rule.attention, product), q, k, v)


def read_edges(
    reading: Reading, product: AttentionProduct, q: Float[Array, "B T H C"], k: Float[Array, "B S G C"]
) -> None:
    """Return attention's pattern with the pass, if the reading asks for it.

    The pattern is the heads' outputs for values that are the rows of the identity, whatever implementation is in use.
    """
    if "edges" in reading.names and reading.passed is not None:
        batch, keys, groups, _ = k.shape
        rows = jnp.eye(keys, dtype=jnp.promote_types(k.dtype, jnp.float32))
        with jax.default_matmul_precision("highest"):
            pattern = product(q, k, jnp.broadcast_to(rows[:, None], (batch, keys, groups, keys)))
        reading.passed.values["edges"] = pattern.swapaxes(1, 2)


@nnx.dataclass
class Attention(nnx.Module):
    """Grouped-query attention.

    Queries, keys and values are one product, since three small products leave half of a GPU idle. Its weight
    ``[G, R + 2, C, D]`` has, for each key/value head, the rows of the ``R`` query heads that read it, then the rows of
    its key and of its value. So a group stays together where heads are split over devices.
    """

    query_key_value: Linear = nnx.data()
    output: Linear = nnx.data()
    query_norm: RMSNorm | None = nnx.data()
    key_norm: RMSNorm | None = nnx.data()
    sinks: Float[Array, " H"] | None = nnx.data()
    gate: Linear | None = nnx.data()
    config: AttentionConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: AttentionConfig, dtype: DTypeLike) -> Self:
        """Random projections, unit norms, zero biases and sinks."""
        # the third key is for what most families lack; the first two are as they were without it
        c, (k1, k2), k3 = config, jax.random.split(key), jax.random.fold_in(key, 2)
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        rows = (c.num_kv_heads, c.num_heads // c.num_kv_heads + 2, c.head_dim)
        norm_widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (q_width, kv_width)
        q_norm, k_norm = (c.norm.init(w, c.norm_eps, dtype) if c.qk_norm else None for w in norm_widths)
        return cls(
            Linear.init(k1, c.model_dim, rows, bias=c.bias, dtype=dtype),
            Linear.init(k2, q_width, c.model_dim, bias=c.output_bias, dtype=dtype),
            q_norm,
            k_norm,
            jnp.zeros(c.num_heads, dtype) if c.sinks else None,
            Linear.init(k3, c.model_dim, q_width, bias=False, dtype=dtype) if c.gated else None,
            c,
        )

    def run(
        self, x: Float[Array, "B T D"], call: Call, cache: KeyValue | None = None
    ) -> tuple[Float[Array, "B T D"], KeyValue, Aux]:
        """The output, the keys and values (the whole cache, if one is given), and nothing to tell."""
        reading, c = call.reading, self.config
        q, k, v = self._project(x, call)
        if c.norms_rotated:
            q, k = (turn(t, call.rotation) for t in (q, k))
            q, k = self._norm(q, self.query_norm, reading), self._norm(k, self.key_norm, reading)
            call = call._replace(rotation=None)
        heads, stored = attend(q, k, v, call, cache, scale=c.scale, window=c.window, sinks=self.sinks)
        if self.gate is not None:
            heads = self._gated(heads, x, reading)
        heads = reading.gate("heads", heads)
        return self.output(heads.reshape(*x.shape[:2], -1), reading), stored, Aux()

    def _project(self, x: Array, call: Call) -> tuple[Array, Array, Array]:
        c, reading = self.config, call.reading
        every = self.query_key_value(x, reading)
        q, k, v = every[..., :-2, :], every[..., -2, :], every[..., -1, :]
        q, k, v = (t.reshape(*x.shape[:2], -1, c.head_dim) for t in (q, k, v))
        if not c.norms_rotated:
            q, k = self._norm(q, self.query_norm, reading), self._norm(k, self.key_norm, reading)
        if c.clip is not None:
            limit = c.clip
            q, k, v = (reading.book("clamp", lambda t: reading.rule.clamp(t, -limit, limit), t) for t in (q, k, v))
        return q, k, v

    def _norm(self, x: Float[Array, "B T H C"], norm: RMSNorm | None, reading: Reading) -> Float[Array, "B T H C"]:
        """The norm of queries or keys, over all heads of a token or over each."""
        if norm is None:
            return x
        over = x if self.config.qk_norm == "head" else x.reshape(*x.shape[:2], -1)
        return norm(over, reading).reshape(x.shape)

    def _gated(self, heads: Float[Array, "B T H C"], x: Array, reading: Reading) -> Float[Array, "B T H C"]:
        """The heads times the sigmoid of the gate, of which a rule says what relevance it takes."""
        assert self.gate is not None
        logits = reading.ledger_in("gate", self.gate(x, reading)).reshape(heads.shape)
        gates = jax.nn.sigmoid(logits)
        return reading.ledger_out("gate", reading.rule.gate_heads(gates, reading.ledger_in("gate", heads)))
