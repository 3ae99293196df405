"""The only decoder: embedding, blocks, final norm, head."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.layers import Block, BlockAux, Call, RMSNorm, Rotary, Rotation
from moejax.layers.linear import matmul_f32_accum, normal
from moejax.models.config import Config
from moejax.ops.cotangents import accumulation_dtype
from moejax.ops.packed import is_packed
from moejax.routing import Routing
from moejax.rules import Reading
from moejax.rules.edits import NOWHERE


class Cache(NamedTuple):
    """What every layer keeps of the tokens so far, for ``S`` positions.

    Attributes:
        layers: an entry for each layer, as its parts made it (keys and values, states of a recurrence).
        valid: positions that hold a token that may be seen (not padding).
        length: positions written so far, padding included; the next token goes there.
    """

    layers: list[Any]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]


class Hidden(NamedTuple):
    """What a forward pass computes before the head.

    Attributes:
        stream: residual stream after the last layer, before the final norm.
        cache: the given cache with this pass's tokens in it, or ``None``.
        entering: residual stream entering each layer.
        aux: what each layer's parts told beside their outputs, their routing above all.
        nodes: the values at the nodes that the reading names.
    """

    stream: Float[Array, "B T D"]
    cache: Cache | None
    entering: list[Float[Array, "B T D"]]
    aux: list[BlockAux]
    nodes: Mapping[str, Array] = {}

    def routing(self, half: str = "feed_forward") -> list[Routing | None]:
        """Where each layer's ``"feed_forward"`` or ``"attention"`` part sent tokens; ``None`` without experts."""
        return [getattr(aux, half).routing for aux in self.aux]


# Layers of equal shape share one trace; XLA inlines the calls.
_run_block = jax.jit(Block.__call__)


def _times(x: Array, factor: float) -> Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def _matching_rows(x: Float[Array, "B N D"], weight: Float[Array, "B N J D"]) -> Float[Array, "B N J"]:
    """Multiply each position's stream by its own rows of the head."""
    return jnp.einsum("bnd,bnjd->bnj", x, weight, preferred_element_type=accumulation_dtype(x))


@nnx.dataclass
class Decoder(nnx.Module):
    """Mixture-of-Experts decoder as an immutable pytree; its layers are a list."""

    embedding: Float[Array, "V D"] = nnx.data()
    layers: list[Block] = nnx.data()
    norm: RMSNorm = nnx.data()
    head: Float[Array, "V D"] | None = nnx.data()
    config: Config = nnx.static()

    def __repr__(self) -> str:
        return f"Decoder({self.config!r}, {self.dtype.name}, {self.num_parameters:,} parameters)"

    def _repr_html_(self) -> str:
        # imported here: the reports import what only a person who looks at something needs
        from moejax.report.objects import properties_html

        rows = {"family": self.config.model_type, "parameters": f"{self.num_parameters:,}", "dtype": self.dtype.name}
        return properties_html("Decoder", rows | {k: str(v) for k, v in self.config.summary.items()})

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weights, read off the embedding."""
        return jnp.dtype(self.embedding.dtype)

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are; of a packed matrix, its values."""
        return sum(math.prod(matrix.shape) for matrix in jax.tree.leaves(self, is_leaf=is_packed))

    @classmethod
    def init(cls, config: Config, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Self:
        """Random weights: normal with standard deviation 0.02, unit norms."""
        c, (k_embed, k_head, *k_layers) = config, jax.random.split(key, 2 + config.num_layers)
        return cls(
            normal(k_embed, (c.vocab_size, c.model_dim), dtype),
            [Block.init(k, block, dtype) for k, block in zip(k_layers, c.blocks, strict=True)],
            c.norm.init(c.model_dim, c.norm_eps, dtype),
            None if c.tied else normal(k_head, (c.vocab_size, c.model_dim), dtype),
            c,
        )

    @classmethod
    def abstract(cls, config: Config, dtype: DTypeLike = jnp.float32) -> Self:
        """The decoder's tree with ``jax.ShapeDtypeStruct`` leaves; allocates nothing."""
        # layers of equal architecture have equal shapes, and tracing thousands of them would take minutes
        distinct = tuple(dict.fromkeys(config.blocks))

        def init() -> Decoder:
            tree = cls.init(replace(config, blocks=distinct), jax.random.key(0), dtype)
            layer_of = dict(zip(distinct, tree.layers, strict=True))
            return cls(tree.embedding, [layer_of[block] for block in config.blocks], tree.norm, tree.head, config)

        return jax.eval_shape(init)

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

        Args:
            valid: tokens that are not padding; all by default.
            cache: what earlier passes kept; the tokens follow those in it.
            rematerialised_layers: how many layers, counted from the first, keep only their inputs for a backward pass,
                which computes the rest again. The first, because by then the memory of later layers has been freed.
            embedded: enters the first layer in place of what :meth:`embed` makes of the tokens.
            key: a training step's randomness; without one nothing is random.
        """
        call, cache, rotations = self._call(tokens.shape, valid, cache)
        x = self.embed(tokens) if embedded is None else embedded
        if reading.edits:
            assert call.valid is not None
            assert call.positions is not None
            reading = replace(reading, positions=jnp.where(call.valid, call.positions, NOWHERE))
        *readings, last = reading.by_layer(len(self.layers))
        stored, told, entering, carry = [], [], [], None
        for i, layer in enumerate(self.layers):
            entering.append(x)
            run_block = jax.checkpoint(_run_block) if i < rematerialised_layers else _run_block
            layer_key = None if key is None else jax.random.fold_in(key, i)
            rotation = rotations.get(layer.config.rotary)
            here = call._replace(reading=readings[i], rotation=rotation, carry=carry, key=layer_key)
            x, kept, aux = run_block(layer, x, here, cache and cache.layers[i])
            carry = aux.feed_forward.carry
            stored.append(kept)
            told.append(aux)
        last = last.passing()
        x = last.gate("tokens", x)
        by_layer = [*(aux.nodes for aux in told), last.passed_values({})]
        nodes = {f"{name}.{i}": value for i, values in enumerate(by_layer) for name, value in values.items()}
        return Hidden(x, cache and cache._replace(layers=stored), entering, told, nodes)

    def embed(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """What enters the first layer: the tokens' embeddings, times the factor that the configuration has."""
        return _times(self.embedding[tokens], self.config.embedding_factor)

    def logits(
        self,
        stream: Float[Array, "B *s D"],
        reading: Reading = Reading(),
    ) -> Float[Array, "B *s V"]:
        """Final norm and head, the product accumulated and left in float32."""
        return self.head_product(self.norm(stream, reading.for_layer(-1)), reading)

    def head_product(self, normed: Float[Array, "B *s D"], reading: Reading) -> Float[Array, "B *s V"]:
        """Multiply the normed stream by the head; the product is accumulated and left in float32."""
        return _times(reading.linear(matmul_f32_accum, normed, self.output_embedding), self.config.logits_factor)

    def named_logits(
        self, normed: Float[Array, "B N D"], ids: Int[Array, "B N J"], reading: Reading
    ) -> Float[Array, "B N J"]:
        """The logits of ``J`` tokens at each position; only their rows of the head take part."""
        rows = reading.linear(_matching_rows, normed, self.output_embedding[ids])
        return _times(rows, self.config.logits_factor)

    @property
    def accumulation_dtype(self) -> jnp.dtype:
        """The dtype in which logits and relevance are computed: float32 or wider."""
        return accumulation_dtype(self.embedding)

    @property
    def output_embedding(self) -> Float[Array, "V D"]:
        """The head's matrix: a vector for each vocabulary entry."""
        return self.embedding if self.head is None else self.head

    def empty_cache(self, batch: int, positions: int) -> Cache:
        """A cache for ``positions`` tokens in the dtype of the weights; its layers are whatever their parts keep."""
        dtype = self.embedding.dtype
        layers = [block.init_cache(batch, positions, dtype) for block in self.config.blocks]
        return Cache(layers, jnp.zeros((batch, positions), bool), jnp.zeros((), jnp.int32))

    def _call(
        self, shape: tuple[int, ...], valid: Array | None, cache: Cache | None
    ) -> tuple[Call, Cache | None, dict[Rotary | None, Rotation]]:
        """What all layers are given, the cache with its bookkeeping advanced, and each distinct rotation."""
        unmasked, tokens = valid is None and cache is None, shape[1]
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
        rotaries = dict.fromkeys(block.rotary for block in self.config.blocks)
        rotations: dict[Rotary | None, Rotation] = {r: r.rotation(positions) for r in rotaries if r is not None}
        mask = None if unmasked else (distance >= 0) & seen[:, None]
        call = Call(positions=positions, mask=mask, distance=distance, valid=valid, start=start)
        return call, cache, rotations
