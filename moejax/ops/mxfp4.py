"""MXFP4 (OCP Microscaling Formats v1.0): blocks of 32 four-bit floats (E2M1) that share a power of two."""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

BLOCK = 32
"""Values that share a scale."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MXFP4:
    """An array of shape ``[*s D]``, ``D = 32 N``, that stays packed until a step uses it: 4.25 bits a value."""

    blocks: UInt8[Array, "*s N 16"]
    scales: UInt8[Array, "*s N"]

    @classmethod
    def random(cls, key: PRNGKeyArray, shape: tuple[int, ...]) -> Self:
        """Uniform codes at scale 2^-7: a standard deviation of 0.02."""
        rows = (*shape[:-1], shape[-1] // BLOCK)
        return cls(jax.random.bits(key, (*rows, BLOCK // 2), jnp.uint8), jnp.full(rows, 120, jnp.uint8))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that is packed."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    @property
    def ndim(self) -> int:
        """Axes of the array that is packed."""
        return self.scales.ndim

    def __getitem__(self, index: Any) -> Self:
        """Entries of the leading axes, still packed."""
        return type(self)(self.blocks[index], self.scales[index])

    def __abs__(self) -> Self:
        """The absolute values, packed: every sign bit cleared."""
        return type(self)(self.blocks & 0x77, self.scales)

    def unpack(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The values: each four-bit float times ``2 ** (scale - 127)``, of two in a byte the low one first.

        Bfloat16 holds each to the bit, but 2, 3, 4 and 6 at scale 254, which become infinite; scale 255 stands for NaN,
        and what comes of it is not finite either. Made of the bits alone, since devices flush what is below 2^-126.
        """
        pairs = self.blocks[..., None] >> jnp.array([0, 4], jnp.uint8)
        code = pairs.astype(jnp.int16).reshape(*self.scales.shape, BLOCK)
        scale = self.scales[..., None].astype(jnp.int16)
        # of sign, two bits of exponent and one of mantissa
        size, sign = code & 7, (code & 8) << 12
        mantissa = jnp.where(size > 1, (size & 1) << 6, 0)
        exponent = scale + jnp.where(size == 1, -1, (size >> 1) - 1)
        subnormal = (0x80 | mantissa) >> jnp.clip(1 - exponent, 0, 15)
        bits = jnp.where(exponent > 0, exponent << 7 | mantissa, subnormal)
        bits = jnp.where((exponent < 255) & (scale < 255), bits, 0x7F80)
        bits = jnp.where(size > 0, bits, jnp.where(scale < 255, 0, 0x7FC0))
        return jax.lax.bitcast_convert_type(bits | sign, jnp.bfloat16).astype(dtype).reshape(self.shape)
