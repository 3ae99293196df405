"""Ranking slots and giving them rows as one kernel for NVIDIA GPUs, written in Pallas (lowered by Triton).

Each expert's program counts the slots of the experts before it, then goes through all slots and numbers its own. So
no program waits for another, and seven kernels that XLA makes of the same become one.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

ALIGNED = 8
"""An expert's rows begin at a multiple of this, which a tile of a GPU's matrix unit needs."""

_TOGETHER = 4096
"""Slots that a program looks at together."""


def begin(before: Int[Array, "*s"] | int, expert: Int[Array, "*s"] | int) -> Int[Array, "*s"]:
    """The first row of an expert, where ``before`` slots went to the experts before it.

    Each of these may have slots, and leave room up to the next multiple. Nothing else need be known of their loads.
    """
    return (before + (ALIGNED - 1) * jnp.minimum(before, expert)) // ALIGNED * ALIGNED


def rows_for(slots: int, experts: int) -> int:
    """How many rows there are, whatever the loads: where an expert after the last would begin."""
    return (slots + (ALIGNED - 1) * min(slots, experts)) // ALIGNED * ALIGNED


# layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("experts", "interpret"))
def places(
    ids: Int[Array, "T K"], experts: int, interpret: bool = False
) -> tuple[Int[Array, "T K"], Int[Array, " E"], Int[Array, " E"], Int[Array, "T K"], Int[Array, " P"]]:
    """``rank``, ``load``, ``first``, ``place`` and ``slot`` of an :class:`Assignment` by expert that is complete."""
    # imported late: it takes a quarter of a second, and only such a GPU needs it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    count, rows, wide = ids.size, rows_for(ids.size, experts), jnp.int32
    together = min(_TOGETHER, 1 << (count - 1).bit_length())
    steps, room = -(-count // together), ALIGNED << (experts - 1).bit_length()

    def body(ids, rank, load, first, place, slot):
        expert = pl.program_id(0)

        def read(step: Array) -> tuple[Array, Array]:
            index = step * together + jnp.arange(together, dtype=wide)
            return index, gpu.load(ids.at[index], mask=index < count, other=experts)

        def add(step: Array, sums: tuple) -> tuple:
            _, chosen = read(step)
            return sums[0] + (chosen < expert).sum(dtype=wide), sums[1] + (chosen == expert).sum(dtype=wide)

        before, own = lax.fori_loop(0, steps, add, (wide(0), wide(0)))
        start = begin(before, expert)

        def number(step: Array, earlier: Array) -> Array:
            index, chosen = read(step)
            mine = chosen == expert
            until = earlier + lax.cumsum(mine.astype(wide))
            # no two share a number, though masked: Pallas's interpreter writes back what is there for those
            row = jnp.where(mine, start + until - 1, rows + index)
            for array, where, value in ((rank, index, until - 1), (place, index, row), (slot, row, index)):
                gpu.store(array.at[where], value, mask=mine)
            return earlier + mine.sum(dtype=wide)

        lax.fori_loop(0, steps, number, wide(0))
        # up to the next expert's: the room of those before, too, if none of them has slots
        rest = start + own + jnp.arange(room, dtype=wide)
        gpu.store(slot.at[rest], jnp.zeros_like(rest), mask=rest < begin(before + own, expert + 1))
        load[expert], first[expert] = own, start

    numbers = lambda *shape: jax.ShapeDtypeStruct(shape, wide)
    # what a profile shows
    body.__name__ = f"places_{count}_of_{experts}"
    run: Any = pl.pallas_call(
        body,
        out_shape=[numbers(count), numbers(experts), numbers(experts), numbers(count), numbers(rows)],
        grid=(experts,),
        compiler_params=gpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )
    rank, load, first, place, slot = run(ids.ravel().astype(wide))
    return rank.reshape(ids.shape), load, first, place.reshape(ids.shape), slot
