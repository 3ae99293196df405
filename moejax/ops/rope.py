"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout of transformers, and YaRN."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Yarn:
    """Extension of the context by interpolating slow frequencies (Peng et al., arXiv 2309.00071).

    Attributes:
        factor: the extended context length divided by the original one.
        original: original context length, in tokens.
        beta_fast: a frequency with more rotations than this over the original context is kept.
        beta_slow: a frequency with fewer rotations than this is divided by ``factor``. Between the two is a linear
            ramp.
        truncate: round the bounds of the ramp to integer dimensions.
        attention_factor: multiplies cosine and sine.
    """

    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies ``theta ** (-2 i / C)``, stretched by YaRN if given."""

    theta: float
    yarn: Yarn | None = None

    def frequencies(self, head_dim: int) -> Float[np.ndarray, " P"]:
        """Angle per position, in radians, of each of the ``P = C / 2`` pairs of dimensions."""
        plain = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
        if self.yarn is None:
            return plain
        low, high = (self._dimension(beta, head_dim) for beta in (self.yarn.beta_fast, self.yarn.beta_slow))
        if self.yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return plain * (1 - ramp) + plain / self.yarn.factor * ramp

    def _dimension(self, rotations: float, head_dim: int) -> float:
        """The (fractional) index of the pair that makes ``rotations`` rotations over the original context."""
        assert self.yarn is not None
        return head_dim * math.log(self.yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

    def angles(
        self, positions: Int[Array, "B T"], head_dim: int
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
        """Cosine and sine of the angles at every position, in float32, repeated for both halves of a head."""
        frequency = jnp.asarray(self.frequencies(head_dim), jnp.float32)
        angle = positions[..., None].astype(jnp.float32) * frequency
        angle = jnp.concatenate([angle, angle], axis=-1)
        factor = self.yarn.attention_factor if self.yarn else 1.0
        return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "B T H C"], cosine: Float[Array, "B T C"], sine: Float[Array, "B T C"]
) -> Float[Array, "B T H C"]:
    """Rotate each pair ``(x[i], x[i + C/2])`` by its angle. Linear in ``x``, and computed in the dtype of ``x``."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cosine[:, :, None].astype(x.dtype) + turned * sine[:, :, None].astype(x.dtype)
