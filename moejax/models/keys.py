"""Key tables: which tensors of a published checkpoint hold which leaf of the decoder.

A leaf's data is the concatenation of its tensors' data in the order given, so one table serves reading and writing.
"""

from collections.abc import Callable, Mapping, Sequence

Shape = tuple[int, ...]
Source = Callable[[Shape], Sequence[tuple[str, Shape]]]
"""From a leaf's shape to the keys and shapes of the tensors that make it up, in order."""

KeyTable = Mapping[str, Sequence[Source]]
"""From a leaf's path (``{layer}`` stands for the index) to the layouts in which it is published, preferred last."""


def whole(key: str) -> Source:
    """One tensor of the leaf's own shape."""
    return lambda shape: [(key, shape)]


def merged_halves(key: str) -> Source:
    """One tensor ``[E, 2F, D]`` for a leaf ``[E, 2, F, D]``."""
    return lambda shape: [(key, (shape[0], shape[1] * shape[2], *shape[3:]))]


def per_expert(*keys: str) -> Source:
    """One tensor for each expert and key; with several keys the leaf's second axis counts them."""
    inner = 2 if len(keys) > 1 else 1

    def tensors(shape: Shape) -> list[tuple[str, Shape]]:
        return [(key.replace("{expert}", str(e)), shape[inner:]) for e in range(shape[0]) for key in keys]

    return tensors
