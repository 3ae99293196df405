"""MXFP4 (OCP Microscaling Formats v1.0): blocks of 32 four-bit floats (E2M1) that share a power of two.

A four-bit float has a sign, two bits of exponent and one of mantissa; its values are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 and
their negatives. A scale is a byte ``s`` that stands for ``2 ** (s - 127)``; 255 stands for NaN.
"""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, PRNGKeyArray, UInt8

BLOCK = 32
"""Number of values that share a scale."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MXFP4:
    """An array of shape ``[*s, D]`` that stays packed until a step uses it, with 4.25 bits a value.

    Attributes:
        blocks: two four-bit floats in each byte, the first one in the low half; ``D = 32 U`` for U blocks.
        scales: the scale of each block.
    """

    blocks: UInt8[Array, "*s U 16"]
    scales: UInt8[Array, "*s U"]

    @classmethod
    def random(cls, key: PRNGKeyArray, shape: tuple[int, ...]) -> Self:
        """An array of shape ``shape`` with uniform codes at scale 2^-7; its standard deviation is 0.02."""
        rows = (*shape[:-1], shape[-1] // BLOCK)
        return cls(jax.random.bits(key, (*rows, BLOCK // 2), jnp.uint8), jnp.full(rows, 120, jnp.uint8))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unpacked array."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    @property
    def ndim(self) -> int:
        """Number of axes of the unpacked array."""
        return self.scales.ndim

    def __getitem__(self, index: Any) -> Self:
        """Index the leading axes; the result is packed too."""
        return type(self)(self.blocks[index], self.scales[index])

    def flat(self) -> Self:
        """Merge all axes between the first and the last one; the result is packed too."""
        merge = lambda a, last_axes: a.reshape(len(a), -1, *a.shape[a.ndim - last_axes :])
        return type(self)(merge(self.blocks, 2), merge(self.scales, 1))

    def __abs__(self) -> Self:
        """The absolute values, packed too: every sign bit is cleared."""
        return type(self)(self.blocks & 0x77, self.scales)

    def unpack(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The values: each four-bit float times ``2 ** (scale - 127)``.

        Bfloat16 represents all of them exactly, with one exception: 2, 3, 4 and 6 at scale 254 become infinite. Scale
        255 stands for NaN; values with it are not finite.
        """
        values = jax.lax.platform_dependent(
            self.blocks, self.scales, cuda=_unpack_by_multiplying, default=_unpack_by_bits
        )
        return values.astype(dtype).reshape(self.shape)


def unpack_in_turn(x: Array, weight: Array | MXFP4) -> tuple[Array, Array]:
    """Return ``x``, and the matrix in the dtype of ``x``, unpacked for this product alone.

    XLA must not unpack before ``x`` has been computed. Otherwise it would unpack all layers at once, or keep the
    unpacked matrices of the forward pass for the backward pass.
    """
    if not isinstance(weight, MXFP4):
        return x, weight
    x, packed = jax.lax.optimization_barrier((x, weight))
    return x, packed.unpack(x.dtype)


def _unpack_by_multiplying(blocks: UInt8[Array, "*s U 16"], scales: UInt8[Array, "*s U"]) -> BFloat16[Array, "*s U 32"]:
    """The same as :func:`_unpack_by_bits` in a third of the operations, for devices that keep numbers below 2^-126."""
    # move either half of a byte to the upper half; a shift by an array would first be compared with the width of a
    # number
    halves = blocks.astype(jnp.uint16)[..., None] * jnp.array([16, 1], jnp.uint16)
    # sign, exponent and mantissa where float16 has them (the lowest bits of its exponent): the number times 2^-14
    bits = halves << 8 & jnp.uint16(0x8000) | halves << 5 & jnp.uint16(0x0E00)
    values = jax.lax.bitcast_convert_type(bits, jnp.float16) * jnp.float16(2.0**14)
    # powers of two; the power of scale 0 is below 2^-126, the power of scale 255 infinite
    powers = jnp.maximum(scales.astype(jnp.uint32) << 23, jnp.uint32(1 << 22))
    powers = jax.lax.bitcast_convert_type(powers, jnp.float32)[..., None, None]
    return (values.astype(jnp.float32) * powers).astype(jnp.bfloat16).reshape(*scales.shape, BLOCK)


def _unpack_by_bits(blocks: UInt8[Array, "*s U 16"], scales: UInt8[Array, "*s U"]) -> BFloat16[Array, "*s U 32"]:
    """Compute the bits by integer operations alone, for devices that flush numbers below 2^-126 to zero."""
    code = (blocks[..., None] >> jnp.array([0, 4], jnp.uint8)).astype(jnp.int16).reshape(*scales.shape, BLOCK)
    scale = scales[..., None].astype(jnp.int16)
    # the four bits are sign, exponent (two) and mantissa
    size, sign = code & 7, (code & 8) << 12
    mantissa = jnp.where(size > 1, (size & 1) << 6, 0)
    exponent = scale + jnp.where(size == 1, -1, (size >> 1) - 1)
    subnormal = (0x80 | mantissa) >> jnp.clip(1 - exponent, 0, 15)
    bits = jnp.where(exponent > 0, exponent << 7 | mantissa, subnormal)
    bits = jnp.where((exponent < 255) & (scale < 255), bits, 0x7F80)
    bits = jnp.where(size > 0, bits, jnp.where(scale < 255, 0, 0x7FC0))
    return jax.lax.bitcast_convert_type(bits | sign, jnp.bfloat16)
