"""Gates: arrays of ones that multiply the parts of a model that a reader may ask about.

Differentiated under a rule, a gate's cotangent is the relevance of the part that it multiplies. Set to zero, the same
gate is the intervention that switches the part off.

A new gate is a field of :class:`Gates`, made with :func:`_gate`, and a line in the layer that multiplies by it
(:meth:`Reading.gate`). Shapes, checks and ``ones`` follow from the field.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import MoejaxError

TokenIds = Int[Array | np.ndarray, "B T"] | Int[Array | np.ndarray, " T"] | Sequence[int] | Sequence[Sequence[int]]

GatesClass = TypeVar("GatesClass", bound=type)


@runtime_checkable
class _Sizes(Protocol):
    """The sizes of a model that :class:`Gates` needs; counts of parts that the model lacks are zero."""

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


def _gate(width: str | None = None, *, like: str | None = None, extra_layer: bool = False) -> Any:
    """A field of :class:`Gates`, with its shape ``[L B T width]`` as metadata.

    Args:
        width: the property of the configuration that counts the entries of the last axis; without it there is none.
        like: a field of the same shape. :meth:`Gates.ones` leaves the new field ``None`` then, and a ``drop_..`` makes
            it from that field.
        extra_layer: the axis of layers has one entry more, for the final norm.
    """
    return field(default=None, metadata={"width": width, "like": like, "extra_layer": extra_layer})


def _accept_old_names(old_names: Mapping[str, str]) -> Callable[[GatesClass], GatesClass]:
    """Let the constructor of a class take keywords by their old names, with a ``DeprecationWarning``."""

    def enter(cls: GatesClass) -> GatesClass:
        construct = cls.__init__

        @wraps(construct)
        def __init__(self: Any, *args: Any, **gates: Any) -> None:  # noqa: N807
            for old in old_names.keys() & gates.keys():
                new = old_names[old]
                warnings.warn(f"Gates({old}=) is now Gates({new}=).", DeprecationWarning, stacklevel=2)
                gates[new] = gates.pop(old)
            construct(self, *args, **gates)

        cls.__init__ = __init__
        return cls

    return enter


@_accept_old_names(
    {
        "shares": "routing_weights",
        "choices": "selectable",
        "attention_shares": "attention_routing_weights",
        "attention_choices": "attention_selectable",
    }
)
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gates:
    """Multiplicative gates; a field that is ``None`` costs nothing.

    Axes of layers, sequences and tokens may be 1 and broadcast. The old names ``shares``, ``choices``,
    ``attention_shares`` and ``attention_choices`` of arguments still work, with a ``DeprecationWarning``.

    Attributes:
        tokens: residual stream of a token entering each layer, and the final norm.
        experts: an expert's contribution to a token, by expert id, so that it can be set before the routing is known.
        slots: the same by routed slot, aligned with the ids that the forward pass returns; relevance is read here.
        heads: an attention head's output for a token.
        attention_experts, attention_slots: as ``experts`` and ``slots``, for mixtures of attention experts.
        shared: a shared expert's contribution to a token.
        attention, feed_forward: all that a layer's attention, or its feed-forward part, writes for a token.
        routing_weights: an expert's routing weight. The weights of the token's other experts make up for it, so that
            their sum is kept.
        selectable: an expert that a token may be routed to; at zero the next best expert takes its place. Where fewer
            experts are left than a token has slots, the best of the excluded experts run too.
        attention_routing_weights, attention_selectable: as ``routing_weights`` and ``selectable``, for mixtures of
            attention experts.
    """

    tokens: Float[Array, "L+1 B T"] | None = _gate(extra_layer=True)
    experts: Float[Array, "L B T E"] | None = _gate("num_experts")
    slots: Float[Array, "L B T K"] | None = _gate("num_selected")
    heads: Float[Array, "L B T H"] | None = _gate("num_heads")
    attention_experts: Float[Array, "L B T E"] | None = _gate("num_attention_experts")
    attention_slots: Float[Array, "L B T K"] | None = _gate("num_attention_selected")
    shared: Float[Array, "L B T U"] | None = _gate("num_shared")
    attention: Float[Array, "L B T"] | None = _gate(like="tokens")
    feed_forward: Float[Array, "L B T"] | None = _gate(like="tokens")
    routing_weights: Float[Array, "L B T E"] | None = _gate("num_experts", like="experts")
    selectable: Float[Array, "L B T E"] | None = _gate("num_experts", like="experts")
    attention_routing_weights: Float[Array, "L B T E"] | None = _gate("num_attention_experts", like="attention_experts")
    attention_selectable: Float[Array, "L B T E"] | None = _gate("num_attention_experts", like="attention_experts")

    def __repr__(self) -> str:
        """Names and shapes of the gates that are set."""
        present = {f.name: gate for f in fields(self) if (gate := getattr(self, f.name)) is not None}
        shapes = {name: list(gate.shape) if hasattr(gate, "shape") else gate for name, gate in present.items()}
        return f"Gates({', '.join(f'{name}={shape}' for name, shape in shapes.items())})"

    @classmethod
    def ones(cls, config: _Sizes, tokens: TokenIds) -> Self:
        """Return gates that change nothing, to make interventions of: by expert id, none by slot.

        Gates on all of a layer's attention or feed-forward part and on the routing stay ``None`` until a ``drop_..``
        sets them.

        Args:
            tokens: the token ids that the gates are for, one row or a batch.
        """
        return cls._ones(config, tokens, "experts", "attention_experts")

    @classmethod
    def readout(cls, config: _Sizes, tokens: TokenIds) -> Self:
        """Return gates to differentiate: by routed slot, none by expert id."""
        return cls._ones(config, tokens, "slots", "attention_slots")

    @classmethod
    def _ones(cls, config: _Sizes, tokens: TokenIds, *names: str) -> Self:
        """Return ones in the named fields and those without experts, as far as the model has the parts."""
        shapes = _shapes(config, tokens)
        return cls(**{n: jnp.ones(shapes[n]) for n in ("tokens", "heads", "shared", *names) if n in shapes})

    def check(self, config: _Sizes, tokens: TokenIds) -> Self:
        """Return these gates if they fit the model and the tokens.

        Raises:
            MoejaxError: a field does not broadcast to the model's layers, experts or heads, or to the tokens.
        """
        given = {f.name: gate for f in fields(self) if (gate := getattr(self, f.name)) is not None}
        shapes = _shapes(config, tokens) if given else {}
        for name, gate in given.items():
            shape = shapes.get(name)
            if shape is None:
                raise MoejaxError(f"gates on {name}: this model has none.")
            # layers, sequences and tokens may be 1; a fourth axis counts experts, slots or heads
            sizes = [(1, size) for size in shape[:3]] + [(size,) for size in shape[3:]]
            if gate.ndim != len(shape) or any(m not in fits for m, fits in zip(gate.shape, sizes, strict=True)):
                raise MoejaxError(f"gates on {name} of shape {list(gate.shape)} do not fit {list(shape)}.")
        return self

    def for_layer(self, layer: int) -> Self:
        """Return the gates of one layer: every field without its first axis."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: g[layer if len(g) > 1 else 0] for k, g in parts.items() if g is not None})

    def times(self, interventions: "Gates | None") -> Self:
        """Multiply these gates by ``interventions``, field by field: readouts and interventions in one pass."""
        if interventions is None:
            return self
        pairs = {f.name: (getattr(self, f.name), getattr(interventions, f.name)) for f in fields(self)}
        return replace(self, **{name: _product(*pair) for name, pair in pairs.items()})

    def drop_expert(
        self, layer: int, expert: int, token: int | None = None, value: float = 0.0, how: str = "zero"
    ) -> Self:
        """Switch off one expert of one layer, for one token position or for all.

        Args:
            token: position of the token; ``None`` for all tokens.
            value: what the gate is set to.
            how: what happens to the token's other experts, a word of :data:`HOW`. ``"zero"``: nothing.
                ``"renormalise"``: their weights grow so that the sum of the weights is kept. ``"replace"``: the next
                best expert runs too, with the weights that it would have if the router had selected it.

        Raises:
            MoejaxError: an unknown ``how``.
            IndexError: there is no such layer, expert or token.
            ValueError: these gates have no field of experts.
        """
        return self._set(_field_of(how), layer, token, expert, value)

    def drop_attention_expert(
        self, layer: int, expert: int, token: int | None = None, value: float = 0.0, how: str = "zero"
    ) -> Self:
        """:meth:`drop_expert` for attention experts."""
        return self._set(f"attention_{_field_of(how)}", layer, token, expert, value)

    def drop_shared(self, layer: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch off the shared expert of one layer, for one token position or for all."""
        return self._set("shared", layer, token, 0, value)

    def drop_attention(self, layer: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch off all that the attention of one layer writes, for one token position or for all."""
        return self._set("attention", layer, token, None, value)

    def drop_feed_forward(self, layer: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch off all that the feed-forward part of one layer writes, for one token position or for all."""
        return self._set("feed_forward", layer, token, None, value)

    def drop_head(self, layer: int, head: int, token: int | None = None, value: float = 0.0) -> Self:
        """Switch off one attention head of one layer, for one query position or for all."""
        return self._set("heads", layer, token, head, value)

    def drop_token(self, token: int, layer: int = 0, value: float = 0.0) -> Self:
        """Zero the residual stream of one token where it enters ``layer`` (0: its embedding)."""
        gate = self._field("tokens")
        check_index("layer", layer, gate.shape[0])
        check_index("token", token, gate.shape[-1])
        return replace(self, tokens=gate.at[layer, :, token].set(value))

    def _set(self, name: str, layer: int, token: int | None, index: int | None, value: float) -> Self:
        """Set a gate; ``index`` numbers the expert or head and is ``None`` for fields without such an axis."""
        gate = self._field(name)
        check_index("layer", layer, gate.shape[0])
        check_index("token", token or 0, gate.shape[2])
        last = () if index is None else (index,)
        if index is not None:
            check_index((_METADATA[name]["like"] or name)[:-1], index, gate.shape[-1])
        where = slice(None) if token is None else token
        return replace(self, **{name: gate.at[(layer, slice(None), where, *last)].set(value)})

    def _field(self, name: str) -> Array:
        gate = self.ones_like(name)
        if gate is None:
            raise ValueError(f"these gates have no {name!r}; start from Gates.ones(config, tokens).")
        return gate

    def ones_like(self, name: str) -> Array | None:
        """Return the field, or ones in its shape if it is ``None`` and the field that it is like is set."""
        gate, like = getattr(self, name), _METADATA[name]["like"]
        if gate is not None or like is None or (template := getattr(self, like)) is None:
            return gate
        return jnp.ones_like(template[: max(1, len(template) - 1)] if _METADATA[like]["extra_layer"] else template)


HOW = {"zero": "experts", "renormalise": "routing_weights", "replace": "selectable"}
"""Ways to switch an expert off, and the field of :class:`Gates` that does it."""

_METADATA = {f.name: f.metadata for f in fields(Gates)}


def _shapes(config: _Sizes, tokens: TokenIds) -> dict[str, tuple[int, ...]]:
    """Return the shape of every field that gates on a model and tokens can have."""
    shapes, batch = {}, (1, *np.shape(tokens))[-2:]
    for name, facts in _METADATA.items():
        width = () if facts["width"] is None else (getattr(config, facts["width"]),)
        if 0 not in width:
            shapes[name] = (config.num_layers + facts["extra_layer"], *batch, *width)
    return shapes


def _field_of(how: str) -> str:
    if how not in HOW:
        raise MoejaxError(f"how={how!r} is unknown; choose from {', '.join(HOW)}.")
    return HOW[how]


def _product(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a * b


def check_index(what: str, index: int, size: int) -> None:
    """Raise ``IndexError`` if ``index`` does not number one of ``size`` parts; negative numbers count from the end."""
    # jax drops out-of-range updates in silence, which would pass as "this expert does not matter"
    if not -size <= index < size:
        raise IndexError(f"{what} {index} is out of range: there are {size}.")
