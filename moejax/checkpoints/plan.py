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
    def is_packed(self) -> bool:
        """Whether the leaf is a code, not values: no other dtype means anything."""
        return self.dtype == np.uint8

    def copy(self, source: SafetensorsFolder, dtype: DTypeLike | None, bad: dict[str, int] | None = None) -> np.ndarray:
        """As :meth:`read`, but nothing of the files stays mapped: memory for the leaf and a few MiB, no more.

        ``bad``, if given, takes the number of values that are not finite, by the tensors' keys.
        """
        dtype = dtype or self.dtype
        if self.layout.decode is not None:
            parts = [np.empty(shape, source.entries[key].dtype) for key, shape in self.layout.tensors]
            for (key, _), part in zip(self.layout.tensors, parts, strict=True):
                source.copy_to(key, part.reshape(-1))
            leaf = self.layout.assemble(parts, self.shape).astype(dtype, copy=False)
            _note(bad, self.layout.tensors[0][0], leaf)
            return leaf
        flat, start = np.empty(math.prod(self.shape), dtype), 0
        for key, shape in self.layout.tensors:
            piece = flat[start : start + math.prod(shape)]
            source.copy_to(key, piece)
            _note(bad, key, piece)
            start += piece.size
        # one tensor that holds the concatenated data is laid out as its parts would be
        return self.layout.assemble([flat], self.shape)


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


def make_plan(abstract: Decoder, table: KeyTable, entries: Mapping[str, Entry]) -> list[LeafPlan]:
    """A plan for every leaf of ``abstract``, in the tree's order.

    Raises:
        CheckpointError: keys are missing, unused or misshapen, or no floats; all of them are named together.
    """
    plans, problems, used = [], [], set()
    for path, leaf in leaf_paths(abstract):
        layout = _choose(path, leaf.shape, table, entries)
        used |= {key for key, _ in layout.tensors}
        wrong = _problems(layout, entries, floats=jnp.issubdtype(leaf.dtype, jnp.floating))
        problems += wrong
        if not wrong:
            plans.append(LeafPlan(path, leaf.shape, _leaf_dtype(layout, entries), layout))
    problems += [f"unused {key} {list(entries[key].shape)}" for key in entries if key not in used]
    report(problems, "the checkpoint does not fit its config")
    return plans


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
        elif jnp.issubdtype(entries[key].dtype, jnp.floating) != (floats and layout.decode is None):
            found.append(f"mistyped {key}: {entries[key].dtype} are no weights here")
    if found or layout.decode is not None:
        return found
    first = layout.tensors[0][0]
    return [
        f"dtype of {key} is {entries[key].dtype}, that of {first} is {entries[first].dtype}"
        for key, _ in layout.tensors
        if entries[key].dtype != entries[first].dtype
    ]


def _leaf_dtype(layout: Layout, entries: Mapping[str, Entry]) -> np.dtype:
    if layout.decode is None:
        return entries[layout.tensors[0][0]].dtype
    # an empty block says in which dtype values are decoded
    return layout.decode([np.zeros((0, *shape[1:]), entries[key].dtype) for key, shape in layout.tensors]).dtype


def layouts(table: KeyTable, path: str, shape: tuple[int, ...]) -> list[Layout]:
    """The layouts in which a leaf may be published."""
    parts = path.split(".")
    layer = parts[1] if parts[0] == "layers" else ""
    sources = table[path.replace(f"layers.{layer}.", "layers.{layer}.", 1) if layer else path]
    return [source(shape).in_layer(layer) for source in sources]


def _choose(path: str, shape: tuple[int, ...], table: KeyTable, entries: Mapping[str, Entry]) -> Layout:
    """The first layout that the checkpoint holds a part of, else the last."""
    choices = layouts(table, path, shape)
    return next((choice for choice in choices if any(key in entries for key, _ in choice.tensors)), choices[-1])
