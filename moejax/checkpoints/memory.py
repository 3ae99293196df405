"""How much memory a model's weights and cache take, from its config alone."""

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
    """Bytes of a layer's weights.

    Attributes:
        layer: its index.
        experts: all expert matrices and biases of its feed-forward part.
        active: of those, what one token uses.
        rest: attention, router, norms, shared expert, or a dense feed-forward part.
    """

    layer: int
    experts: int
    active: int
    rest: int

    @property
    def total(self) -> int:
        """All weights of the layer."""
        return self.experts + self.rest


@dataclass(frozen=True)
class Memory:
    """Bytes of a model in one dtype.

    Attributes:
        dtype: of all weights, and whether experts stay packed.
        layers: each layer's.
        outer: embedding, final norm and head.
        cache_per_token: keys and values of a token in all layers.
    """

    dtype: str
    layers: tuple[LayerMemory, ...]
    outer: int
    cache_per_token: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.outer + sum(layer.total for layer in self.layers)

    @property
    def largest_moe_layer(self) -> int:
        """Weights of the largest layer with experts; zero if there is none."""
        return max((layer.total for layer in self.layers if layer.experts), default=0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"total": self.total, "largest_moe_layer": self.largest_moe_layer}


def estimate(config: Config, dtype: np.dtype) -> Memory:
    """The memory of a model with its values in ``dtype``; what stays packed, stays as it is. Allocates none of it."""
    abstract = dict(leaf_paths(Decoder.abstract(config, dtype)))
    sizes = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in abstract.items()}
    grouped = parts(sizes)
    layers = tuple(_layer(i, config, {p: sizes[p] for p in grouped[f"layers.{i}"]}) for i in range(config.num_layers))
    outer = sum(sizes.values()) - sum(layer.total for layer in layers)
    first, second = (_cache_bytes(config, positions, dtype) for positions in (1, 2))
    name = f"{dtype}, packed experts" if config.is_packed else str(dtype)
    return Memory(name, layers, outer, second - first)


def _cache_bytes(config: Config, positions: int, dtype: np.dtype) -> int:
    """Bytes of all layers' caches for one sequence of so many positions."""
    caches = jax.eval_shape(lambda: [block.init_cache(1, positions, dtype) for block in config.blocks])
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def _layer(index: int, config: Config, sizes: Mapping[str, int]) -> LayerMemory:
    part = config.blocks[index].half("feed_forward")
    if not part.sizes.num_experts:
        return LayerMemory(index, 0, 0, sum(sizes.values()))
    prefix = f"layers.{index}.feed_forward."
    expert_leaves = tuple(prefix + path for path, role in part.roles.items() if role == "expert")
    experts = sum(size for path, size in sizes.items() if path.startswith(expert_leaves))
    active = experts * min(part.sizes.num_selected, part.sizes.num_weighted) // part.sizes.num_weighted
    return LayerMemory(index, experts, active, sum(sizes.values()) - experts)
