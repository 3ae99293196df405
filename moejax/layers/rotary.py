"""Rotary positions as one attention layer uses them: which frequencies, and how much of a head turns."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.ops.rope import Rope, rotate


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each token and dimension, in float32."""

    cosine: Float[Array, "B T C"]
    sine: Float[Array, "B T C"]


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of a layer's queries and keys.

    Attributes:
        rope: the frequencies.
        width: how many dimensions of a head turn, counted from its first; the others pass.
    """

    rope: Rope
    width: int

    def check(self) -> None:
        """Raise ``ConfigError`` if so many dimensions cannot turn, or not with these frequencies."""
        self.rope.check(self.width)

    def rotation(self, positions: Int[Array, "B T"]) -> Rotation:
        """The rotation of every token."""
        return Rotation(*self.rope.angles(positions, self.width))


def turn(x: Float[Array, "B T H C"], rotation: Rotation | None) -> Float[Array, "B T H C"]:
    """``x`` with the first dimensions of each head rotated, as many as ``rotation`` has; ``None`` rotates nothing."""
    if rotation is None:
        return x
    width = rotation.cosine.shape[-1]
    if width == x.shape[-1]:
        return rotate(x, *rotation)
    return jnp.concatenate([rotate(x[..., :width], *rotation), x[..., width:]], axis=-1)
