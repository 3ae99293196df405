"""The only decoder: embedding, blocks, final norm, head."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.layers import Block, Context, KeyValue, RMSNorm, Routes
from moejax.layers.linear import matmul_f32_accum, normal
from moejax.models.config import Config
from moejax.ops.cotangents import accumulation_dtype
from moejax.rules import Reading


class Cache(NamedTuple):
    """Keys and values of every layer for ``S`` slots.

    Attributes:
        layers: one entry per layer.
        valid: slots that hold a token that may be seen (not padding).
        length: slots written so far, padding included; the next token goes there.
    """

    layers: list[KeyValue]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]


class Hidden(NamedTuple):
    """What a forward pass computes before the head.

    Attributes:
        stream: residual stream after the last layer, before the final norm.
        cache: the given cache with this pass's keys and values, or ``None``.
        entering: residual stream entering each layer.
        routing: of every layer.
    """

    stream: Float[Array, "B T D"]
    cache: Cache | None
    entering: list[Float[Array, "B T D"]]
    routing: list[Routes]


# Layers of equal shape share one trace; XLA inlines the calls.
_run_block = jax.jit(Block.__call__)


@nnx.dataclass
class Decoder(nnx.Module):
    """Mixture-of-Experts decoder as an immutable pytree; its layers are a list."""

    embedding: Float[Array, "V D"] = nnx.data()
    layers: list[Block] = nnx.data()
    norm: RMSNorm = nnx.data()
    head: Float[Array, "V D"] | None = nnx.data()
    config: Config = nnx.static()

    @classmethod
    def init(cls, config: Config, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Self:
        """Random weights: normal with standard deviation 0.02, unit norms."""
        c, (k_embed, k_head, *k_layers) = config, jax.random.split(key, 2 + config.num_layers)
        return cls(
            normal(k_embed, (c.vocab_size, c.model_dim), dtype),
            [Block.init(k, block, dtype) for k, block in zip(k_layers, c.blocks, strict=True)],
            RMSNorm.init(c.model_dim, c.norm_eps, dtype),
            None if c.tied else normal(k_head, (c.vocab_size, c.model_dim), dtype),
            c,
        )

    @classmethod
    def abstract(cls, config: Config, dtype: DTypeLike = jnp.float32) -> Self:
        """The decoder's tree with ``jax.ShapeDtypeStruct`` leaves; allocates nothing."""
        return jax.eval_shape(lambda: cls.init(config, jax.random.key(0), dtype))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        valid: Bool[Array, "B T"] | None = None,
        reading: Reading = Reading(),
    ) -> Float[Array, "B T V"]:
        """Next-token logits in float32 of every position; ``valid`` is false at padding."""
        return self.logits(self.hidden(tokens, valid=valid, reading=reading).stream, reading)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        valid: Bool[Array, "B T"] | None = None,
        cache: Cache | None = None,
        reading: Reading = Reading(),
        rematerialised_layers: int = 0,
        embedded: Float[Array, "B T D"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Hidden:
        """Run all layers. Positions count valid tokens only, so padding may stand on either side.

        ``embedded`` enters the first layer in place of the tokens' embeddings.
        Of the first ``rematerialised_layers`` a backward pass finds only the stream between them kept and computes the
        rest again: of the first, since by then it is done with what the others keep.
        ``key`` is a training step's randomness; without one nothing is random.
        """
        context, cache = self._context(tokens.shape, valid, cache)
        x = self.embedding[tokens] if embedded is None else embedded
        *readings, last = reading.by_layer(len(self.layers))
        stored, routing, entering, previous = [], [], [], None
        for i, layer in enumerate(self.layers):
            entering.append(x)
            run_block = jax.checkpoint(_run_block) if i < rematerialised_layers else _run_block
            own = context._replace(previous=previous, key=None if key is None else jax.random.fold_in(key, i))
            x, kv, route = run_block(layer, x, own, cache and cache.layers[i], readings[i])
            previous = route.ran and route.ran.carried
            stored.append(kv)
            routing.append(route)
        x = last.tap("stream", last.gate("tokens", x))
        return Hidden(x, cache and cache._replace(layers=stored), entering, routing)

    def logits(
        self,
        stream: Float[Array, "B *s D"],
        reading: Reading = Reading(),
    ) -> Float[Array, "B *s V"]:
        """Final norm and head, the product accumulated and left in float32."""
        return self.head_product(self.norm(stream, reading.for_layer(-1)), reading)

    def head_product(self, normed: Float[Array, "B *s D"], reading: Reading) -> Float[Array, "B *s V"]:
        """Multiply the normed stream by the head; the product is accumulated and left in float32."""
        return reading.linear(matmul_f32_accum, normed, self.output_embedding)

    @property
    def accumulation_dtype(self) -> jnp.dtype:
        """The dtype in which logits and relevance are computed: float32 or wider."""
        return accumulation_dtype(self.embedding)

    @property
    def output_embedding(self) -> Float[Array, "V D"]:
        """The head's matrix: a vector for each vocabulary entry."""
        return self.embedding if self.head is None else self.head

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for ``slots`` tokens in the dtype of the weights."""
        dtype = self.embedding.dtype
        shapes = [(batch, slots, b.attention.num_kv_heads, b.attention.head_dim) for b in self.config.blocks]
        layers = [KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes]
        return Cache(layers, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))

    def _context(
        self, shape: tuple[int, ...], valid: Array | None, cache: Cache | None
    ) -> tuple[Context, Cache | None]:
        """Rotations, mask and write position of this pass, and the cache with its bookkeeping advanced."""
        whole, tokens = valid is None and cache is None, shape[1]
        valid = jnp.ones(shape, bool) if valid is None else valid
        if cache is None:
            start, seen, before = 0, valid, 0
        else:
            start = cache.length
            before = cache.valid.sum(1, keepdims=True)
            seen = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, start, axis=1)
            cache = cache._replace(valid=seen, length=start + tokens)
        positions = jnp.maximum(before + jnp.cumsum(valid, axis=1) - 1, 0)
        distance = (start + jnp.arange(tokens))[:, None] - jnp.arange(seen.shape[1])
        angles = self.config.rope.angles(positions, self.config.head_dim)
        mask = None if whole else (distance >= 0) & seen[:, None]
        return Context(*angles, mask, distance, valid, start), cache
