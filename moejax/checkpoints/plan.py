"""From headers to a plan: where every leaf of the decoder comes from, decided and checked before a byte is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moejax.checkpoints.safetensors import Entry, TensorSource
from moejax.errors import CheckpointError
from moejax.models import Decoder
from moejax.models.keys import KeyTable, Layout

_LISTED = 8


@dataclass(frozen=True)
class LeafPlan:
    """One leaf: its path, its shape, and the layout in which the source has it."""

    path: str
    shape: tuple[int, ...]
    layout: Layout

    def read(self, source: TensorSource, dtype: DTypeLike | None) -> np.ndarray:
        """Assemble the leaf in ``dtype``, or in its tensors' own."""
        leaf = self.layout.assemble([source.read(key) for key, _ in self.layout.tensors], self.shape)
        return leaf if dtype is None else leaf.astype(dtype)


def leaf_paths(tree: Decoder) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    """Dotted path and abstract value of every leaf, in the tree's order."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def make_plan(abstract: Decoder, table: KeyTable, entries: Mapping[str, Entry]) -> list[LeafPlan]:
    """A plan for every leaf of ``abstract``, in the tree's order.

    Raises:
        CheckpointError: keys are missing, unused or misshapen; all of them are named together.
    """
    plans, problems, used = [], [], set()
    for path, leaf in leaf_paths(abstract):
        layout = _choose(path, leaf.shape, table, entries)
        tensors = layout.tensors
        used |= {key for key, _ in tensors}
        problems += [f"missing {key} {list(shape)}" for key, shape in tensors if key not in entries]
        problems += [
            f"misshapen {key}: the file has {list(entries[key].shape)}, the config wants {list(shape)}"
            for key, shape in tensors
            if key in entries and entries[key].shape != shape
        ]
        if layout.decode is None:
            problems += _dtype_problems([(key, entries[key].dtype) for key, _ in tensors if key in entries])
        plans.append(LeafPlan(path, leaf.shape, layout))
    problems += [f"unused {key} {list(entries[key].shape)}" for key in entries if key not in used]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(f"the checkpoint does not fit its config: {'; '.join(problems[:_LISTED])}{more}.")
    return plans


def _dtype_problems(tensors: Sequence[tuple[str, np.dtype]]) -> list[str]:
    """Tensors that hold no floats, or another kind of float than the first of the same leaf."""
    problems = [f"no floats in {key}: {dtype}" for key, dtype in tensors if not jnp.issubdtype(dtype, jnp.floating)]
    return problems or [
        f"dtype of {key} is {dtype}, that of {tensors[0][0]} is {tensors[0][1]}"
        for key, dtype in tensors
        if dtype != tensors[0][1]
    ]


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
