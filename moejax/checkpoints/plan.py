"""Plans for loading: which tensors make up each leaf of the decoder, checked before any data is read."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moejax.checkpoints.safetensors import Entry, SafetensorsFolder, TensorSource
from moejax.errors import CheckpointError
from moejax.models import Decoder, Family
from moejax.models.config import split_path
from moejax.models.keys import Index, KeyTable, Layout
from moejax.ops.mxfp4 import BLOCK, MXFP4

_LISTED = 8
"""The most problems that one error message lists."""

_MOST = 10_000
"""The number of problems at which a plan is given up, since a config may claim any number of experts."""

_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Keys of tensors that older checkpoints hold although they are computed from the config."""

_SLICE = 4 << 20
"""The number of values that are tested for NaN and infinity together."""


@dataclass(frozen=True)
class LeafPlan:
    """How to read one leaf.

    Attributes:
        path: the leaf's path in the decoder.
        shape: the leaf's shape.
        dtype: the dtype of its tensors; of several dtypes, the narrowest that holds the values of all.
        layout: the layout in which the source has it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    layout: Layout

    def read(self, source: TensorSource, dtype: DTypeLike | None, index: Index | None = None) -> np.ndarray:
        """Assemble the leaf from its tensors.

        Args:
            source: the tensors.
            dtype: cast the leaf to it; by default it keeps the dtype of its tensors.
            index: a slice for each axis, if only that part of the leaf is needed (:meth:`Layout.part`).
        """

        def read(key: str) -> np.ndarray:
            return source.read(key).astype(self.dtype, copy=False)

        if index is None:
            leaf = self.layout.assemble([read(key) for key, _ in self.layout.tensors], self.shape)
        else:
            leaf = self.layout.part(read, self.shape, index)
        return leaf if dtype is None or self.is_packed else leaf.astype(dtype)

    @property
    def keys(self) -> list[str]:
        """The keys of the tensors that hold the leaf."""
        return [key for key, _ in self.layout.tensors]

    @property
    def is_packed(self) -> bool:
        """True if the leaf holds the codes of MXFP4, not values, so that it must not be cast to another dtype."""
        return self.dtype == np.uint8

    def copy(self, source: SafetensorsFolder, dtype: DTypeLike | None, bad: dict[str, int] | None = None) -> np.ndarray:
        """Assemble the leaf as :meth:`read` does, but with copies, so that nothing of the files stays mapped.

        This takes memory for the leaf and a few MiB, and for one more tensor if the layout cuts tensors into groups.

        Args:
            source: the files.
            dtype: cast the leaf to it; by default it keeps the dtype of its tensors.
            bad: if given, the number of NaN and infinite values is written under the key of each tensor that has any.
        """
        dtype = self.dtype if dtype is None or self.is_packed else dtype
        groups, start = self.layout.groups, 0
        data = np.empty((groups, math.prod(self.shape) // groups), dtype)
        for key, shape in self.layout.tensors:
            end = start + math.prod(shape) // groups
            piece = data[0, start:end] if groups == 1 else np.empty(math.prod(shape), dtype)
            source.copy_to(key, piece)
            _record(bad, key, piece)
            if groups > 1:
                data[:, start:end] = piece.reshape(groups, -1)
            start = end
        # the layout treats one tensor that holds the concatenated data like the separate tensors
        return self.layout.assemble([data], self.shape)


@dataclass(frozen=True)
class PackedPlan:
    """How to read one leaf that the source has as MXFP4 (:class:`moejax.ops.mxfp4.MXFP4`).

    Attributes:
        path: the leaf's path in the decoder.
        shape: the shape of its unpacked values.
        blocks: how to read the blocks of four-bit codes.
        scales: how to read the scales.
        dtype: the dtype of the unpacked values, unless another is asked for.
    """

    path: str
    shape: tuple[int, ...]
    blocks: LeafPlan
    scales: LeafPlan
    dtype: np.dtype = np.dtype(jnp.bfloat16)

    def copy(self, source: SafetensorsFolder, dtype: DTypeLike | None, bad: dict[str, int] | None = None) -> np.ndarray:
        """Assemble and unpack the leaf; the arguments are as in :meth:`LeafPlan.copy`."""
        blocks, scales = (plan.copy(source, None) for plan in (self.blocks, self.scales))
        leaf = np.empty(self.shape, self.dtype if dtype is None else dtype)
        # one expert at a time, since unpacked values take four times the memory
        for out, *packed in zip(leaf, blocks, scales, strict=True):
            out[...] = unpack(MXFP4(*map(jnp.asarray, packed)), leaf.dtype)
        _record(bad, self.blocks.keys[0], leaf)
        return leaf

    @property
    def keys(self) -> list[str]:
        """The keys of the tensors that hold the leaf."""
        return self.blocks.keys + self.scales.keys


unpack = jax.jit(MXFP4.unpack, static_argnums=1)


def _record(bad: dict[str, int] | None, key: str, values: np.ndarray) -> None:
    """Write the number of NaN and infinite values under ``key``, if there are any."""
    if bad is not None and (count := count_nonfinite(values)):
        bad[key] = count


def count_nonfinite(values: np.ndarray) -> int:
    """Count the NaN and infinite values, testing a few MiB at a time."""
    flat = values.reshape(-1) if values.ndim < 2 or values.flags.c_contiguous else None
    if flat is None:
        return sum(count_nonfinite(row) for row in values)
    return sum(_count(flat[i : i + _SLICE]) for i in range(0, flat.size, _SLICE))


def _count(values: np.ndarray) -> int:
    """Count the NaN and infinite values of an array, all at once."""
    if values.dtype.itemsize != 2:
        return values.size - int(np.count_nonzero(np.isfinite(values)))
    # a value is not finite if all bits of its exponent are ones; for bfloat16, which is not one of NumPy's own dtypes,
    # this is three times as fast as numpy.isfinite
    mask = np.uint16(0x7C00 if values.dtype == np.float16 else 0x7F80)
    return int(np.count_nonzero((values.view(np.uint16) & mask) == mask))


def leaf_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every leaf of a decoder's tree, in the tree's order.

    ``is_leaf`` tells of what else is to be yielded as a whole, such as packed matrices.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def part_of(path: str) -> str:
    """Return the part that a leaf is read and written with: ``embedding``, one of ``layers.N``, or ``output``."""
    first, *rest = path.split(".")
    return f"layers.{rest[0]}" if first == "layers" else first if first == "embedding" else "output"


def parts(paths: Iterable[str]) -> dict[str, list[str]]:
    """Group paths by their part (:func:`part_of`), in the order given."""
    grouped: dict[str, list[str]] = {}
    for path in paths:
        grouped.setdefault(part_of(path), []).append(path)
    return grouped


def make_plan(abstract: Decoder, kind: Family, entries: Mapping[str, Entry]) -> list[LeafPlan | PackedPlan]:
    """Plan how to read every leaf of a decoder.

    Args:
        abstract: the decoder, with ``jax.ShapeDtypeStruct`` leaves.
        kind: its family, with the key table.
        entries: shape and dtype of every tensor of the checkpoint.

    Returns:
        One plan for each leaf, in the tree's order.

    Raises:
        CheckpointError: tensors are missing, unused, misshapen or not floats; one error names all of them.
    """
    problems: list[str] = []
    table = kind.keys
    _check_layers(abstract, table, entries)

    def plan_leaf(path: str, leaf: jax.ShapeDtypeStruct) -> LeafPlan:
        layout = _choose(path, leaf.shape, table, entries)
        wrong = _problems(layout, entries, floats=jnp.issubdtype(leaf.dtype, jnp.floating))
        problems.extend(wrong)
        if len(problems) >= _MOST:
            report(problems, _MISFIT)
        dtypes = [leaf.dtype] if wrong else [entries[key].dtype for key, _ in layout.tensors]
        return LeafPlan(path, leaf.shape, reduce(jnp.promote_types, dtypes), layout)

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
    ignored = _ignored(abstract, table)
    unused = [key for key in entries if key not in used and not (key in ignored or _COMPUTED.search(key))]
    further = {key for key in unused if kind.leaves_out(key, abstract.config.num_layers)}
    unused = [key for key in unused if key not in further]
    problems += [f"unused {key} {list(entries[key].shape)}" for key in unused]
    report(problems, _MISFIT)
    if further:
        size = sum(entries[key].nbytes for key in further) / 2**30
        warnings.warn(
            f"{len(further)} tensors ({size:.2f} GiB) such as {min(further)} are no part of the language model and are "
            "left out; what is exported lacks them.",
            stacklevel=2,
        )
    return plans


_MISFIT = "the checkpoint does not fit its config"


def _check_layers(abstract: Decoder, table: KeyTable, entries: Mapping[str, Entry]) -> None:
    """Raise ``CheckpointError`` if the checkpoint holds nothing of a layer, before a plan is made of all that lacks."""
    held, count = set[int](), abstract.config.num_layers
    for path, leaf in leaf_paths(abstract):
        layer, _ = split_path(path)
        if layer is None or layer in held:
            continue
        if layer > len(held):
            break
        if _holds(path, leaf, table, entries) or _holds(f"{path}.blocks", leaf, table, entries):
            held.add(layer)
    if 0 < len(held) < count:
        raise CheckpointError(f"{_MISFIT}: num_hidden_layers={count}, but there is no tensor of layer {len(held)}.")


def _ignored(abstract: Decoder, table: KeyTable) -> set[str]:
    """The keys of tensors that a checkpoint may hold beside the leaves: a tied head (:mod:`.tied_head`)."""
    if not abstract.config.tied or "head" not in table:
        return set()
    return set(leaf_keys(table, "head", (abstract.config.vocab_size, abstract.config.model_dim)))


def _holds(path: str, leaf: jax.ShapeDtypeStruct, table: KeyTable, entries: Mapping[str, Entry]) -> bool:
    """Return whether the checkpoint holds a tensor of any layout of the leaf."""
    known = _in_table(path)[0] in table
    return known and any(key in entries for key in leaf_keys(table, path, leaf.shape))


def report(problems: list[str], what: str) -> None:
    """Raise ``CheckpointError`` if there are problems: it lists the first of them and counts the rest."""
    if problems:
        least = "at least " if len(problems) >= _MOST else ""
        more = f"; and {least}{len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(f"{what}: {'; '.join(problems[:_LISTED])}{more}.")


def _problems(layout: Layout, entries: Mapping[str, Entry], floats: bool) -> list[str]:
    """Describe what is wrong with a leaf's tensors; ``floats`` tells whether they must be floats or must not be."""
    problems = []
    for key, shape in layout.tensors:
        if len(problems) >= _MOST:
            break
        if key not in entries:
            problems.append(f"missing {key} {list(shape)}")
            continue
        got = entries[key]
        if got.shape != shape:
            problems.append(f"misshapen {key}: the file has {list(got.shape)}, the config wants {list(shape)}")
        elif not (jnp.issubdtype(got.dtype, jnp.floating) if floats else got.dtype == np.uint8):
            problems.append(f"mistyped {key}: {got.dtype} instead of {'a float' if floats else 'uint8'}")
    return problems


def layouts(table: KeyTable, path: str, shape: tuple[int, ...]) -> list[Layout]:
    """Return the layouts in which a leaf of ``shape`` may be published, with the preferred one last.

    Raises:
        CheckpointError: the family's key table has no entry for the leaf.
    """
    template, layer = _in_table(path)
    if template not in table:
        raise CheckpointError(f"the family's key table has no entry for the leaf {template!r}.")
    return [source(shape).in_layer(layer) for source in table[template]]


def leaf_keys(table: KeyTable, path: str, shape: tuple[int, ...]) -> list[str]:
    """Return the keys of a leaf's tensors in every layout (:func:`layouts`)."""
    return [key for layout in layouts(table, path, shape) for key, _ in layout.tensors]


def _in_table(path: str) -> tuple[str, str]:
    """Return a leaf's name in a key table and its layer's index, empty for a leaf that is in no layer.

    ``"layers.7.attention.output.weight"`` gives ``("layers.{layer}.attention.output.weight", "7")``.
    """
    layer, rest = split_path(path)
    return (path, "") if layer is None else (f"layers.{{layer}}.{rest}", str(layer))


def _choose(path: str, shape: tuple[int, ...], table: KeyTable, entries: Mapping[str, Entry]) -> Layout:
    """Return the first layout with a tensor that the checkpoint holds, or the preferred layout if there is none."""
    choices = layouts(table, path, shape)
    return next((choice for choice in choices if any(key in entries for key, _ in choice.tensors)), choices[-1])
