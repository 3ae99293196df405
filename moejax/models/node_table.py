"""Which nodes a model has: their names and shapes, the names that a pattern means, and edits that fit them."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from moejax.errors import MoejaxError, PromptError
from moejax.models.config import Config
from moejax.rules import NODES, Edits
from moejax.rules.edits import AXES, Edit
from moejax.rules.nodes import NodeKind


@dataclass(frozen=True)
class Node:
    """One kind of node of a model.

    Attributes:
        name: its name without a layer; ``"stream"`` as a pattern means ``"stream.0"``, ``"stream.1"`` and so on.
        layers: the layers that have it.
        shape: letters of its axes (docs/glossary.md).
        sizes: sizes of the axes but B, T and S, by letter, in the first layer that has it.
        meaning: what stands there.
    """

    name: str
    layers: tuple[int, ...]
    shape: str
    sizes: dict[str, int]
    meaning: str


class NodeTable(tuple[Node, ...]):
    """The nodes of a model; shown as a table."""

    @property
    def names(self) -> list[str]:
        """Every node's full name, such as ``"stream.3"``."""
        return [f"{node.name}.{layer}" for node in self for layer in node.layers]

    def __repr__(self) -> str:
        rows = [("node", "shape", "meaning")]
        for node in self:
            shape = " ".join(f"{a}={node.sizes[a]}" if a in node.sizes else a for a in node.shape.split())
            rows.append((f"{node.name}.{_ranges(node.layers)}", f"[{shape}]", node.meaning))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:2]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def nodes(model: Any) -> NodeTable:
    """List the nodes of a model: what ``lm.run_with_cache`` reads and :class:`moejax.Edits` change.

    Args:
        model: an ``LM``, a decoder, or a configuration.
    """
    config: Config = getattr(model, "config", model)
    found = []
    for name, kind in NODES.items():
        layers = _layers(config, name)
        if layers:
            sizes = _sizes(config, kind, layers[0])
            own = {letter: sizes[letter] for letter in kind.axes if letter in sizes}
            found.append(Node(name, layers, kind.letters, own, kind.meaning))
    return NodeTable(found)


def node_names(config: Config, wanted: str | Iterable[str]) -> tuple[str, ...]:
    """Return the full names that names and patterns mean, without repetition.

    Args:
        wanted: full names (``"stream.3"``), names for all layers (``"stream"``), or patterns (``"*.3"``).

    Raises:
        PromptError: the model has no such node.
    """
    known, out = nodes(config).names, {}
    for name in [wanted] if isinstance(wanted, str) else wanted:
        found = [n for n in known if n == name or n.rpartition(".")[0] == name or fnmatchcase(n, name)]
        if not found:
            raise PromptError(unknown_node(config, name))
        out |= dict.fromkeys(found)
    return tuple(out)


def unknown_node(config: Config, name: str) -> str:
    """Say in one line that a model has no such node, and which is nearest."""
    table = nodes(config)
    close = difflib.get_close_matches(name, [*table.names, *(node.name for node in table)], n=1, cutoff=0.5)
    nearest = f"do you mean {close[0]!r}? " if close else ""
    return f"there is no node {name!r} in this model; {nearest}moejax.nodes(lm) lists them."


def node_shape(config: Config, node: str, batch: tuple[int, ...], keys: int | None = None) -> tuple[int, ...]:
    """Return the shape of the value at a node.

    Args:
        node: name and layer, as in ``"attention.3"``.
        batch: the shape ``(B, T)`` of the token ids.
        keys: the number S of keys; by default T.

    Raises:
        PromptError: the model has no such node.
    """
    name, _, number = node.rpartition(".")
    if name not in NODES or number not in map(str, _layers(config, name)):
        raise PromptError(unknown_node(config, node))
    kind = NODES[name]
    sizes = {"B": batch[0], "T": batch[1], "S": keys or batch[1], **_sizes(config, kind, int(number))}
    return tuple(sizes[letter] for letter in kind.axes)


def _layers(config: Config, name: str) -> tuple[int, ...]:
    """The layers that have a node."""
    kind, layers = NODES[name], range(config.num_layers)
    if name == "stream":
        return tuple(range(config.num_layers + 1))
    present = [i for i in layers if kind.half is None or getattr(config.blocks[i], kind.half) is not None]
    return tuple(i for i in present if all(_sizes(config, kind, i).get(letter, 1) for letter in kind.axes))


def _sizes(config: Config, kind: NodeKind, layer: int) -> dict[str, int]:
    """Sizes by letter in a layer; zero for what it does not have."""
    # the final norm is behind the last layer
    block = config.blocks[min(layer, config.num_layers - 1)]
    s = block.half(kind.half or "feed_forward").sizes
    counts = {"K": s.num_selected, "R": s.num_router_outputs, "F": s.expert_dim, "U": s.num_shared}
    # a dense layer has no slots, whatever else it counts
    counts = counts if s.num_experts else dict.fromkeys(counts, 0)
    return {"D": config.model_dim, "H": s.num_heads, "C": s.head_dim, **counts}


def _ranges(layers: tuple[int, ...]) -> str:
    """Numbers as people write them: ``0-3,5``."""
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def checked_edits(config: Config, edits: Edits | None, batch: tuple[int, int], *, generates: bool = False) -> Edits:
    """Return ``edits`` with full names of nodes and all axes of their values, if they fit the model and the tokens.

    Args:
        batch: the shape ``(B, T)`` of the token ids; of a generation, T counts prompt and new tokens.
        generates: tokens are added one by one: numbers of tokens count from the first, and what differs by token names
            its tokens.

    Raises:
        MoejaxError: a number out of range, or a value that does not broadcast to what is selected.
        PromptError: the model has no such node.
    """
    if edits is None:
        return Edits()
    if not isinstance(edits, Edits):
        raise MoejaxError(
            f"edits={edits!r}: make them with moejax.Edits().set(..), .add(..), .scale(..) or .patch(..)."
        )
    out = []
    for edit in edits.edits:
        # one name for all layers
        out += [_checked(config, replace(edit, node=n), batch, generates) for n in node_names(config, edit.node)]
    return Edits(tuple(out))


def _checked(config: Config, edit: Edit, batch: tuple[int, int], generates: bool) -> Edit:
    name, shape = edit.node.rpartition(".")[0], node_shape(config, edit.node, batch)
    kind, selected = NODES[name], list(shape)
    for what in AXES:
        if (numbers := edit.where.get(what)) is None:
            continue
        axis = kind.axis(what)
        assert axis is not None
        slots = kind.axes[axis] == "K"
        half = config.blocks[int(edit.node.rpartition(".")[2])].half(kind.half or "feed_forward") if slots else None
        size = shape[axis] if half is None else half.sizes.num_experts
        lowest = -size if what == "tokens" and not generates else 0
        if isinstance(numbers, tuple) and not all(lowest <= n < size for n in numbers):
            raise MoejaxError(f"{what}={list(numbers)}: the edit of {edit.node!r} can name {lowest} to {size - 1}.")
        selected[axis] = len(numbers)
    value = edit.value
    if generates:
        # without numbers it would be for tokens that do not stand side by side
        growing = "S" if "tokens" in edit.where else "TS"
        selected = [1 if letter in growing else n for letter, n in zip(kind.axes, selected, strict=True)]
    own = (*[1] * (len(shape) - value.ndim), *value.shape)
    if len(own) != len(shape) or any(m not in (1, n) for m, n in zip(own, selected, strict=True)):
        hint = "name its tokens (tokens=), or " if generates or "tokens" not in edit.where else ""
        raise MoejaxError(
            f"the edit of {edit.node!r} has a value of shape {list(value.shape)}, which does not broadcast to "
            f"{selected} ([{kind.letters}]): {hint}give another shape."
        )
    return replace(edit, value=value.reshape(own))


def from_first_token(edits: Edits, lengths: Sequence[int]) -> Edits:
    """Return ``edits`` whose numbers of tokens all count from the first, for sequences that will be padded behind.

    Raises:
        MoejaxError: numbers count from the ends of sequences of several lengths.
    """

    def change(edit: Edit) -> Edit:
        tokens = edit.where.get("tokens")
        if tokens is None or np.min(tokens) >= 0:
            return edit
        if len(set(lengths)) > 1:
            raise MoejaxError("negative tokens= of an edit count from sequences' ends, and these differ in length.")
        from_first = tuple(n + lengths[0] if n < 0 else n for n in np.asarray(tokens).tolist())
        return replace(edit, where={**edit.where, "tokens": from_first})

    return edits.map_edits(change)
