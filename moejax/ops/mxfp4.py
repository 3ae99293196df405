"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 four-bit floats that share a power of two."""

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt8

BLOCK = 32
"""Values that share a scale."""

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_TABLE = np.concatenate([_VALUES, -_VALUES])


def dequantise(blocks: UInt8[np.ndarray, "*s N 16"], scales: UInt8[np.ndarray, "*s N"]) -> Shaped[np.ndarray, "*s M"]:
    """The ``M = 32 N`` values ``table[nibble] * 2 ** (scale - 127)``, low nibble first, exact in bfloat16."""
    out = np.empty((*blocks.shape[:-1], BLOCK), ml_dtypes.bfloat16)
    scale = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    out[..., 0::2] = _TABLE[blocks & 15] * scale
    out[..., 1::2] = _TABLE[blocks >> 4] * scale
    return out.reshape(*blocks.shape[:-2], -1)
