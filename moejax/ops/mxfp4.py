"""MXFP4 (OCP Microscaling Formats v1.0): blocks of 32 four-bit floats (E2M1) that share a power of two."""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, PRNGKeyArray, UInt8

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

    def flat(self) -> Self:
        """All axes between the first and the last merged, still packed."""
        merge = lambda a, kept: a.reshape(len(a), -1, *a.shape[a.ndim - kept :])
        return type(self)(merge(self.blocks, 2), merge(self.scales, 1))

    def __abs__(self) -> Self:
        """The absolute values, packed: every sign bit cleared."""
        return type(self)(self.blocks & 0x77, self.scales)

    def unpack(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The values: each four-bit float times ``2 ** (scale - 127)``, of two in a byte the low one first.

        Bfloat16 holds each to the bit, but 2, 3, 4 and 6 at scale 254, which become infinite; scale 255 stands for NaN,
        and what comes of it is not finite either.
        """
        values = jax.lax.platform_dependent(self.blocks, self.scales, cuda=_multiplied, default=_of_bits)
        return values.astype(dtype).reshape(self.shape)


def unpacked_in_turn(x: Array, weight: Array | MXFP4) -> tuple[Array, Array]:
    """``x``, and a matrix in its dtype, unpacked no earlier than ``x`` is there and for this product alone.

    Otherwise XLA unpacks all layers at once, or keeps what the forward pass unpacked for the backward pass.
    """
    if not isinstance(weight, MXFP4):
        return x, weight
    x, packed = jax.lax.optimization_barrier((x, weight))
    return x, packed.unpack(x.dtype)


def _multiplied(blocks: UInt8[Array, "*s N 16"], scales: UInt8[Array, "*s N"]) -> BFloat16[Array, "*s N 32"]:
    """What :func:`_of_bits` does, in a third of the operations where the device keeps numbers below 2^-126."""
    # either half of a byte as the upper one; shifts by what is no constant would be compared with the width first
    halves = blocks.astype(jnp.uint16)[..., None] * jnp.array([16, 1], jnp.uint16)
    # sign, exponent and mantissa where float16 has them, its exponent's lowest bits: the number times 2^-14
    bits = halves << 8 & jnp.uint16(0x8000) | halves << 5 & jnp.uint16(0x0E00)
    values = jax.lax.bitcast_convert_type(bits, jnp.float16) * jnp.float16(2.0**14)
    # powers of two, of which that of scale 0 is a number below 2^-126 too, and that of 255 infinite
    powers = jnp.maximum(scales.astype(jnp.uint32) << 23, jnp.uint32(1 << 22))
    powers = jax.lax.bitcast_convert_type(powers, jnp.float32)[..., None, None]
    return (values.astype(jnp.float32) * powers).astype(jnp.bfloat16).reshape(*scales.shape, BLOCK)


def _of_bits(blocks: UInt8[Array, "*s N 16"], scales: UInt8[Array, "*s N"]) -> BFloat16[Array, "*s N 32"]:
    """Of integers alone, for devices that flush what is below 2^-126."""
    code = (blocks[..., None] >> jnp.array([0, 4], jnp.uint8)).astype(jnp.int16).reshape(*scales.shape, BLOCK)
    scale = scales[..., None].astype(jnp.int16)
    # of sign, two bits of exponent and one of mantissa
    size, sign = code & 7, (code & 8) << 12
    mantissa = jnp.where(size > 1, (size & 1) << 6, 0)
    exponent = scale + jnp.where(size == 1, -1, (size >> 1) - 1)
    subnormal = (0x80 | mantissa) >> jnp.clip(1 - exponent, 0, 15)
    bits = jnp.where(exponent > 0, exponent << 7 | mantissa, subnormal)
    bits = jnp.where((exponent < 255) & (scale < 255), bits, 0x7F80)
    bits = jnp.where(size > 0, bits, jnp.where(scale < 255, 0, 0x7FC0))
    return jax.lax.bitcast_convert_type(bits | sign, jnp.bfloat16)
