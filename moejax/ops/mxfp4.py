"""MXFP4 (OCP Microscaling Formats v1.0): blocks of 32 four-bit floats (E2M1) that share a power of two."""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, Shaped, UInt8

BLOCK = 32
"""Values that share a scale."""

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_TABLE = np.concatenate([_VALUES, -_VALUES])
_PAIRS = np.stack([_TABLE[np.arange(256) & 15], _TABLE[np.arange(256) >> 4]], axis=-1)
"""The two values of each byte, low nibble first."""

_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.inf)).astype(np.float32)
"""The power of two of each scale."""

_AT_ONCE = 1 << 15
"""Blocks decoded together; temporary arrays then fit the cache and never count beside the result."""


def dequantise(blocks: UInt8[np.ndarray, "*s N 16"], scales: UInt8[np.ndarray, "*s N"]) -> Shaped[np.ndarray, "*s M"]:
    """The ``M = 32 N`` values in bfloat16: ``table[nibble] * 2 ** (scale - 127)``, low nibble first.

    Bfloat16 holds each exactly, but 2, 3, 4 and 6 at scale 254, which become infinite. Scale 255 stands for NaN; what
    comes of it is not finite either.
    """
    out = np.empty((*blocks.shape[:-1], BLOCK), ml_dtypes.bfloat16)
    flat, codes, exponents = out.reshape(-1, BLOCK), blocks.reshape(-1, BLOCK // 2), scales.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(flat), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            values = _PAIRS[codes[some]] * _POWERS[exponents[some], None, None]
            flat[some] = values.reshape(-1, BLOCK)
    return out.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK)


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

    def unpack(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The values, as :func:`dequantise` gives them, but that a device may flush those below 2^-126 to zero."""
        values = jnp.asarray(_PAIRS)[self.blocks] * jnp.asarray(_POWERS)[self.scales][..., None, None]
        return values.astype(dtype).reshape(self.shape)


def unpacked(weight: Array | MXFP4, dtype: DTypeLike) -> Array:
    """``weight`` as an array: itself if it is one, else its values in ``dtype``."""
    return weight.unpack(dtype) if isinstance(weight, MXFP4) else weight
