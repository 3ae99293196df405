"""Gates: arrays of ones that multiply what a reader may care about.

Differentiated under a rule, a gate's cotangent is the relevance of what it multiplies; set to zero, the same gate is
the intervention that switches it off.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TokenIds = Int[Array | np.ndarray, "B T"] | Int[Array | np.ndarray, " T"] | Sequence[int] | Sequence[Sequence[int]]


@runtime_checkable
class _Sizes(Protocol):
    """What :meth:`Gates.ones` needs to know of a model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_selected(self) -> int: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gates:
    """Multiplicative gates; a field left ``None`` costs nothing. Any axis but the last may be 1 and broadcasts.

    Attributes:
        tokens: residual stream of a token entering each layer, and the final norm.
        experts: an expert's contribution to a token, by expert id (so it can be set before the routing is known).
        slots: the same by routed slot, aligned with the ids that the forward pass returns; how relevance is read.
        heads: an attention head's output for a token.
    """

    tokens: Float[Array, "L+1 B T"] | None = None
    experts: Float[Array, "L B T E"] | None = None
    slots: Float[Array, "L B T K"] | None = None
    heads: Float[Array, "L B T H"] | None = None

    @classmethod
    def ones(cls, config: _Sizes, tokens: TokenIds) -> Self:
        """Gates that change nothing, as knobs for ``tokens``: every field but ``slots``."""
        shape = (1, *np.shape(tokens))[-2:]
        layers = config.num_layers
        return cls(
            tokens=jnp.ones((layers + 1, *shape)),
            experts=jnp.ones((layers, *shape, config.num_experts)),
            heads=jnp.ones((layers, *shape, config.num_heads)),
        )

    @classmethod
    def readout(cls, config: _Sizes, tokens: Int[Array, "B T"]) -> Self:
        """Gates to differentiate: ``tokens``, ``slots`` and ``heads``."""
        layers = config.num_layers
        return cls(
            tokens=jnp.ones((layers + 1, *tokens.shape)),
            slots=jnp.ones((layers, *tokens.shape, config.num_selected)),
            heads=jnp.ones((layers, *tokens.shape, config.num_heads)),
        )

    def at(self, layer: int) -> Self:
        """The gates of one layer: every field without its first axis."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: g[layer if len(g) > 1 else 0] for k, g in parts.items() if g is not None})

    def over(self, knobs: "Gates | None") -> Self:
        """These gates times ``knobs``, field by field: readouts and interventions in one pass."""
        if knobs is None:
            return self
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        theirs = {f.name: getattr(knobs, f.name) for f in fields(knobs)}
        return replace(self, **{k: _product(mine[k], theirs[k]) for k in mine})

    def drop_expert(self, layer: int, expert: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch one expert of one layer off, for one token position or for all."""
        return self._set("experts", layer, token, expert, value)

    def drop_head(self, layer: int, head: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch one attention head of one layer off, for one query position or for all."""
        return self._set("heads", layer, token, head, value)

    def drop_token(self, token: int, layer: int = 0, value: float = 0.0) -> Self:
        """Zero the residual stream of one token where it enters ``layer`` (0: its embedding)."""
        gate = self._field("tokens")
        _check_index("layer", layer, gate.shape[0])
        _check_index("token", token, gate.shape[-1])
        return replace(self, tokens=gate.at[layer, :, token].set(value))

    def _set(self, name: str, layer: int, token: int | None, index: int, value: float) -> Self:
        gate = self._field(name)
        _check_index("layer", layer, gate.shape[0])
        _check_index(name[:-1], index, gate.shape[-1])
        if token is not None:
            _check_index("token", token, gate.shape[-2])
        where = slice(None) if token is None else token
        return replace(self, **{name: gate.at[layer, :, where, index].set(value)})

    def _field(self, name: str) -> Array:
        gate = getattr(self, name)
        if gate is None:
            raise ValueError(f"these gates have no {name!r}; start from Gates.ones(config, tokens).")
        return gate


def _product(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a * b


def _check_index(what: str, index: int, size: int) -> None:
    # jax drops out-of-range updates in silence, which would pass as "this expert does not matter"
    if not -size <= index < size:
        raise IndexError(f"{what} {index} is out of range: there are {size}.")
