"""Quantise the matrices of experts as they are loaded, one leaf at a time, and measure the error."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from moejax.checkpoints.plan import leaf_paths
from moejax.models import Config, Decoder
from moejax.models.config import split_path
from moejax.ops.packed import Packed, is_packed


@dataclass(frozen=True)
class Quantisation:
    """What quantising changed in the weights of a model.

    Attributes:
        packed: the format of the experts' matrices.
        errors: for each kind of matrix, over all layers, the root mean square of the change divided by that of the
            checkpoint's values; by the path within a layer.
    """

    packed: str
    errors: Mapping[str, float]

    @classmethod
    def of(cls, config: Config, errors: Mapping[str, float]) -> "Quantisation | None":
        """Name the errors of a decoder that was loaded; ``None`` if nothing was quantised."""
        return cls(config.packed, errors) if errors else None

    def __str__(self) -> str:
        errors = ", ".join(f"{name.removeprefix('feed_forward.')} {error:.2%}" for name, error in self.errors.items())
        return f"experts held as {self.packed}; relative rms error of their weights: {errors}"


class Quantiser:
    """Quantises those leaves that a decoder holds packed, and sums up the errors.

    Args:
        target: the decoder to be filled, with ``jax.ShapeDtypeStruct`` leaves.
        placed: the sharding of every leaf of ``target`` by its path; empty for the default device.

    Attributes:
        paths: the paths of the packed matrices.
    """

    def __init__(self, target: Decoder, placed: Mapping[str, NamedSharding]) -> None:
        matrices = {path: leaf for path, leaf in leaf_paths(target, is_leaf=is_packed) if is_packed(leaf)}
        self.paths = frozenset(matrices)
        self._matrices, self._placed = matrices, placed
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def __call__(self, path: str, leaf: Array) -> Any:
        """Return the leaf, packed if the decoder holds it so; wait for it, so that the leaf's memory is free again."""
        if path not in self.paths:
            return leaf
        packed, *squares = _quantise(type(self._matrices[path]), self._shardings(path))(leaf)
        _, kind = split_path(path)
        self._sums[kind] = [total + float(square) for total, square in zip(self._sums[kind], squares, strict=True)]
        return jax.block_until_ready(packed)

    @property
    def errors(self) -> dict[str, float]:
        """The relative root mean square error of each kind of matrix so far."""
        return {kind: (error / total) ** 0.5 if total else 0.0 for kind, (error, total) in self._sums.items()}

    def _shardings(self, path: str) -> tuple[NamedSharding, ...] | None:
        """Return the shardings of the arrays of a packed matrix; ``None`` for the default device."""
        if not self._placed:
            return None
        return tuple(self._placed[f"{path}.{name}"] for name, _ in leaf_paths(self._matrices[path]))


@cache
def _quantise(
    packed_format: type[Packed], placed: tuple[NamedSharding, ...] | None
) -> Callable[[Float[Array, "*s"]], tuple[Packed, Array, Array]]:
    """Return a compiled function from values to packed values, and the sums of squares of error and values."""

    def run(values: Float[Array, "*s"]) -> tuple[Packed, Array, Array]:
        packed = packed_format.of(values)
        if placed is not None:
            arrays, tree = jax.tree.flatten(packed)
            packed = tree.unflatten(map(jax.lax.with_sharding_constraint, arrays, placed))
        wide = values.astype(jnp.float32)
        # rows first: a float32 sum of all values in one go loses digits
        square = lambda x: (x**2).sum(-1).sum()
        return packed, square(packed.unpack(jnp.float32) - wide), square(wide)

    return jax.jit(run)
