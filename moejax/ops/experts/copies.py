"""Copying rows by index as one kernel for NVIDIA GPUs, written in Pallas (lowered by Triton).

XLA copies a few numbers a thread, at half of the speed at which the GPU writes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_ROWS, _COLUMNS = 8, 1024
"""Of what a program copies: 16 bytes a thread and row, where numbers have two."""


# layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("share", "interpret"))
def copies(x: Float[Array, "N D"], index: Int[Array, " P"], share: int, interpret: bool = False) -> Float[Array, "P D"]:
    """``x[index // share]``, all in bounds."""
    # imported late: it takes a quarter of a second, and only such a GPU needs it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    rows, width = len(index), x.shape[1]

    def body(x, index, y):
        row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32)
        column = pl.program_id(1) * _COLUMNS + jnp.arange(_COLUMNS, dtype=jnp.int32)
        source = gpu.load(index.at[row], mask=row < rows, other=0) // share
        inside = (row < rows)[:, None] & (column < width)[None]
        found = gpu.load(x.at[source[:, None], column[None]], mask=inside)
        gpu.store(y.at[row[:, None], column[None]], found, mask=inside)

    # what a profile shows
    body.__name__ = f"copies_{rows}x{width}"
    run: Any = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(-(-rows // _ROWS), -(-width // _COLUMNS)),
        compiler_params=gpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )
    return run(x, index)
