"""Rotary positions as one attention layer uses them: which frequencies, and how much of a head turns."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.ops.rope import Rope, rotate


@partial(jax.tree_util.register_dataclass, data_fields=["cosine", "sine"], meta_fields=["is_neighbouring"])
@dataclass(frozen=True)
class Rotation:
    """The angle of each token and dimension, in float32.

    Attributes:
        cosine, sine: of the angles, for each pair in the first half and again in the second.
        is_neighbouring: a pair is two neighbouring dimensions of a head; by default a dimension of its first half and
            one of its second.
    """

    cosine: Float[Array, "B T C"]
    sine: Float[Array, "B T C"]
    is_neighbouring: bool = False


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of a layer's queries and keys.

    Attributes:
        rope: the frequencies.
        width: how many dimensions of a head turn, counted from its first; the others pass.
        is_neighbouring: pairs of neighbouring dimensions turn (:attr:`Rotation.is_neighbouring`).
    """

    rope: Rope
    width: int
    is_neighbouring: bool = False

    def check(self) -> None:
        """Raise ``ConfigError`` if so many dimensions cannot turn, or not with these frequencies."""
        self.rope.check(self.width)

    def rotation(self, positions: Int[Array, "B T"]) -> Rotation:
        """The rotation of every token."""
        return Rotation(*self.rope.angles(positions, self.width), is_neighbouring=self.is_neighbouring)


def turn(x: Float[Array, "B T H C"], rotation: Rotation | None) -> Float[Array, "B T H C"]:
    """``x`` with the first dimensions of each head rotated, as many as ``rotation`` has; ``None`` rotates nothing.

    Where neighbours are pairs, the result has the first of each pair, then the second of each. Products of queries and
    keys do not depend on this order, as long as both have it.
    """
    if rotation is None:
        return x
    width = rotation.cosine.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    if rotation.is_neighbouring:
        turning = jnp.concatenate([turning[..., ::2], turning[..., 1::2]], axis=-1)
    turning = rotate(turning, rotation.cosine, rotation.sine)
    return turning if width == x.shape[-1] else jnp.concatenate([turning, rest], axis=-1)
