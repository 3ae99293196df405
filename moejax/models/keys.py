"""Key tables: which tensors of a published checkpoint hold which leaf of the decoder.

A leaf is the concatenation of its tensors' data in the order given, whole or group of heads by group, seen in a shape
of which the leaf is a transpose. So one table serves reading and writing. A leaf ``PATH`` that may be published as
MXFP4 has two more entries, ``PATH.blocks`` and ``PATH.scales``, under which a decoder that keeps it packed has its
leaves.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """How one leaf is published.

    Attributes:
        tensors: key and shape of each tensor, in order.
        axes: the leaf's axes in the order in which the concatenated data has them; ``None`` keeps them.
        groups: into how many equal parts each tensor is cut; the data has the first of each, then the second and so on.
    """

    tensors: Sequence[tuple[str, Shape]]
    axes: tuple[int, ...] | None = None
    groups: int = 1

    def in_layer(self, layer: str) -> "Layout":
        """The layout with ``{layer}`` filled in."""
        tensors = [(key.replace("{layer}", layer), shape) for key, shape in self.tensors]
        return replace(self, tensors=tensors)

    def assemble(self, parts: list[np.ndarray], shape: Shape) -> np.ndarray:
        """The leaf of ``shape`` from its tensors."""
        data = _concatenate(parts, self.groups)
        if self.axes is None:
            return data.reshape(shape)
        return data.reshape([shape[i] for i in self.axes]).transpose(np.argsort(self.axes))

    def part(self, read: Callable[[str], np.ndarray], shape: Shape, index: Index) -> np.ndarray:
        """The part ``index`` of the leaf of ``shape``.

        Of one tensor it is a view, so that no more of a mapped file is read. Of one tensor for each entry of the
        leading axes, only those in the index are read, and of them only the slice; of tensors cut into groups, only the
        groups in the index. Any other layout is assembled whole.

        Args:
            read: gives a tensor by its key.
            shape: of the leaf.
            index: a slice for each axis, none of them empty.
        """
        if self.groups > 1:
            parts = [read(key).reshape(self.groups, -1)[index[0]] for key, _ in self.tensors]
            return _concatenate(parts, len(parts[0])).reshape(-1, *shape[1:])[:, *index[1:]]
        size = tuple(len(range(n)[s]) for n, s in zip(shape, index, strict=True))
        inner = self.tensors[0][1]
        outer = len(shape) - len(inner)
        if len(self.tensors) == 1 or self.axes is not None or inner != shape[outer:]:
            return self.assemble([read(key) for key, _ in self.tensors], shape)[index]
        keys = np.array([key for key, _ in self.tensors], object).reshape(shape[:outer])[index[:outer]]
        parts = (read(key)[index[outer:]] for key in keys.flat)
        first = next(parts)
        out = np.empty((keys.size, *first.shape), first.dtype)
        for row, part in zip(out, itertools.chain([first], parts), strict=True):
            row[...] = part
        return out.reshape(size)

    def split(self, leaf: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of a leaf: the inverse of :meth:`assemble`."""
        data = (leaf if self.axes is None else leaf.transpose(self.axes)).reshape(self.groups, -1)
        ends = np.cumsum([math.prod(shape) // self.groups for _, shape in self.tensors])
        pieces = np.split(data, ends[:-1], axis=1)
        return {key: piece.reshape(shape) for piece, (key, shape) in zip(pieces, self.tensors, strict=True)}


def _concatenate(parts: list[np.ndarray], groups: int) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate([part.reshape(groups, -1) for part in parts], axis=1)


Source = Callable[[Shape], Layout]
"""From a leaf's shape to a layout in which it may be published."""

KeyTable = Mapping[str, Sequence[Source]]
"""From a leaf's path (``{layer}`` stands for the index) to the layouts in which it is published, preferred last."""


def whole(key: str) -> Source:
    """One tensor of the leaf's own shape."""
    return lambda shape: Layout([(key, shape)])


def merged_halves(key: str) -> Source:
    """One tensor ``[.., 2F, D]`` for a leaf ``[.., 2, F, D]``: one half after the other."""
    return lambda shape: Layout([(key, (*shape[:-3], shape[-3] * shape[-2], shape[-1]))])


def stacked(*keys: str) -> Source:
    """One tensor for each entry of the leaf's first axis."""
    return lambda shape: Layout([(key, shape[1:]) for key in keys])


def per_expert(*keys: str) -> Source:
    """One tensor for each expert and key; with several keys the leaf's second axis counts them."""
    inner = 2 if len(keys) > 1 else 1

    def layout(shape: Shape) -> Layout:
        return Layout([(key.replace("{expert}", str(e)), shape[inner:]) for e in range(shape[0]) for key in keys])

    return layout


def grouped_heads(query: str, key: str, value: str) -> Source:
    """Three tensors of heads' rows for a leaf ``[G, R + 2, C, ..]``: each group's queries, then its key and value."""

    def layout(shape: Shape) -> Layout:
        groups, heads, width, *rest = shape
        sizes = (query, heads - 2), (key, 1), (value, 1)
        return Layout([(name, (groups * n * width, *rest)) for name, n in sizes], groups=groups)

    return layout


def transposed(key: str) -> Source:
    """One tensor ``[E, D, F]`` for a leaf ``[E, F, D]``."""
    return lambda shape: Layout([(key, (shape[0], shape[2], shape[1]))], axes=(0, 2, 1))


def interleaved(key: str) -> Source:
    """One tensor ``[E, D, 2F]`` for a leaf ``[E, 2, F, D]``: halves alternate."""
    return lambda shape: Layout([(key, (shape[0], shape[3], shape[1] * shape[2]))], axes=(0, 3, 2, 1))


def interleaved_rows(key: str) -> Source:
    """One tensor ``[E, 2F, ..]`` for a leaf ``[E, 2, F, ..]``: halves alternate."""

    def layout(shape: Shape) -> Layout:
        experts, halves, rows, *rest = shape
        return Layout([(key, (experts, halves * rows, *rest))], axes=(0, 2, 1, *range(3, len(shape))))

    return layout
