"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): a cache of one latent vector a token.

``c`` is the latent of a token, ``r`` its rotated part that all heads share, and each head ``h`` has

    k_h = [W_k,h c ; r],   v_h = W_v,h c,   q_h = [q_n ; q_r]   with the last part rotated.

A step of decoding uses that ``q_n . W_k,h c = (W_k,h^T q_n) . c``: it attends to the latents themselves, as one head of
keys and values, and applies ``W_v,h`` to what each head gathered. The result is the same without a key or value being
made for any earlier token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.attention.grouped_query import attention_activations, softmax_attention
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.parts import ActivationSizes, Aux, Axes, Call, PartConfig, Sizes
from moejax.layers.rotary import Rotary, turn
from moejax.ops.rope import Rope
from moejax.rules import Reading

LATENT_EPS = 1e-6
"""Epsilon of the norms of latents, which no published config changes."""


@dataclass(frozen=True)
class LatentAttentionConfig(PartConfig):
    """Architecture of one latent attention layer.

    Attributes:
        model_dim: width of the residual stream ``D``.
        num_heads: ``H``.
        plain_dim, rotary_dim, value_dim: widths of a head's part that does not rotate (``N``), of the part that does
            (``R``), and of its values (``V``).
        latent_dim: width of the latent of keys and values (``Z``).
        query_dim: width of a latent of queries (``Q``); ``None`` for queries that are made from the stream directly.
        rope: frequencies of the rotary positions.
        rotates_neighbours: pairs of neighbouring dimensions rotate, in place of one of each half.
        scale: factor on the scores before their softmax; ``(N + R) ** -0.5`` by default.
        bias: the maps to the latents and the output projection have biases.
    """

    model_dim: int
    num_heads: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    latent_dim: int
    query_dim: int | None
    rope: Rope
    rotates_neighbours: bool = True
    scale: float | None = None
    bias: bool = False

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.value_dim,
            couples_sequences=self.rope.by_length,
        )

    @property
    def rotary(self) -> Rotary:
        return Rotary(self.rope, self.rotary_dim, self.rotates_neighbours)

    @property
    def axes(self) -> Mapping[str, Axes]:
        return {
            "query_latent.weight": (None, "model"),
            "query_up.weight": ("heads", None, None),
            "query.weight": ("heads", None, "model"),
            "latent.weight": (None, "model"),
            "key_value.weight": ("heads", None, None),
            "output.weight": ("model", "heads"),
        }

    def init(self, key: PRNGKeyArray, dtype: DTypeLike) -> "LatentAttention":
        c, (k1, k2, k3, k4, k5) = self, jax.random.split(key, 5)
        linear = partial(Linear.init, dtype=dtype)
        rows = c.num_heads, c.plain_dim + c.rotary_dim
        if c.query_dim is None:
            queries = None, None, None, linear(k1, c.model_dim, rows, bias=False)
        else:
            down = linear(k5, c.model_dim, c.query_dim, bias=c.bias)
            queries = (
                down,
                RMSNorm.init(c.query_dim, LATENT_EPS, dtype),
                linear(k1, c.query_dim, rows, bias=False),
                None,
            )
        return LatentAttention(
            *queries,
            linear(k2, c.model_dim, c.latent_dim + c.rotary_dim, bias=c.bias),
            RMSNorm.init(c.latent_dim, LATENT_EPS, dtype),
            linear(k3, c.latent_dim, (c.num_heads, c.plain_dim + c.value_dim), bias=False),
            linear(k4, c.num_heads * c.value_dim, c.model_dim, bias=c.bias),
            c,
        )

    def init_cache(self, batch: int, positions: int, dtype: DTypeLike) -> "Latents":
        widths = self.latent_dim, self.rotary_dim
        return Latents(*(jnp.zeros((batch, positions, width), dtype) for width in widths))

    def activations(self, batch: int, tokens: int, itemsize: int) -> ActivationSizes:
        of_heads = attention_activations(self.sizes, batch, tokens)
        keys = 2 * batch * tokens * self.num_heads * (self.plain_dim + self.rotary_dim)
        return of_heads._replace(kept=of_heads.kept + keys + 2 * batch * tokens * (self.latent_dim + self.rotary_dim))


class Latents(NamedTuple):
    """The cache: the normed latent and the rotated key part of all heads, a row for each cache position."""

    latent: Float[Array, "B S Z"]
    rotated: Float[Array, "B S R"]


@nnx.dataclass
class LatentAttention(nnx.Module):
    """Attention whose keys and values are made from one latent vector of each token."""

    query_latent: Linear | None = nnx.data()
    query_norm: RMSNorm | None = nnx.data()
    query_up: Linear | None = nnx.data()
    query: Linear | None = nnx.data()
    latent: Linear = nnx.data()
    latent_norm: RMSNorm = nnx.data()
    key_value: Linear = nnx.data()
    output: Linear = nnx.data()
    config: LatentAttentionConfig = nnx.static()

    def run(
        self, x: Float[Array, "B T D"], call: Call, cache: Latents | None = None
    ) -> tuple[Float[Array, "B T D"], Latents, Aux]:
        """The output, the latents of all tokens so far, and nothing to tell."""
        c, reading = self.config, call.reading
        plain, turning = jnp.split(self._queries(x, reading), [c.plain_dim], axis=-1)
        turning = turn(turning, call.rotation)
        latent, rotated = jnp.split(self.latent(x, reading), [c.latent_dim], axis=-1)
        latents = Latents(self.latent_norm(latent, reading), turn(rotated[:, :, None], call.rotation)[:, :, 0])
        if cache is not None:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=call.start, axis=1)
            latents = jax.tree.map(lambda held, new: write(held, new.astype(held.dtype)), cache, latents)
        # for one new token, keys and values of all tokens would be made anew
        decodes = cache is not None and x.shape[1] == 1
        heads = (self._absorbed if decodes else self._heads)(plain, turning, latents, call, cache is None)
        heads = reading.gate("heads", heads)
        return self.output(heads.reshape(*x.shape[:2], -1), reading), latents, Aux()

    def _queries(self, x: Float[Array, "B T D"], reading: Reading) -> Float[Array, "B T H Y"]:
        """The queries, from the stream or from a latent of their own."""
        if self.query is not None:
            return self.query(x, reading)
        assert self.query_latent is not None
        assert self.query_norm is not None
        assert self.query_up is not None
        return self.query_up(self.query_norm(self.query_latent(x, reading), reading), reading)

    def _heads(
        self, plain: Float[Array, "B T H N"], turning: Float[Array, "B T H R"], latents: Latents, call: Call, own: bool
    ) -> Float[Array, "B T H V"]:
        """The heads from keys and values of every token; ``own``: of the call's own tokens, not of a cache."""
        made, v = jnp.split(self.key_value(latents.latent, call.reading), [self.config.plain_dim], axis=-1)
        shared = jnp.broadcast_to(latents.rotated[:, :, None], (*made.shape[:-1], self.config.rotary_dim))
        q, k = jnp.concatenate([plain, turning], -1), jnp.concatenate([made, shared], -1)
        return softmax_attention(q, k, v, call, causal=own, scale=self._scale)

    def _absorbed(
        self, plain: Float[Array, "B T H N"], turning: Float[Array, "B T H R"], latents: Latents, call: Call, own: bool
    ) -> Float[Array, "B T H V"]:
        """The same without any key or value: queries are mapped to the latents, and what they gather to values."""
        keys, values = jnp.split(self.key_value.weight, [self.config.plain_dim], axis=1)
        q = jnp.concatenate([jnp.einsum("bthn,hnz->bthz", plain, keys), turning], axis=-1)
        k = jnp.concatenate(latents, axis=-1)[:, :, None]
        gathered = softmax_attention(q, k, latents.latent[:, :, None], call, causal=own, scale=self._scale)
        return jnp.einsum("bthz,hvz->bthv", gathered, values)

    @property
    def _scale(self) -> float:
        c = self.config
        return (c.plain_dim + c.rotary_dim) ** -0.5 if c.scale is None else c.scale
