"""The best few of some scores: a kernel for NVIDIA GPUs in place of sorting all of them (Pallas, lowered by Triton)."""

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
"""Of a program."""

_WIDEST, _MOST = 512, 32
"""Scores of a row that a program's threads can hold, and how many of them it looks for."""

_LEAST = -(2**31)


def top_k(
    scores: Float[Array, "*b E"], count: int, mesh: Mesh | None = None
) -> tuple[Float[Array, "*b K"], Int[Array, "*b K"]]:
    """As ``jax.lax.top_k``: the largest first, the lower index first among equals.

    Args:
        mesh: devices over which the program runs, if there are several.
    """
    small = 0 < count <= _MOST and scores.shape[-1] <= _WIDEST
    if small and scores.size and scores.dtype == jnp.float32 and takes_triton(mesh) and not in_shard_map():
        return _top_k(scores, count)
    return _sorted(scores, count)


def _sorted(scores: Array, count: int) -> tuple[Array, Array]:
    values, ids = lax.top_k(scores, count)
    return values, ids


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _top_k(scores: Array, count: int) -> tuple[Array, Array]:
    # a program for the CPU may be traced where there is a GPU
    return lax.platform_dependent(scores, cuda=partial(best, count=count), default=partial(_sorted, count=count))


@_top_k.defjvp
def _tangent(count, primals, tangents):
    (scores,), (moved,) = primals, tangents
    values, ids = _top_k(scores, count)
    own = jnp.take_along_axis(moved, ids, axis=-1, mode="promise_in_bounds")
    return (values, ids), (own, np.zeros(ids.shape, jax.dtypes.float0))


# layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("count", "interpret"))
def best(scores: Float[Array, "*b E"], count: int, interpret: bool = False) -> tuple[Array, Array]:
    """The kernel: takes the best, and then the best of what is left."""
    # imported late: it takes a quarter of a second, and only such a GPU needs it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    *lead, width = scores.shape
    rows = math.prod(lead)
    wide, kept = (1 << (n - 1).bit_length() for n in (width, count))

    def body(scores, values, ids):
        row = (pl.program_id(0) * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32))[:, None]
        column = jnp.arange(wide, dtype=jnp.int32)[None]
        slot = jnp.arange(kept, dtype=jnp.int32)[None]
        found = gpu.load(scores.at[row, column], mask=(row < rows) & (column < width), other=0)
        found = _ordered(lax.bitcast_convert_type(found, jnp.int32))
        left = jnp.broadcast_to(column < width, found.shape)
        most, where = jnp.zeros((_ROWS, kept), jnp.int32), jnp.zeros((_ROWS, kept), jnp.int32)
        for k in range(count):
            top = jnp.where(left, found, _LEAST).max(1, keepdims=True)
            # of those left, since the least number is a score too
            at = jnp.where(left & (found == top), column, wide).min(1, keepdims=True)
            left &= column != at
            most, where = jnp.where(slot == k, top, most), jnp.where(slot == k, at, where)
        inside = (row < rows) & (slot < count)
        gpu.store(values.at[row, slot], lax.bitcast_convert_type(_ordered(most), jnp.float32), mask=inside)
        gpu.store(ids.at[row, slot], where, mask=inside)

    # what a profile shows
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
    """From the bits of floats to integers in the order of ``lax.top_k``, for which -0 is less than 0; and back."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
