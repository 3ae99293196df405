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

from moejax.errors import MoejaxError

TokenIds = Int[Array | np.ndarray, "B T"] | Int[Array | np.ndarray, " T"] | Sequence[int] | Sequence[Sequence[int]]


@runtime_checkable
class _Sizes(Protocol):
    """What :class:`Gates` needs to know of a model; counts of what it does not have are zero."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_selected(self) -> int: ...
    @property
    def num_attention_experts(self) -> int: ...
    @property
    def num_attention_selected(self) -> int: ...
    @property
    def num_shared(self) -> int: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gates:
    """Multiplicative gates; a field left ``None`` costs nothing. Axes of layers, sequences and tokens may be 1 and
    broadcast.

    Attributes:
        tokens: residual stream of a token entering each layer, and the final norm.
        experts: an expert's contribution to a token, by expert id (so it can be set before the routing is known).
        slots: the same by routed slot, aligned with the ids that the forward pass returns; how relevance is read.
        heads: an attention head's output for a token.
        attention_experts, attention_slots: as ``experts`` and ``slots``, for mixtures of attention experts.
        shared: a shared expert's contribution to a token.
        attention, feed_forward: all that a layer's attention, or its feed-forward part, writes for a token.
        routing_weights: an expert's routing weight, made up for by those of the token's other experts: their sum is kept.
        selectable: an expert that a token may be routed to; at zero the next best takes its place. Where fewer are left
            than a token is routed to, the best of those at zero run too.
        attention_routing_weights, attention_selectable: as ``routing_weights`` and ``selectable``, for mixtures of attention experts.
    """

    tokens: Float[Array, "L+1 B T"] | None = None
    experts: Float[Array, "L B T E"] | None = None
    slots: Float[Array, "L B T K"] | None = None
    heads: Float[Array, "L B T H"] | None = None
    attention_experts: Float[Array, "L B T E"] | None = None
    attention_slots: Float[Array, "L B T K"] | None = None
    shared: Float[Array, "L B T N"] | None = None
    attention: Float[Array, "L B T"] | None = None
    feed_forward: Float[Array, "L B T"] | None = None
    routing_weights: Float[Array, "L B T E"] | None = None
    selectable: Float[Array, "L B T E"] | None = None
    attention_routing_weights: Float[Array, "L B T E"] | None = None
    attention_selectable: Float[Array, "L B T E"] | None = None

    @classmethod
    def ones(cls, config: _Sizes, tokens: TokenIds) -> Self:
        """Gates that change nothing, as interventions for ``tokens``: by expert id, none by slot.

        Those on whole parts of a layer and on the routing stay ``None`` until a ``drop_..`` sets them.
        """
        return cls._ones(config, tokens, "experts", "attention_experts")

    @classmethod
    def readout(cls, config: _Sizes, tokens: TokenIds) -> Self:
        """Gates to differentiate: by routed slot, none by expert id."""
        return cls._ones(config, tokens, "slots", "attention_slots")

    @classmethod
    def _ones(cls, config: _Sizes, tokens: TokenIds, *names: str) -> Self:
        """Ones in the named fields and those that are neither by id nor by slot, if the model has them."""
        shapes = _shapes(config, tokens)
        return cls(**{n: jnp.ones(shapes[n]) for n in ("tokens", "heads", "shared", *names) if n in shapes})

    def check(self, config: _Sizes, tokens: TokenIds) -> Self:
        """These gates, if they are gates on that model and those tokens.

        Raises:
            MoejaxError: a field does not broadcast to the model's layers, experts or heads, or to the tokens.
        """
        given = {f.name: gate for f in fields(self) if (gate := getattr(self, f.name)) is not None}
        theirs = _shapes(config, tokens) if given else {}
        for name, gate in given.items():
            shape = theirs.get(name)
            if shape is None:
                raise MoejaxError(f"gates on {name}, of which this model has none.")
            # layer, sequence and token; a fourth axis is that of experts, slots or heads
            sizes = [(1, size) for size in shape[:3]] + [(size,) for size in shape[3:]]
            if gate.ndim != len(shape) or any(m not in fits for m, fits in zip(gate.shape, sizes, strict=True)):
                raise MoejaxError(f"gates on {name} of shape {list(gate.shape)} do not fit {list(shape)}.")
        return self

    def for_layer(self, layer: int) -> Self:
        """The gates of one layer: every field without its first axis."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: g[layer if len(g) > 1 else 0] for k, g in parts.items() if g is not None})

    def times(self, interventions: "Gates | None") -> Self:
        """These gates times ``interventions``, field by field: readouts and interventions in one pass."""
        if interventions is None:
            return self
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        theirs = {f.name: getattr(interventions, f.name) for f in fields(interventions)}
        return replace(self, **{k: _product(mine[k], theirs[k]) for k in mine})

    def drop_expert(
        self, layer: int, expert: int, token: int | None = None, value: float = 0.0, how: str = "zero"
    ) -> Self:
        """Switch one expert of one layer off, for one token position or for all.

        Args:
            how: what happens to the token's other experts, a word of :data:`HOW`: ``"zero"`` nothing,
                ``"renormalise"`` their weights grow so that the sum of the weights is kept, ``"replace"`` the next best
                expert runs too, with the weights as if the router had selected it.
        """
        return self._set(_way(how), layer, token, expert, value)

    def drop_attention_expert(
        self, layer: int, expert: int, token: int | None = None, value: float = 0.0, how: str = "zero"
    ) -> Self:
        """:meth:`drop_expert` for attention experts."""
        return self._set(f"attention_{_way(how)}", layer, token, expert, value)

    def drop_shared(self, layer: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch the shared expert of one layer off, for one token position or for all."""
        return self._set("shared", layer, token, 0, value)

    def drop_attention(self, layer: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch all that the attention of one layer writes off, for one token position or for all."""
        return self._set("attention", layer, token, None, value)

    def drop_feed_forward(self, layer: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch all that the feed-forward part of one layer writes off, for one token position or for all."""
        return self._set("feed_forward", layer, token, None, value)

    def drop_head(self, layer: int, head: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch one attention head of one layer off, for one query position or for all."""
        return self._set("heads", layer, token, head, value)

    def drop_token(self, token: int, layer: int = 0, value: float = 0.0) -> Self:
        """Zero the residual stream of one token where it enters ``layer`` (0: its embedding)."""
        gate = self._field("tokens")
        check_index("layer", layer, gate.shape[0])
        check_index("token", token, gate.shape[-1])
        return replace(self, tokens=gate.at[layer, :, token].set(value))

    def _set(self, name: str, layer: int, token: int | None, index: int | None, value: float) -> Self:
        """``index`` is that of the expert or head; fields without such an axis have none."""
        gate = self._field(name)
        check_index("layer", layer, gate.shape[0])
        check_index("token", token or 0, gate.shape[2])
        last = () if index is None else (index,)
        if index is not None:
            check_index(_ALIKE.get(name, name)[:-1], index, gate.shape[-1])
        where = slice(None) if token is None else token
        return replace(self, **{name: gate.at[(layer, slice(None), where, *last)].set(value)})

    def _field(self, name: str) -> Array:
        gate = self.ones_like(name)
        if gate is None:
            raise ValueError(f"these gates have no {name!r}; start from Gates.ones(config, tokens).")
        return gate

    def ones_like(self, name: str) -> Array | None:
        """The field, or the ones that it would be in gates that have its kin."""
        gate = getattr(self, name)
        kin = None if gate is not None or name not in _ALIKE else getattr(self, _ALIKE[name])
        if kin is None:
            return gate
        return jnp.ones_like(kin[: max(1, len(kin) - 1)] if _ALIKE[name] == "tokens" else kin)


HOW = {"zero": "experts", "renormalise": "routing_weights", "replace": "selectable"}
"""Ways to switch an expert off, and the field of :class:`Gates` that does it."""

_ALIKE = {
    "attention": "tokens",
    "feed_forward": "tokens",
    "routing_weights": "experts",
    "selectable": "experts",
    "attention_routing_weights": "attention_experts",
    "attention_selectable": "attention_experts",
}
"""Fields that :meth:`Gates.ones` leaves out, and a field of the same shape (the tokens' without its last layer)."""


def _shapes(config: _Sizes, tokens: TokenIds) -> dict[str, tuple[int, ...]]:
    """Of all the fields that gates on a model and tokens can have."""
    layers, batch = config.num_layers, (1, *np.shape(tokens))[-2:]
    widths = {
        "experts": config.num_experts,
        "slots": config.num_selected,
        "heads": config.num_heads,
        "attention_experts": config.num_attention_experts,
        "attention_slots": config.num_attention_selected,
        "shared": config.num_shared,
    }
    shapes = {name: (layers, *batch, width) for name, width in widths.items() if width}
    shapes |= {name: shapes.get(kin, (layers, *batch)) for name, kin in _ALIKE.items() if kin in {"tokens", *shapes}}
    return shapes | {"tokens": (layers + 1, *batch)}


def _way(how: str) -> str:
    if how not in HOW:
        raise MoejaxError(f"how={how!r} is unknown; choose from {', '.join(HOW)}.")
    return HOW[how]


def _product(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a * b


def check_index(what: str, index: int, size: int) -> None:
    # jax drops out-of-range updates in silence, which would pass as "this expert does not matter"
    if not -size <= index < size:
        raise IndexError(f"{what} {index} is out of range: there are {size}.")
