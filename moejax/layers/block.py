"""One decoder layer: a part that mixes tokens and a part that treats each token by itself, on the residual stream."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.norm import RMSNorm
from moejax.layers.parts import Aux, Axes, Cache, Call, NoPart, Part, PartConfig, Role
from moejax.layers.rotary import Rotary

HALVES = ("attention", "feed_forward")
"""The two places of a block that a part can take."""

_BEFORE, _AFTER = "{}_norm", "{}_post_norm"
PRE_NORM = ("attention_norm", "feed_forward_norm")


@dataclass(frozen=True)
class BlockConfig:
    """Architecture of one layer.

    Attributes:
        attention: the part that mixes tokens; ``None`` for a block without it.
        feed_forward: the part that treats each token by itself; ``None`` for a block without it.
        norm_eps: epsilon of the block's norms.
        norms: which norms there are. ``attention_norm`` and ``feed_forward_norm`` stand before their part,
            ``attention_post_norm`` and ``feed_forward_post_norm`` between their part and the residual sum.
        norm: class of the norms, with ``init(dim, eps, dtype)``.
        parallel: both parts read the stream that enters the block. By default the second reads what the first wrote.
        branch_factor: factor on what each part writes (``residual_multiplier`` of Granite).
        layer_factor: a learned number, one a layer, multiplies the stream that leaves the block (Gemma 4).
    """

    attention: PartConfig | None
    feed_forward: PartConfig | None
    norm_eps: float
    norms: tuple[str, ...] = PRE_NORM
    norm: type[RMSNorm] = RMSNorm
    parallel: bool = False
    branch_factor: float = 1.0
    layer_factor: bool = False

    def half(self, name: str) -> PartConfig | NoPart:
        """The configuration of ``"attention"`` or ``"feed_forward"``; a stand-in of zeros for a missing half."""
        part = getattr(self, name)
        return NoPart() if part is None else part

    @property
    def halves(self) -> tuple[PartConfig | NoPart, PartConfig | NoPart]:
        """Both halves."""
        return self.half("attention"), self.half("feed_forward")

    @property
    def model_dim(self) -> int:
        """Width ``D`` of the residual stream."""
        part = self.attention or self.feed_forward
        assert part is not None, "a block needs a part"
        return part.model_dim

    @property
    def rotary(self) -> Rotary | None:
        """Rotary positions of the block's part that has any."""
        return next((half.rotary for half in self.halves if half.rotary is not None), None)

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Logical axes of the block's leaves, by their paths within it."""
        return _prefixed({name: self.half(name).axes for name in HALVES})

    @property
    def roles(self) -> Mapping[str, Role]:
        """Which of the block's leaves are experts or routers, by their paths within it."""
        return _prefixed({name: self.half(name).roles for name in HALVES})

    def init_cache(self, batch: int, positions: int, dtype: DTypeLike) -> tuple[Cache, Cache]:
        """Empty caches of both halves for ``positions`` tokens of ``batch`` sequences."""
        parts = [getattr(self, name) for name in HALVES]
        first, second = (None if part is None else part.init_cache(batch, positions, dtype) for part in parts)
        return first, second

    def on_mesh(self, mesh: Mesh | None) -> Self:
        """The same architecture with its parts told over which devices their weights lie."""
        return self._each(lambda part: part.on_mesh(mesh))

    def pack(self, packed: str) -> Self:
        """The same architecture with experts held in the format ``packed``."""
        return self._each(lambda part: part.pack(packed))

    def _each(self, change: Any) -> Self:
        parts = {name: part for name in HALVES if (part := getattr(self, name)) is not None}
        return replace(self, **{name: change(part) for name, part in parts.items()})


def _prefixed(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}.{path}": entry for name, table in tables.items() for path, entry in table.items()}


class BlockAux(NamedTuple):
    """What one block told beside its output.

    Attributes:
        attention, feed_forward: what its parts told.
        nodes: the values at the nodes that the reading names.
    """

    attention: Aux = Aux()
    feed_forward: Aux = Aux()
    nodes: Mapping[str, Array] = {}


@nnx.dataclass
class Block(nnx.Module):
    """Residual block: ``x + attention(norm(x))``, then the same with the feed-forward part."""

    attention_norm: RMSNorm | None = nnx.data()
    attention: Part | None = nnx.data()
    attention_post_norm: RMSNorm | None = nnx.data()
    feed_forward_norm: RMSNorm | None = nnx.data()
    feed_forward: Part | None = nnx.data()
    feed_forward_post_norm: RMSNorm | None = nnx.data()
    layer_factor: Float[Array, " 1"] | None = nnx.data()
    config: BlockConfig = nnx.static()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: BlockConfig, dtype: DTypeLike) -> Self:
        """Random weights, unit norms and factor."""
        c, dim = config, config.model_dim
        modules: dict[str, Any] = {}
        for name, k in zip(HALVES, jax.random.split(key), strict=True):
            part = getattr(c, name)
            modules[name] = None if part is None else part.init(k, dtype)
            for norm in (_BEFORE.format(name), _AFTER.format(name)):
                modules[norm] = c.norm.init(dim, c.norm_eps, dtype) if norm in c.norms and part is not None else None
        return cls(**modules, layer_factor=jnp.ones(1, dtype) if c.layer_factor else None, config=c)

    def __call__(
        self, x: Float[Array, "B T D"], call: Call, cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache, BlockAux]:
        """The stream that leaves the block, the cache with this call's tokens, and what the parts told.

        Args:
            call: what both parts are given; its reading is this layer's.
            cache: what :meth:`BlockConfig.init_cache` made, or ``None``.
        """
        reading = call.reading.passing()
        call = call._replace(reading=reading)
        add = reading.rule.add
        x = reading.gate("tokens", x)
        held = (None, None) if cache is None else cache
        attended, stored, attention_aux = self._branch("attention", x, call, held[0])
        middle = reading.node("middle", _sum(add, x, attended))
        read = x if self.config.parallel else middle
        written, stored_too, aux = self._branch("feed_forward", read, call, held[1])
        x = _sum(add, middle, written)
        if self.layer_factor is not None:
            x = x * self.layer_factor.astype(x.dtype)
        nodes = reading.passed_values({"attention_": attention_aux.routing, "": aux.routing})
        return x, (stored, stored_too), BlockAux(attention_aux, aux, nodes)

    def _branch(self, name: str, x: Array, call: Call, cache: Cache) -> tuple[Array | None, Cache, Aux]:
        """What one half writes, from the stream that it reads; ``None`` if the half is missing."""
        part: Part | None = getattr(self, name)
        if part is None:
            return None, cache, Aux()
        reading = call.reading
        before, after = getattr(self, _BEFORE.format(name)), getattr(self, _AFTER.format(name))
        normed = reading.node(f"{name}_norm", x if before is None else before(x, reading))
        y, stored, aux = part.run(normed, call, cache)
        y = y if after is None else after(y, reading)
        y = y if self.config.branch_factor == 1 else y * self.config.branch_factor
        return reading.gate(name, y), stored, aux


def _sum(add: Any, stream: Array, branch: Array | None) -> Array:
    return stream if branch is None else add(stream, branch)
