"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout of transformers, and its scalings.

A scaling stretches the frequencies so that a model reads longer texts than it was trained on. Each is a class here; the
equations are those of transformers' ``modeling_rope_utils.py``. ``C`` dimensions turn, in ``P = C / 2`` pairs.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import ConfigError


class Scaling(ABC):
    """How the frequencies of a model are stretched."""

    by_length: ClassVar[bool] = False
    """True if the frequencies depend on the length of the sequence, so that padding would change them."""

    @property
    def magnitude(self) -> float:
        """Multiplies cosine and sine."""
        return 1.0

    def check(self, width: int) -> None:  # noqa: B027 - most scalings fit any width
        """Raise ``ConfigError`` if this does not fit ``width`` dimensions that turn."""

    @abstractmethod
    def frequencies(self, theta: float, width: int, length: Int[Array, ""] | None = None) -> Any:
        """Angle per position of each of ``P = width / 2`` pairs.

        Args:
            theta: base of the frequencies.
            width: dimensions that turn.
            length: number of tokens of the sequence; given if :attr:`by_length`.
        """


def plain_frequencies(theta: Any, width: int) -> Any:
    """``theta ** (-2 i / width)`` for each pair ``i``."""
    return theta ** -(np.arange(0, width, 2) / width)


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """All frequencies divided by ``factor``, as if positions were interpolated."""

    factor: float

    def frequencies(self, theta: float, width: int, length: Int[Array, ""] | None = None) -> Float[np.ndarray, " P"]:
        return plain_frequencies(theta, width) / self.factor


@dataclass(frozen=True)
class Dynamic(Scaling):
    """A larger ``theta`` for sequences longer than the original context, the larger the longer they are ("NTK").

    Attributes:
        factor: how fast ``theta`` grows.
        original: original context length, in tokens.
    """

    factor: float
    original: int
    by_length: ClassVar[bool] = True

    def check(self, width: int) -> None:
        if width < 4:
            raise ConfigError(f"dynamic rotary positions need heads of at least 4 dimensions that turn, not {width}.")

    def frequencies(self, theta: float, width: int, length: Int[Array, ""] | None = None) -> Float[Array, " P"]:
        share = jnp.maximum(self.original if length is None else length, self.original) / self.original
        base = theta * (self.factor * share - (self.factor - 1)) ** (width / (width - 2))
        return plain_frequencies(base, width)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's scaling: slow frequencies divided by ``factor``, fast ones kept, a linear blend between.

    Attributes:
        factor: divides the slow frequencies.
        low, high: turns over the original context; fewer than ``low`` are slow, more than ``high`` fast.
        original: original context length, in tokens.
    """

    factor: float
    low: float
    high: float
    original: int

    def frequencies(self, theta: float, width: int, length: Int[Array, ""] | None = None) -> Float[np.ndarray, " P"]:
        plain = plain_frequencies(theta, width)
        turns = self.original * plain / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * kept + plain / self.factor * (1 - kept)


@dataclass(frozen=True)
class LongRope(Scaling):
    """A divisor for each pair, one set for sequences up to the original context and one beyond (arXiv 2402.13753).

    Attributes:
        short, long: the divisors.
        original: original context length, in tokens.
        attention_factor: multiplies cosine and sine.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention_factor: float
    by_length: ClassVar[bool] = True

    def check(self, width: int) -> None:
        for name, factors in (("short_factor", self.short), ("long_factor", self.long)):
            if len(factors) != width // 2:
                raise ConfigError(f"{name} of the rotary positions has {len(factors)} numbers, not {width // 2}.")

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def frequencies(self, theta: float, width: int, length: Int[Array, ""] | None = None) -> Float[Array, " P"]:
        is_long = jnp.asarray(0 if length is None else length) > self.original
        return plain_frequencies(theta, width) / jnp.where(is_long, jnp.array(self.long), jnp.array(self.short))


@dataclass(frozen=True)
class Yarn(Scaling):
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

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def frequencies(self, theta: float, width: int, length: Int[Array, ""] | None = None) -> Float[np.ndarray, " P"]:
        plain = plain_frequencies(theta, width)
        low, high = (self._dimension(beta, theta, width) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        # as in transformers, also where beta_fast is below beta_slow
        ramp = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0, 1)
        return plain * (1 - ramp) + plain / self.factor * ramp

    def _dimension(self, rotations: float, theta: float, width: int) -> float:
        """The (fractional) index of the pair that makes ``rotations`` rotations over the original context."""
        return width * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies ``theta ** (-2 i / C)``, stretched by ``scaling`` if given."""

    theta: float
    scaling: Scaling | None = None

    @property
    def by_length(self) -> bool:
        """True if the frequencies depend on the length of the sequence."""
        return self.scaling is not None and self.scaling.by_length

    def check(self, width: int) -> None:
        """Raise ``ConfigError`` if ``width`` dimensions cannot turn in pairs, or not with this scaling."""
        if width % 2:
            raise ConfigError(f"rotary positions turn pairs of dimensions: a head of {width} (head_dim) is odd.")
        if self.scaling is not None:
            self.scaling.check(width)

    def frequencies(self, width: int, length: Int[Array, ""] | None = None) -> Any:
        """Angle per position, in radians, of each of the ``P = width / 2`` pairs of dimensions.

        Args:
            width: dimensions that turn.
            length: number of tokens of the sequence; read only if :attr:`by_length`.
        """
        if self.scaling is None:
            return plain_frequencies(self.theta, width)
        return self.scaling.frequencies(self.theta, width, length)

    def angles(
        self, positions: Int[Array, "B T"], head_dim: int
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
        """Cosine and sine of the angles at every position, in float32, repeated for both halves of a head."""
        length = positions.max() + 1 if self.by_length else None
        frequency = jnp.asarray(self.frequencies(head_dim, length), jnp.float32)
        angle = positions[..., None].astype(jnp.float32) * frequency
        angle = jnp.concatenate([angle, angle], axis=-1)
        factor = self.scaling.magnitude if self.scaling else 1.0
        return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "B T H C"], cosine: Float[Array, "B T C"], sine: Float[Array, "B T C"]
) -> Float[Array, "B T H C"]:
    """Rotate each pair ``(x[i], x[i + C/2])`` by its angle. Linear in ``x``, and computed in the dtype of ``x``."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cosine[:, :, None].astype(x.dtype) + turned * sine[:, :, None].astype(x.dtype)
