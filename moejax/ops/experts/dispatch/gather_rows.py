"""Copy rows by index: one kernel for NVIDIA GPUs, written in Pallas (lowered by Triton).

XLA's own gather copies a few numbers per thread, at half of the speed at which the GPU can write. In this kernel a
program copies a tile of 8 rows and 1024 columns::

            columns 0 .. 1023
    row 0   x[index[0] // slots_per_row]
    row 1   x[index[1] // slots_per_row]
    ...
    row 7   x[index[7] // slots_per_row]

so that each thread moves 16 bytes of a row at a time if a number has two bytes. The kernel uses no shared memory.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_ROWS, _COLUMNS = 8, 1024
"""Rows and columns that one program copies."""


# jitted, so that layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("slots_per_row", "interpret"))
def gather_rows(
    x: Float[Array, "N D"], index: Int[Array, " P"], slots_per_row: int, interpret: bool = False
) -> Float[Array, "P D"]:
    """``x[index // slots_per_row]``.

    Args:
        x: N rows: one for each token if ``slots_per_row`` is K, one for each slot if it is 1.
        index: slots, all within bounds.
        slots_per_row: consecutive slots that share a row of ``x``.
        interpret: run in Pallas's interpreter, for tests without a GPU.
    """
    # imported late: the import takes a quarter of a second, and only a GPU that takes the kernel needs it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    rows, width = len(index), x.shape[1]

    def body(x, index, y):
        row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32)
        column = pl.program_id(1) * _COLUMNS + jnp.arange(_COLUMNS, dtype=jnp.int32)
        source = gpu.load(index.at[row], mask=row < rows, other=0) // slots_per_row
        inside = (row < rows)[:, None] & (column < width)[None]
        tile = gpu.load(x.at[source[:, None], column[None]], mask=inside)
        gpu.store(y.at[row[:, None], column[None]], tile, mask=inside)

    # the name of the kernel in a profile
    body.__name__ = f"gather_rows_{rows}x{width}"
    run: Any = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(-(-rows // _ROWS), -(-width // _COLUMNS)),
        compiler_params=gpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )
    return run(x, index)
