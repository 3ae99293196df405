"""MXFP4 (OCP Microscaling Formats v1.0): blocks of 32 four-bit floats (E2M1) that share a power of two.

A four-bit float has a sign, two bits of exponent and one of mantissa; its values are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 and
their negatives. A scale is a byte ``s`` that stands for ``2 ** (s - 127)``; 255 stands for NaN.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, PRNGKeyArray, UInt8

from moejax.errors import ConfigError
from moejax.ops.packed import Axes, Packed, register_format

BLOCK = 32
"""Number of values that share a scale."""


@register_format("mxfp4")
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MXFP4(Packed):
    """An array of shape ``[*s, D]`` that stays packed until a step uses it, with 4.25 bits a value.

    Attributes:
        blocks: two four-bit floats in each byte, the first one in the low half; ``D = 32 U`` for U blocks.
        scales: the scale of each block.
    """

    value_dtype: ClassVar[Any] = jnp.bfloat16
    is_published: ClassVar[bool] = True

    blocks: UInt8[Array, "*s U 16"]
    scales: UInt8[Array, "*s U"]

    @classmethod
    def random(cls, key: PRNGKeyArray, shape: tuple[int, ...]) -> Self:
        """An array of shape ``shape`` with uniform codes at scale 2^-7; its standard deviation is 0.02."""
        rows = (*shape[:-1], shape[-1] // BLOCK)
        return cls(jax.random.bits(key, (*rows, BLOCK // 2), jnp.uint8), jnp.full(rows, 120, jnp.uint8))

    @classmethod
    def leaf_axes(cls, axes: Axes) -> dict[str, Axes]:
        # the blocks of a row stay together, since their number divides less often than the number of values
        return {"blocks": (*axes[:-1], None, None), "scales": (*axes[:-1], None)}

    @classmethod
    def check(cls, *widths: int) -> None:
        """Raise ``ConfigError`` if a width is no multiple of the 32 values of a block."""
        if any(width % BLOCK for width in widths):
            sizes = " x ".join(map(str, widths))
            raise ConfigError(f"experts of {sizes} cannot be MXFP4, whose blocks have {BLOCK} values.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

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
