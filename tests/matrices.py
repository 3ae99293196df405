"""Operands for tests of the kernels for MXFP4 matrices, and how results are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.mxfp4 import MXFP4

BOTH_WAYS = pytest.mark.parametrize("transpose", [True, False], ids=["times-matrix", "times-transposed"])


def weights(*shape: int) -> MXFP4:
    """Matrices with every code, and scales from 2^-5 to 4."""
    *lead, width = shape
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (*lead, width // 32, 16)), rng.integers(122, 130, (*lead, width // 32))
    return MXFP4(jnp.asarray(blocks, jnp.uint8), jnp.asarray(scales, jnp.uint8))


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.bfloat16)


def wide(x: jax.Array | MXFP4) -> np.ndarray:
    return np.asarray(x.unpack(jnp.float32) if isinstance(x, MXFP4) else x, np.float64)


def close(result: np.ndarray, want: np.ndarray) -> None:
    """Assert that the results are equal up to the rounding of the result to bfloat16."""
    np.testing.assert_allclose(result, want, rtol=0.004, atol=1e-3 * np.abs(want).max(initial=1))
