"""Top-k: a kernel for NVIDIA GPUs that selects the few largest scores without sorting all (Pallas, lowered by Triton).

A program handles 8 rows. Each of its steps takes the largest of the scores that are left, as a maximum over the row, so
the kernel is meant for few selected scores. It uses no shared memory but for these maxima, which Triton allocates.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moejax.ops.device import in_shard_map, takes_triton

_ROWS = 8
"""Rows of scores that one program handles."""

_MAX_SCORES, _MAX_COUNT = 512, 32
"""The largest number of scores in a row, which a program's threads hold in registers, and the largest k."""

_LEAST = -(2**31)
"""The least 32-bit integer, which marks scores that are taken already."""


def top_k(
    scores: Float[Array, "*b E"], count: int, mesh: Mesh | None = None
) -> tuple[Float[Array, "*b K"], Int[Array, "*b K"]]:
    """The K largest scores and their indices, in the order of ``jax.lax.top_k``.

    The largest score comes first; among equal scores the lower index comes first.

    Args:
        scores: scores of E candidates.
        count: how many to select (K).
        mesh: devices that the program is for; ``None`` for one device.
    """
    small = 0 < count <= _MAX_COUNT and scores.shape[-1] <= _MAX_SCORES
    if small and scores.size and scores.dtype == jnp.float32 and takes_triton(mesh) and not in_shard_map():
        return _top_k(scores, count)
    return _sorted(scores, count)


def _sorted(scores: Array, count: int) -> tuple[Array, Array]:
    values, ids = lax.top_k(scores, count)
    return values, ids


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _top_k(scores: Array, count: int) -> tuple[Array, Array]:
    # a program for the CPU may be traced on a machine with a GPU
    return lax.platform_dependent(
        scores, cuda=partial(top_k_kernel, count=count), default=partial(_sorted, count=count)
    )


@_top_k.defjvp
def _tangent(count, primals, tangents):
    (scores,), (score_tangents,) = primals, tangents
    values, ids = _top_k(scores, count)
    value_tangents = jnp.take_along_axis(score_tangents, ids, axis=-1, mode="promise_in_bounds")
    return (values, ids), (value_tangents, np.zeros(ids.shape, jax.dtypes.float0))


# jitted, so that layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("count", "interpret"))
def top_k_kernel(scores: Float[Array, "*b E"], count: int, interpret: bool = False) -> tuple[Array, Array]:
    """The kernel: select the largest score of each row, then the largest of the scores that are left, and so on.

    ``interpret`` runs it in Pallas's interpreter, for tests without a GPU.
    """
    # imported late: the import takes a quarter of a second, and only a GPU that takes the kernel needs it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    *lead, width = scores.shape
    rows = math.prod(lead)
    padded_width, padded_count = (1 << (n - 1).bit_length() for n in (width, count))

    def body(scores, values, ids):
        row = (pl.program_id(0) * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32))[:, None]
        column = jnp.arange(padded_width, dtype=jnp.int32)[None]
        slot = jnp.arange(padded_count, dtype=jnp.int32)[None]
        values_in = gpu.load(scores.at[row, column], mask=(row < rows) & (column < width), other=0)
        keys = _ordered(lax.bitcast_convert_type(values_in, jnp.int32))
        left = jnp.broadcast_to(column < width, keys.shape)
        best, where = (jnp.zeros((_ROWS, padded_count), jnp.int32) for _ in range(2))
        for k in range(count):
            top = jnp.where(left, keys, _LEAST).max(1, keepdims=True)
            # `left` again, because a score may be equal to `_LEAST`
            at = jnp.where(left & (keys == top), column, padded_width).min(1, keepdims=True)
            left &= column != at
            best, where = jnp.where(slot == k, top, best), jnp.where(slot == k, at, where)
        inside = (row < rows) & (slot < count)
        gpu.store(values.at[row, slot], lax.bitcast_convert_type(_ordered(best), jnp.float32), mask=inside)
        gpu.store(ids.at[row, slot], where, mask=inside)

    # the name of the kernel in a profile
    body.__name__ = f"best_{count}_of_{width}"
    run: Any = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((rows, count), dtype) for dtype in (jnp.float32, jnp.int32)],
        grid=(-(-rows // _ROWS),),
        compiler_params=gpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )
    values, ids = run(scores.reshape(rows, width))
    return values.reshape(*lead, count), ids.reshape(*lead, count)


def _ordered(bits: Int[Array, "*s"]) -> Int[Array, "*s"]:
    """Map the bits of floats to integers in the order of ``lax.top_k`` (-0 is less than 0), or back to bits."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
