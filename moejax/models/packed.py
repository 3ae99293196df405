"""A decoder flattened once, so that calling a compiled function with it costs microseconds.

Flattening a tree of modules takes Python 3 microseconds a module, 0.4 ms for 16 layers and over 1 ms for 48, at every
call. A packed decoder hands ``jit`` its leaves and one object that stands for their structure.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

from moejax.models.decoder import Decoder


class _Structure:
    """A tree structure whose hash is computed once and that equals itself at a glance."""

    def __init__(self, tree: jax.tree_util.PyTreeDef) -> None:
        self.tree, self._hash = tree, hash(tree)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.tree == other.tree)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Packed:
    """The leaves of a decoder and their structure; a pytree like the decoder itself."""

    leaves: list[Array]
    structure: _Structure

    @classmethod
    def of(cls, decoder: Decoder) -> "Packed":
        """Flatten a decoder."""
        leaves, tree = jax.tree.flatten(decoder)
        return cls(leaves, _Structure(tree))

    def tree_flatten(self) -> tuple[list[Array], _Structure]:
        return self.leaves, self.structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, leaves: Iterable[Any]) -> "Packed":
        return cls(list(leaves), structure)


def unpack(weights: Decoder | Packed) -> Decoder:
    """The decoder, packed or not."""
    return jax.tree.unflatten(weights.structure.tree, weights.leaves) if isinstance(weights, Packed) else weights
