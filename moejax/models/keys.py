"""Key tables: which tensors of a published checkpoint hold which leaf of the decoder.

A family's table has one line for each leaf: our path on the left, the published key on the right, and between them the
layout, which says how the tensors' data is arranged in the leaf. ``{layer}`` and ``{expert}`` stand for indices:

    KEYS: KeyTable = {
        "norm.weight": [whole("model.norm.weight")],
        "layers.{layer}.attention_norm.weight": [whole("model.layers.{layer}.input_layernorm.weight")],
        "layers.{layer}.feed_forward.down": [per_expert("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight")],
    }

A leaf that is published in several ways has several layouts; the last is the one that is written. The same line serves
reading and writing, since a :class:`Layout` has an inverse. For two experts of width F = 3 in a model of width D = 2:

    >>> down = per_expert("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight")
    >>> leaf = np.arange(12).reshape(2, 2, 3)  # [E, D, F]
    >>> layout = down(leaf.shape).in_layer("7")
    >>> for key, shape in layout.tensors:
    ...     print(key, shape)
    model.layers.7.mlp.experts.0.down_proj.weight (2, 3)
    model.layers.7.mlp.experts.1.down_proj.weight (2, 3)
    >>> tensors = layout.split(leaf)
    >>> tensors["model.layers.7.mlp.experts.1.down_proj.weight"]
    array([[ 6,  7,  8],
           [ 9, 10, 11]])
    >>> np.array_equal(layout.assemble(list(tensors.values()), leaf.shape), leaf)
    True

The layouts, with the shape of the leaf on the left and the shapes of its tensors on the right (``..`` stands for any
further axes; each of G key/value heads serves H / G query heads):

    whole               [..]                   one tensor [..]
    stacked             [n, ..]                n tensors [..], one for each key
    per_expert          [E, ..]                E tensors [..], one for each expert
    per_expert          [E, 2, F, D]           2E tensors [F, D], with two keys
    merged_halves       [.., 2, F, D]          one tensor [.., 2F, D]
    grouped_heads       [G, H / G + 2, C, ..]  three tensors, [H * C, ..] and twice [G * C, ..]
    merged_grouped_heads  the same leaf        one tensor [(H + 2 G) * C, ..]
    merged_heads        [H, C, ..]             one tensor [H * C, ..]
    with_unit_axis      [..]                   one tensor [1, ..]
    transposed          [E, F, D]              one tensor [E, D, F]
    interleaved         [E, 2, F, D]           one tensor [E, D, 2F]
    interleaved_rows    [E, 2, F, ..]          one tensor [E, 2F, ..]

A leaf ``PATH`` that may be published as MXFP4 has two more lines, ``PATH.blocks`` and ``PATH.scales``. A decoder that
keeps the leaf as MXFP4 has its leaves under these paths.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

Shape = tuple[int, ...]
"""The sizes of a leaf's or a tensor's axes."""

Index = tuple[slice, ...]
"""A slice for each axis of a leaf."""


@dataclass(frozen=True)
class Layout:
    """How the data of one leaf is arranged in the tensors of a published checkpoint.

    The data of the tensors is concatenated in the order given. If ``groups`` is more than one, each tensor is first cut
    into so many equal pieces, and the data has the first piece of every tensor, then the second, and so on. The data,
    reshaped to the leaf's axes in the order ``axes``, is a transpose of the leaf.

    :meth:`assemble` makes the leaf from its tensors, and :meth:`split` is its inverse:

        >>> layout = Layout([("query", (4,)), ("key", (2,))], groups=2)
        >>> leaf = layout.assemble([np.array([0, 1, 2, 3]), np.array([8, 9])], (2, 3))
        >>> leaf
        array([[0, 1, 8],
               [2, 3, 9]])
        >>> layout.split(leaf)
        {'query': array([0, 1, 2, 3]), 'key': array([8, 9])}

    Attributes:
        tensors: key and shape of each tensor, in order.
        axes: the axes of the leaf in the order in which the data has them; ``None`` if that is the leaf's own order.
        groups: the number of pieces into which each tensor is cut.
    """

    tensors: Sequence[tuple[str, Shape]]
    axes: tuple[int, ...] | None = None
    groups: int = 1

    def in_layer(self, layer: str) -> "Layout":
        """Return the layout with the index ``layer`` in place of ``{layer}``."""
        tensors = [(key.replace("{layer}", layer), shape) for key, shape in self.tensors]
        return replace(self, tensors=tensors)

    def assemble(self, parts: list[np.ndarray], shape: Shape) -> np.ndarray:
        """Make the leaf of ``shape`` from its tensors, which are given in order."""
        data = _concatenate(parts, self.groups)
        if self.axes is None:
            return data.reshape(shape)
        return data.reshape([shape[i] for i in self.axes]).transpose(np.argsort(self.axes))

    def part(self, read: Callable[[str], np.ndarray], shape: Shape, index: Index) -> np.ndarray:
        """Return the part ``index`` of the leaf, while reading as little as the layout allows.

        If the leaf is one tensor, the part is a view, so that no more of a mapped file is read. If there is one tensor
        for each entry of the leading axes, only the tensors in the index are read, and only the slice of each. If
        tensors are cut into groups, only the groups in the index are read. Any other leaf is assembled completely.

        Args:
            read: returns a tensor by its key.
            shape: the shape of the leaf.
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
        """Return the tensors of a leaf by their keys: the inverse of :meth:`assemble`."""
        data = (leaf if self.axes is None else leaf.transpose(self.axes)).reshape(self.groups, -1)
        ends = np.cumsum([math.prod(shape) // self.groups for _, shape in self.tensors])
        pieces = np.split(data, ends[:-1], axis=1)
        return {key: piece.reshape(shape) for piece, (key, shape) in zip(pieces, self.tensors, strict=True)}


@dataclass(frozen=True)
class MergedHeads(Layout):
    """The rows of all query heads, then of all keys, then of all values, in one tensor.

    The leaf ``[G, H / G + 2, C, ..]`` has the heads of each group side by side.
    """

    def assemble(self, parts: list[np.ndarray], shape: Shape) -> np.ndarray:
        """Make the leaf of ``shape`` from its tensor."""
        groups, heads, *rest = shape
        data = parts[0].reshape(groups * heads, *rest)
        queries, pairs = np.split(data, [groups * (heads - 2)])
        key, value = pairs.reshape(2, groups, 1, *rest)
        return np.concatenate([queries.reshape(groups, heads - 2, *rest), key, value], axis=1)

    def part(self, read: Callable[[str], np.ndarray], shape: Shape, index: Index) -> np.ndarray:
        """Return the part ``index`` of the leaf, which is assembled completely."""
        return self.assemble([read(self.tensors[0][0])], shape)[index]

    def split(self, leaf: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tensor of a leaf by its key: the inverse of :meth:`assemble`."""
        (key, shape), heads = self.tensors[0], leaf.shape[1] - 2
        rows = leaf[:, :heads], leaf[:, heads], leaf[:, heads + 1]
        return {key: np.concatenate([part.reshape(-1, *shape[1:]) for part in rows])}


def _concatenate(parts: list[np.ndarray], groups: int) -> np.ndarray:
    """Concatenate the data of tensors, group by group; a single tensor is returned as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate([part.reshape(groups, -1) for part in parts], axis=1)


Source = Callable[[Shape], Layout]
"""From the shape of a leaf to a layout in which it may be published."""

KeyTable = Mapping[str, Sequence[Source]]
"""From leaf paths, with ``{layer}`` for the index, to the layouts in which a leaf is published, preferred last."""


def whole(key: str) -> Source:
    """One tensor of the leaf's shape.

    >>> whole("lm_head.weight")((5, 2)).tensors
    [('lm_head.weight', (5, 2))]
    """
    return lambda shape: Layout([(key, shape)])


def merged_halves(key: str) -> Source:
    """One tensor ``[.., 2F, D]`` for a leaf ``[.., 2, F, D]``: the rows of one half follow the other's.

    >>> leaf = np.array([[["g0"], ["g1"]], [["u0"], ["u1"]]])  # [2, F, D]
    >>> merged_halves("gate_up_proj")(leaf.shape).split(leaf)["gate_up_proj"].ravel().tolist()
    ['g0', 'g1', 'u0', 'u1']
    """
    return lambda shape: Layout([(key, (*shape[:-3], shape[-3] * shape[-2], shape[-1]))])


def stacked(*keys: str) -> Source:
    """One tensor for each entry of the leaf's first axis.

    >>> stacked("gate_proj.weight", "up_proj.weight")((2, 3, 4)).tensors
    [('gate_proj.weight', (3, 4)), ('up_proj.weight', (3, 4))]
    """
    return lambda shape: Layout([(key, shape[1:]) for key in keys])


def per_expert(*keys: str) -> Source:
    """One tensor for each expert and key; with several keys, the leaf's second axis counts them.

    >>> per_expert("{expert}.gate.weight", "{expert}.up.weight")((2, 2, 3, 4)).tensors
    [('0.gate.weight', (3, 4)), ('0.up.weight', (3, 4)), ('1.gate.weight', (3, 4)), ('1.up.weight', (3, 4))]
    """
    inner = 2 if len(keys) > 1 else 1

    def layout(shape: Shape) -> Layout:
        return Layout([(key.replace("{expert}", str(e)), shape[inner:]) for e in range(shape[0]) for key in keys])

    return layout


def grouped_heads(query: str, key: str, value: str) -> Source:
    """Three tensors of the heads' rows for a leaf ``[G, H / G + 2, C, ..]``.

    For each of G key/value heads, the leaf has its H / G query heads, then the key head, then the value head.

    >>> leaf = np.array([[["q0"], ["q1"], ["k0"], ["v0"]], [["q2"], ["q3"], ["k1"], ["v1"]]])  # G = 2, H = 4, C = 1
    >>> tensors = grouped_heads("query", "key", "value")(leaf.shape).split(leaf)
    >>> [tensor.tolist() for tensor in tensors.values()]
    [['q0', 'q1', 'q2', 'q3'], ['k0', 'k1'], ['v0', 'v1']]
    """

    def layout(shape: Shape) -> Layout:
        groups, heads, width, *rest = shape
        sizes = (query, heads - 2), (key, 1), (value, 1)
        return Layout([(name, (groups * n * width, *rest)) for name, n in sizes], groups=groups)

    return layout


def merged_grouped_heads(key: str) -> Source:
    """One tensor ``[(H + 2 G) * C, ..]`` for a leaf ``[G, H / G + 2, C, ..]``: all query heads, all keys, all values.

    >>> leaf = np.array([[["q0"], ["q1"], ["k0"], ["v0"]], [["q2"], ["q3"], ["k1"], ["v1"]]])  # G = 2, H = 4, C = 1
    >>> merged_grouped_heads("qkv_proj")(leaf.shape).split(leaf)["qkv_proj"].tolist()
    ['q0', 'q1', 'q2', 'q3', 'k0', 'k1', 'v0', 'v1']
    """
    return lambda shape: MergedHeads([(key, (math.prod(shape[:3]), *shape[3:]))])


def merged_heads(key: str) -> Source:
    """One tensor ``[H * C, ..]`` for a leaf ``[H, C, ..]``: the rows of one head follow those of the head before.

    >>> merged_heads("q_proj.weight")((4, 3, 2)).tensors
    [('q_proj.weight', (12, 2))]
    """
    return lambda shape: Layout([(key, (shape[0] * shape[1], *shape[2:]))])


def with_unit_axis(key: str) -> Source:
    """One tensor with a first axis of length one, which the leaf lacks.

    >>> with_unit_axis("e_score_correction_bias")((8,)).tensors
    [('e_score_correction_bias', (1, 8))]
    """
    return lambda shape: Layout([(key, (1, *shape))])


def transposed(key: str) -> Source:
    """One tensor ``[E, D, F]`` for a leaf ``[E, F, D]``.

    >>> transposed("down_proj")((6, 3, 2)).tensors
    [('down_proj', (6, 2, 3))]
    """
    return lambda shape: Layout([(key, (shape[0], shape[2], shape[1]))], axes=(0, 2, 1))


def interleaved(key: str) -> Source:
    """One tensor ``[E, D, 2F]`` for a leaf ``[E, 2, F, D]``: columns of the two halves alternate.

    >>> leaf = np.array([[[["g0"], ["g1"]], [["u0"], ["u1"]]]])  # [E, 2, F, D]
    >>> interleaved("gate_up_proj")(leaf.shape).split(leaf)["gate_up_proj"].tolist()
    [[['g0', 'u0', 'g1', 'u1']]]
    """
    return lambda shape: Layout([(key, (shape[0], shape[3], shape[1] * shape[2]))], axes=(0, 3, 2, 1))


def interleaved_rows(key: str) -> Source:
    """One tensor ``[E, 2F, ..]`` for a leaf ``[E, 2, F, ..]``: rows of the two halves alternate.

    >>> leaf = np.array([[["g0", "g1"], ["u0", "u1"]]])  # [E, 2, F]
    >>> interleaved_rows("gate_up_proj_bias")(leaf.shape).split(leaf)["gate_up_proj_bias"].tolist()
    [['g0', 'u0', 'g1', 'u1']]
    """

    def layout(shape: Shape) -> Layout:
        experts, halves, rows, *rest = shape
        return Layout([(key, (experts, halves * rows, *rest))], axes=(0, 2, 1, *range(3, len(shape))))

    return layout
