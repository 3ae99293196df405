"""Estimate the memory of a model's weights and cache from its config alone."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from moejax.checkpoints.plan import leaf_paths, parts
from moejax.models import Config, Decoder


@dataclass(frozen=True)
class LayerMemory:
    """The bytes of one layer's weights.

    Attributes:
        layer: the index of the layer.
        experts: the bytes of all expert matrices and biases of its feed-forward part.
        active: the bytes of the experts that one token uses.
        rest: the bytes of attention, router, norms and shared expert, or of a dense feed-forward part.
    """

    layer: int
    experts: int
    active: int
    rest: int

    @property
    def total(self) -> int:
        """Bytes of all weights of the layer."""
        return self.experts + self.rest


@dataclass(frozen=True)
class Memory:
    """The bytes of a model in one dtype.

    Attributes:
        dtype: the dtype of all weights, followed by ``", packed experts"`` if experts stay MXFP4, or by the name of
            another format in which they are held, as in ``", int8 experts"``.
        layers: the bytes of each layer.
        outer: the bytes of embedding, final norm and head.
        cache_per_token: the bytes that the keys and values of one token take in the caches of all layers.
    """

    dtype: str
    layers: tuple[LayerMemory, ...]
    outer: int
    cache_per_token: int

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.outer + sum(layer.total for layer in self.layers)

    @property
    def largest_moe_layer(self) -> int:
        """Bytes of the largest layer with experts; zero if no layer has experts."""
        return max((layer.total for layer in self.layers if layer.experts), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that can be written as JSON."""
        return asdict(self) | {"total": self.total, "largest_moe_layer": self.largest_moe_layer}


def estimate(config: Config, dtype: np.dtype) -> Memory:
    """Estimate the memory of a model without allocating it.

    Args:
        config: the config of its decoder.
        dtype: the dtype of weights and cache; experts that ``config`` holds packed stay packed.
    """
    abstract = dict(leaf_paths(Decoder.abstract(config, dtype)))
    sizes = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in abstract.items()}
    grouped = parts(sizes)
    layers = tuple(_layer(i, config, {p: sizes[p] for p in grouped[f"layers.{i}"]}) for i in range(config.num_layers))
    outer = sum(sizes.values()) - sum(layer.total for layer in layers)
    first, second = (_cache_bytes(config, positions, dtype) for positions in (1, 2))
    held = "packed" if config.packed == "mxfp4" else config.packed
    name = f"{dtype}, {held} experts" if held else str(dtype)
    return Memory(name, layers, outer, second - first)


def _cache_bytes(config: Config, positions: int, dtype: np.dtype) -> int:
    """Bytes of all layers' caches for one sequence of so many positions."""
    caches = jax.eval_shape(lambda: [block.init_cache(1, positions, dtype) for block in config.blocks])
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def _layer(index: int, config: Config, sizes: Mapping[str, int]) -> LayerMemory:
    """Divide the bytes of a layer's leaves, given by path, into experts and the rest."""
    part = config.blocks[index].half("feed_forward")
    if not part.sizes.num_experts:
        return LayerMemory(index, 0, 0, sum(sizes.values()))
    prefix = f"layers.{index}.feed_forward."
    expert_leaves = tuple(prefix + path for path, role in part.roles.items() if role == "expert")
    experts = sum(size for path, size in sizes.items() if path.startswith(expert_leaves))
    active = experts * min(part.sizes.num_selected, part.sizes.num_weighted) // part.sizes.num_weighted
    return LayerMemory(index, experts, active, sum(sizes.values()) - experts)
