"""From headers to a plan: where every leaf of the decoder comes from, decided and checked before a byte is read."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moejax.checkpoints.safetensors import Entry, SafetensorsFolder, TensorSource
from moejax.errors import CheckpointError
from moejax.models import Decoder
from moejax.models.keys import Index, KeyTable, Layout
from moejax.ops.mxfp4 import BLOCK, MXFP4

_LISTED = 8
_SLICE = 4 << 20
"""Values that are looked at together."""


@dataclass(frozen=True)
class LeafPlan:
    """One leaf: its path, its shape and dtype, and the layout in which the source has it."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    layout: Layout

    def read(self, source: TensorSource, dtype: DTypeLike | None, index: Index | None = None) -> np.ndarray:
        """Assemble the leaf in ``dtype``, or in its tensors' own; of ``index``, its part (:meth:`Layout.part`)."""
        if index is None:
            leaf = self.layout.assemble([source.read(key) for key, _ in self.layout.tensors], self.shape)
        else:
            leaf = self.layout.part(source.read, self.shape, index)
        return leaf if dtype is None or self.is_packed else leaf.astype(dtype)

    @property
    def keys(self) -> list[str]:
        """Of the tensors that hold the leaf."""
        return [key for key, _ in self.layout.tensors]

    @property
    def is_packed(self) -> bool:
        """Whether the leaf is a code, not values: no other dtype means anything."""
        return self.dtype == np.uint8

    def copy(self, source: SafetensorsFolder, dtype: DTypeLike | None, bad: dict[str, int] | None = None) -> np.ndarray:
        """As :meth:`read`, but nothing of the files stays mapped.

        Memory for the leaf and a few MiB, and, of tensors that are cut into groups, for one of them.

        ``bad``, if given, takes the number of values that are not finite, by the tensors' keys.
        """
        dtype = self.dtype if dtype is None or self.is_packed else dtype
        groups, start = self.layout.groups, 0
        data = np.empty((groups, math.prod(self.shape) // groups), dtype)
        for key, shape in self.layout.tensors:
            end = start + math.prod(shape) // groups
            piece = data[0, start:end] if groups == 1 else np.empty(math.prod(shape), dtype)
            source.copy_to(key, piece)
            _note(bad, key, piece)
            if groups > 1:
                data[:, start:end] = piece.reshape(groups, -1)
            start = end
        # one tensor that holds the concatenated data is laid out as its parts would be
        return self.layout.assemble([data], self.shape)


@dataclass(frozen=True)
class PackedPlan:
    """A leaf whose values the source has packed: the plans of blocks and scales (:class:`moejax.ops.mxfp4.MXFP4`)."""

    path: str
    shape: tuple[int, ...]
    blocks: LeafPlan
    scales: LeafPlan
    dtype: np.dtype = np.dtype(jnp.bfloat16)

    def copy(self, source: SafetensorsFolder, dtype: DTypeLike | None, bad: dict[str, int] | None = None) -> np.ndarray:
        """As :meth:`LeafPlan.copy`."""
        blocks, scales = (plan.copy(source, None) for plan in (self.blocks, self.scales))
        leaf = np.empty(self.shape, self.dtype if dtype is None else dtype)
        # one expert at a time: what is unpacked is four times as large
        for out, *packed in zip(leaf, blocks, scales, strict=True):
            out[...] = unpack(MXFP4(*map(jnp.asarray, packed)), leaf.dtype)
        _note(bad, self.blocks.keys[0], leaf)
        return leaf

    @property
    def keys(self) -> list[str]:
        """Of the tensors that hold the leaf."""
        return self.blocks.keys + self.scales.keys


unpack = jax.jit(MXFP4.unpack, static_argnums=1)


def _note(bad: dict[str, int] | None, key: str, values: np.ndarray) -> None:
    if bad is not None and (count := count_nonfinite(values)):
        bad[key] = count


def count_nonfinite(values: np.ndarray) -> int:
    """How many of the floats are NaN or infinite, looking at a few MiB at a time."""
    flat = values.reshape(-1) if values.ndim < 2 or values.flags.c_contiguous else None
    if flat is None:
        return sum(count_nonfinite(row) for row in values)
    return sum(_count(flat[i : i + _SLICE]) for i in range(0, flat.size, _SLICE))


def _count(values: np.ndarray) -> int:
    if values.dtype.itemsize != 2:
        return values.size - int(np.count_nonzero(np.isfinite(values)))
    # all ones in the exponent; three times as fast as asking a type that numpy does not know
    mask = np.uint16(0x7C00 if values.dtype == np.float16 else 0x7F80)
    return int(np.count_nonzero((values.view(np.uint16) & mask) == mask))


def leaf_paths(tree: Any) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf of a decoder's tree, in the tree's order."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def part_of(path: str) -> str:
    """The part that a leaf is read and written with: ``embedding``, one of ``layers.N``, or ``output``."""
    first, *rest = path.split(".")
    return f"layers.{rest[0]}" if first == "layers" else first if first == "embedding" else "output"


def parts(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths of each part, in order."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(part_of(path), []).append(path)
    return found


def make_plan(abstract: Decoder, table: KeyTable, entries: Mapping[str, Entry]) -> list[LeafPlan | PackedPlan]:
    """A plan for every leaf of ``abstract``, in the tree's order.

    Raises:
        CheckpointError: keys are missing, unused or misshapen, or no floats; all of them are named together.
    """
    problems: list[str] = []

    def plan_leaf(path: str, leaf: jax.ShapeDtypeStruct) -> LeafPlan:
        layout = _choose(path, leaf.shape, table, entries)
        wrong = _problems(layout, entries, floats=jnp.issubdtype(leaf.dtype, jnp.floating))
        problems.extend(wrong)
        return LeafPlan(path, leaf.shape, leaf.dtype if wrong else entries[layout.tensors[0][0]].dtype, layout)

    def plan(path: str, leaf: jax.ShapeDtypeStruct) -> LeafPlan | PackedPlan:
        if not _holds(path, leaf, table, entries):
            rows = (*leaf.shape[:-1], leaf.shape[-1] // BLOCK)
            blocks = jax.ShapeDtypeStruct((*rows, BLOCK // 2), jnp.uint8)
            if _holds(f"{path}.blocks", blocks, table, entries):
                scales = jax.ShapeDtypeStruct(rows, jnp.uint8)
                packed = plan_leaf(f"{path}.blocks", blocks), plan_leaf(f"{path}.scales", scales)
                return PackedPlan(path, leaf.shape, *packed)
        return plan_leaf(path, leaf)

    plans = [plan(path, leaf) for path, leaf in leaf_paths(abstract)]
    used = {key for plan in plans for key in plan.keys}
    problems += [f"unused {key} {list(entries[key].shape)}" for key in entries if key not in used]
    report(problems, "the checkpoint does not fit its config")
    return plans


def _holds(path: str, leaf: jax.ShapeDtypeStruct, table: KeyTable, entries: Mapping[str, Entry]) -> bool:
    """Whether the checkpoint holds a tensor of any layout of the leaf."""
    known = _entry_name(path) in table
    return known and any(key in entries for layout in layouts(table, path, leaf.shape) for key, _ in layout.tensors)


def report(problems: list[str], what: str) -> None:
    """Raise ``CheckpointError`` if there are problems, naming the first of them and how many more there are."""
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(f"{what}: {'; '.join(problems[:_LISTED])}{more}.")


def _problems(layout: Layout, entries: Mapping[str, Entry], floats: bool) -> list[str]:
    found = []
    for key, shape in layout.tensors:
        if key not in entries:
            found.append(f"missing {key} {list(shape)}")
        elif entries[key].shape != shape:
            found.append(f"misshapen {key}: the file has {list(entries[key].shape)}, the config wants {list(shape)}")
        elif jnp.issubdtype(entries[key].dtype, jnp.floating) != floats:
            found.append(f"mistyped {key}: {entries[key].dtype} are no weights here")
    if found:
        return found
    first = layout.tensors[0][0]
    return [
        f"dtype of {key} is {entries[key].dtype}, that of {first} is {entries[first].dtype}"
        for key, _ in layout.tensors
        if entries[key].dtype != entries[first].dtype
    ]


def layouts(table: KeyTable, path: str, shape: tuple[int, ...]) -> list[Layout]:
    """The layouts in which a leaf may be published."""
    layer = path.split(".")[1] if path.startswith("layers.") else ""
    return [source(shape).in_layer(layer) for source in table[_entry_name(path)]]


def _entry_name(path: str) -> str:
    """The name of a leaf's entry in a key table."""
    first, _, rest = path.partition(".")
    return f"layers.{{layer}}.{rest.partition('.')[2]}" if first == "layers" else path


def _choose(path: str, shape: tuple[int, ...], table: KeyTable, entries: Mapping[str, Entry]) -> Layout:
    """The first layout that the checkpoint holds a part of, else the last."""
    choices = layouts(table, path, shape)
    return next((choice for choice in choices if any(key in entries for key, _ in choice.tensors)), choices[-1])
