"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 four-bit floats that share a power of two."""

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt8

BLOCK = 32
"""Values that share a scale."""

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_TABLE = np.concatenate([_VALUES, -_VALUES])
_PAIRS = np.stack([_TABLE[np.arange(256) & 15], _TABLE[np.arange(256) >> 4]], axis=-1)
"""The two values of each byte, low nibble first."""

_AT_ONCE = 1 << 15
"""Blocks decoded together; temporary arrays then fit the cache and never count beside the result."""


def dequantise(
    blocks: UInt8[np.ndarray, "*s N 16"], scales: UInt8[np.ndarray, "*s N"]
) -> Shaped[np.ndarray, "*s N*32"]:
    """The values in bfloat16: ``table[nibble] * 2 ** (scale - 127)``, low nibble first.

    Bfloat16 holds each exactly, but 2, 3, 4 and 6 at scale 254, which become infinite. Scale 255 stands for NaN; what
    comes of it is not finite either.
    """
    out = np.empty((*blocks.shape[:-1], BLOCK), ml_dtypes.bfloat16)
    flat, codes, exponents = out.reshape(-1, BLOCK), blocks.reshape(-1, BLOCK // 2), scales.reshape(-1)
    powers = np.ldexp(np.float32(1), np.arange(255) - 127).astype(np.float32)
    powers = np.append(powers, np.float32(np.inf))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(flat), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            values = _PAIRS[codes[some]] * powers[exponents[some], None, None]
            flat[some] = values.reshape(-1, BLOCK)
    return out.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK)
