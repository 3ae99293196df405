"""Edits: values at nodes that are set, added to, scaled, or patched from another run.

Gates multiply parts of a model and are read as relevance; edits change any node's value by any number. Both are
pytrees: differentiate by their arrays, or map over them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax.errors import MoejaxError
from moejax.rules.nodes import NODES

Selection = Any
"""Numbers of tokens, experts or heads: an integer, a sequence of integers, or a JAX array ``[n]``."""

AXES = ("tokens", "experts", "heads")
"""What an edit may be limited to."""

NOWHERE = -(1 << 30)
"""The position of padding, which no edit names."""


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Edit:
    """One change of one node's value.

    Attributes:
        node: name and layer, as in ``"stream.3"``; the name alone means every layer that has the node.
        how: a word of :data:`HOW_TO_EDIT`.
        value: what is set, added or multiplied by; it broadcasts to the part of the value that is selected.
        where: numbers of the selected tokens, experts and heads. Tuples are a part of a program, arrays are its data.
    """

    node: str
    how: str
    value: Any
    where: dict[str, Any] = field(default_factory=dict)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """The value and the selections that are arrays; node, kind of edit and other selections are structure."""
        fixed = tuple((axis, s) for axis, s in sorted(self.where.items()) if isinstance(s, tuple))
        data = {axis: s for axis, s in self.where.items() if not isinstance(s, tuple)}
        return (self.value, data), (self.node, self.how, fixed)

    @classmethod
    def tree_unflatten(cls, structure: tuple, leaves: tuple) -> Self:
        """The edit from what :meth:`tree_flatten` returns."""
        (node, how, fixed), (value, data) = structure, leaves
        return cls(node, how, value, {**dict(fixed), **data})

    def __repr__(self) -> str:
        told = [f"{axis}={list(s) if isinstance(s, tuple) else s}" for axis, s in self.where.items()]
        limits = f"[{', '.join(told)}]" if told else ""
        return f"{self.how} {self.node}{limits}"


def _set(x: Array, value: Array) -> Array:
    return jnp.broadcast_to(value, x.shape).astype(x.dtype)


def _add(x: Array, value: Array) -> Array:
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) + value).astype(x.dtype)


def _scale(x: Array, value: Array) -> Array:
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * value).astype(x.dtype)


HOW_TO_EDIT: dict[str, Callable[[Array, Array], Array]] = {"set": _set, "add": _add, "scale": _scale}
"""Kinds of edits: the new value from the old one and the edit's."""


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Edits:
    """Changes of values at nodes (``moejax.nodes(lm)`` lists these), applied in order; every method returns new edits.

    A value broadcasts, as numpy does, to the part of the node's value that is selected: of ``"stream.3"`` ``[B T D]``
    two ``tokens`` select ``[B 2 D]``. Tokens are counted from the sequence's first token, padding left out; negative
    numbers count from its end. Of nodes with routed slots (``expert_outputs``, ``neurons``, ``expert_weights``),
    ``experts`` select the slots that go to them, and a value's axis of slots counts the named experts.

    Lists of numbers are a part of the program under ``jax.jit``: other numbers compile anew. JAX arrays are data, so
    that one program serves all positions; ``jax.grad`` by whole edits needs lists, because positions have no gradient.

    Attributes:
        edits: the changes one by one.
    """

    edits: tuple[Edit, ...] = ()

    def tree_flatten(self) -> tuple[tuple[Edit, ...], None]:
        """The edits one by one."""
        return self.edits, None

    @classmethod
    def tree_unflatten(cls, structure: None, edits: Sequence[Edit]) -> Self:
        """The edits from what :meth:`tree_flatten` returns."""
        return cls(tuple(edits))

    def __len__(self) -> int:
        return len(self.edits)

    def __repr__(self) -> str:
        return f"Edits({'; '.join(map(repr, self.edits))})"

    def set(self, node: str, value: Any, **where: Selection) -> Self:
        """Replace the value at ``node`` by ``value``.

        Args:
            node: name and layer, as in ``"stream.3"``; the name alone means every layer that has the node.
            where: ``tokens``, ``experts`` and ``heads``: numbers of those that are changed, by default all.

        Raises:
            MoejaxError: no such node, a node that cannot be edited or has no such axis, or a number that is no integer.
        """
        return self._with("set", node, value, where)

    def add(self, node: str, value: Any, **where: Selection) -> Self:
        """Add ``value`` at ``node``; arguments and errors as in :meth:`set`."""
        return self._with("add", node, value, where)

    def scale(self, node: str, factor: Any, **where: Selection) -> Self:
        """Multiply the value at ``node`` by ``factor``; arguments and errors as in :meth:`set`."""
        return self._with("scale", node, factor, where)

    def patch(self, cache: Mapping[str, Any], names: str | Sequence[str] = "*", **where: Selection) -> Self:
        """Set nodes to their values in another run, as ``lm.run_with_cache`` or ``moejax.apply`` returned them.

        Without ``tokens`` both runs have the same shape. With ``tokens``, these tokens of the other run, which has no
        padding before them, take the places of the same tokens here. With ``experts``, an expert's slots take the value
        that the same expert had for the token there, zero if the token did not go to it; the cache must hold
        ``expert_ids`` of the layer. Without ``experts`` slots are taken in order, whichever experts they go to.

        Args:
            cache: values by node.
            names: the nodes to patch, names in the cache or patterns such as ``"stream"`` or ``"*.3"``; nodes that
                cannot be edited are left out. By default all.
            where: as in :meth:`set`.

        Raises:
            MoejaxError: the cache has no such node, or lacks the ids of experts; otherwise as in :meth:`set`.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        edits = self
        for name in wanted:
            found = [n for n in cache if n == name or fnmatchcase(n, name) or n.rpartition(".")[0] == name]
            if not found:
                raise MoejaxError(f"the cache has no node {name!r}: it has {', '.join(cache) or 'none'}.")
            for node in found:
                if NODES[node.rpartition(".")[0]].is_edited or node == name:
                    selections = _selections(node, where)
                    edits = edits.set(node, _from_cache(cache, node, selections), **selections)
        return edits

    def _with(self, how: str, node: str, value: Any, where: Mapping[str, Selection]) -> Self:
        value = jnp.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(jnp.float32)
        return type(self)((*self.edits, Edit(node, how, value, _selections(node, where))))

    def map_edits(self, change: Callable[[Edit], Edit]) -> Self:
        """Return these edits, each changed by ``change``."""
        return type(self)(tuple(map(change, self.edits)))

    def with_values(self, change: Callable[[Array], Any]) -> Self:
        """Return these edits with values changed by ``change``; selections stay."""
        return self.map_edits(lambda edit: replace(edit, value=change(edit.value)))

    def as_data(self) -> Self:
        """Return these edits with all selections as arrays, so that one program serves all of them."""

        def arrays(where):
            return {axis: jnp.asarray(s, jnp.int32) for axis, s in where.items()}

        return self.map_edits(lambda edit: replace(edit, where=arrays(edit.where)))

    def at(self, node: str) -> tuple[Edit, ...]:
        """Return the edits of one node."""
        return tuple(edit for edit in self.edits if edit.node == node)

    def for_layer(self, layer: int) -> Self:
        """Return the edits of one layer, whose nodes have no number then."""
        split = [(edit, *edit.node.rpartition(".")[::2]) for edit in self.edits]
        return type(self)(tuple(replace(edit, node=name) for edit, name, number in split if number == str(layer)))


def _selections(node: str, where: Mapping[str, Selection]) -> dict[str, Any]:
    """Check what an edit names; numbers become tuples or arrays ``[n]``."""
    name = _name(node)
    kind = NODES.get(name)
    if kind is None:
        raise MoejaxError(f"there is no node {node!r} to edit: name {', '.join(NODES)} and a layer, as 'stream.3'.")
    if not kind.is_edited:
        raise MoejaxError(f"{node!r} cannot be edited, it follows from the router: edit router_logits instead.")
    out = {}
    for axis, given in where.items():
        if axis not in AXES:
            raise MoejaxError(f"edits are limited by {', '.join(AXES)}, not by {axis!r}.")
        if given is None:
            continue
        if kind.axis(axis) is None:
            raise MoejaxError(f"{axis}= does not limit an edit of {node!r}, whose value is [{kind.letters}].")
        out[axis] = _numbers(axis, given)
    return out


def _numbers(axis: str, given: Selection) -> Any:
    if isinstance(given, jax.Array):
        if not jnp.issubdtype(given.dtype, jnp.integer):
            raise MoejaxError(f"{axis}= takes whole numbers, not an array of {given.dtype}.")
        return jnp.atleast_1d(given)
    numbers = np.atleast_1d(np.asarray(list(given) if isinstance(given, range | set) else given))
    if numbers.ndim != 1 or not numbers.size or not np.issubdtype(numbers.dtype, np.integer):
        raise MoejaxError(f"{axis}={given!r}: give one whole number or several in a list.")
    return tuple(numbers.tolist())


def _name(node: str) -> str:
    """The name of a node without its layer."""
    return node.rpartition(".")[0] if "." in node else node


def _from_cache(cache: Mapping[str, Any], node: str, where: Mapping[str, Any]) -> Array:
    """The part of a node's value in another run that ``where`` selects."""
    name, _, layer = node.rpartition(".")
    value, kind = jnp.asarray(cache[node]), NODES[name]
    if "experts" in where and "K" in kind.axes:
        prefix = "attention_" if kind.half == "attention" else ""
        ids = cache.get(f"{prefix}expert_ids.{layer}")
        if ids is None:
            raise MoejaxError(f"to patch {node!r} by expert, read {prefix}expert_ids.{layer} into the cache too.")
        own = jnp.asarray(ids)[:, :, None] == jnp.asarray(where["experts"])[:, None]  # [B T n K]
        # by where, not by a product: what is not selected may be infinite
        rest = value[:, :, None]
        value = jnp.where(own.reshape(*own.shape, *[1] * (rest.ndim - own.ndim)), rest, 0).sum(3).astype(value.dtype)
        where = {axis: s for axis, s in where.items() if axis != "experts"}
    for what, numbers in where.items():
        axis = kind.axis(what)
        assert axis is not None
        size = value.shape[axis]
        if isinstance(numbers, tuple) and not all(-size <= n < size for n in numbers):
            raise MoejaxError(f"{what}={list(numbers)}: {node!r} of the cache has {size}.")
        value = jnp.take(value, jnp.asarray(numbers), axis=axis)
    return value


def edited(
    edit: Edit,
    x: Float[Array, "..."],
    positions: Int[Array, "B T"] | None,
    ids: Int[Array, "B T K"] | None,
) -> Float[Array, "..."]:
    """Return ``x``, the value at the edit's node, changed where the edit selects.

    Args:
        positions: the number of each token in its sequence, :data:`NOWHERE` at padding; ``None`` without padding.
        ids: the expert of each routed slot, for nodes that have slots.
    """
    kind = NODES[edit.node]
    value = edit.value.reshape(*[1] * (x.ndim - edit.value.ndim), *edit.value.shape)
    mask: Bool[Array, "..."] | None = None
    # tokens first: a value by token and slot is brought to its tokens before their slots are looked up
    for what in (axis for axis in AXES if axis in edit.where):
        axis, wanted = kind.axis(what), jnp.asarray(edit.where[what], jnp.int32)
        assert axis is not None
        labels, axes = jnp.arange(x.shape[axis]), (axis,)
        if what == "tokens":
            if positions is not None:
                labels, axes = positions, (0, axis)
            length = labels.max(-1, keepdims=True)[..., None] + 1
            wanted = jnp.where(wanted < 0, wanted + length, wanted)
        elif kind.axes[axis] == "K":
            assert ids is not None, f"pass the experts' ids to the node {edit.node}"
            labels, axes = ids, (0, 1, axis)
        same = labels[..., None] == wanted

        def aligned(a, axes=axes):
            return a.reshape([n if i in axes else 1 for i, n in _sizes(a, axes, x.ndim)])

        hit = aligned(same.any(-1))
        mask = hit if mask is None else mask & hit
        if value.shape[axis] > 1:
            value = _entries(value, aligned(same.argmax(-1)), axis)
    changed = HOW_TO_EDIT[edit.how](x, value)
    return changed if mask is None else jnp.where(mask, changed, x)


def _sizes(a: Array, axes: tuple[int, ...], ndim: int) -> list[tuple[int, int]]:
    """For each of ``ndim`` axes its number and the size that ``a``, whose axes are ``axes`` of these, has there."""
    sizes = dict(zip(axes, a.shape, strict=True))
    return [(i, sizes.get(i, 1)) for i in range(ndim)]


def _entries(value: Float[Array, "..."], number: Int[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The entry of ``value`` along ``axis`` that ``number`` names; all other axes broadcast."""

    def one(shape, size):
        return (*shape[:axis], size, *shape[axis + 1 :])

    shape = jnp.broadcast_shapes(one(value.shape, 1), one(number.shape, 1))
    value = jnp.broadcast_to(value, one(shape, value.shape[axis]))
    return jnp.take_along_axis(value, jnp.broadcast_to(number, one(shape, number.shape[axis])), axis=axis)
