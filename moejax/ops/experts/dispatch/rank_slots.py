"""Rank the slots of each expert and give them rows: one kernel for NVIDIA GPUs, written in Pallas (lowered by Triton).

There is one program for each expert. It counts the slots of all experts before its own, and then goes through all slots
and numbers the slots of its own expert. So no program waits for another, and one kernel replaces the seven kernels that
XLA makes of the same computation. :mod:`moejax.ops.experts.dispatch.assignment` has the plain reference and explains
slots, rows and groups.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

ALIGNMENT = 8
"""Rows: a group begins at a multiple of this, because a tile of a GPU's matrix unit has at least eight rows."""

_SLOTS_AT_A_TIME = 4096
"""Slots that a program reads in one step."""


def group_offset(slots_before: Int[Array, "*s"] | int, expert: Int[Array, "*s"] | int) -> Int[Array, "*s"]:
    """The first row of an expert's group, a multiple of 8.

    ``slots_before`` is the number of slots of all experts before this one. Each of these experts that has slots may
    leave up to seven empty rows at its end, so the offset has room for as many. The offset depends on nothing else:
    a program can compute it without the sizes of the single groups.
    """
    return (slots_before + (ALIGNMENT - 1) * jnp.minimum(slots_before, expert)) // ALIGNMENT * ALIGNMENT


def padded_rows(slots: int, experts: int) -> int:
    """The number of rows P that suffices for any group sizes: the offset of a group after the last one."""
    return (slots + (ALIGNMENT - 1) * min(slots, experts)) // ALIGNMENT * ALIGNMENT


# jitted, so that layers of equal shapes share one lowering
@partial(jax.jit, static_argnames=("experts", "interpret"))
def rank_slots(
    ids: Int[Array, "T K"], experts: int, interpret: bool = False
) -> tuple[Int[Array, "T K"], Int[Array, " E"], Int[Array, " E"], Int[Array, "T K"], Int[Array, " P"]]:
    """The arrays of an :class:`Assignment` that is complete and ordered by expert.

    Args:
        ids: the expert of each slot. The ids of one token are distinct, and none is unassigned.
        experts: number of experts E.
        interpret: run in Pallas's interpreter, for tests without a GPU.

    Returns:
        ``rank_in_expert``, ``group_sizes``, ``group_offsets``, ``slot_to_row`` and ``row_to_slot``, all int32.
    """
    # imported late: the import takes a quarter of a second, and only a GPU that takes the kernel needs it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    count, rows, int32 = ids.size, padded_rows(ids.size, experts), jnp.int32
    at_a_time = min(_SLOTS_AT_A_TIME, 1 << (count - 1).bit_length())
    steps, max_empty_rows = -(-count // at_a_time), ALIGNMENT << (experts - 1).bit_length()

    def body(ids, rank_in_expert, group_sizes, group_offsets, slot_to_row, row_to_slot):
        expert = pl.program_id(0)

        def read(step: Array) -> tuple[Array, Array]:
            slot = step * at_a_time + jnp.arange(at_a_time, dtype=int32)
            return slot, gpu.load(ids.at[slot], mask=slot < count, other=experts)

        def count_slots(step: Array, sums: tuple) -> tuple:
            _, chosen = read(step)
            return sums[0] + (chosen < expert).sum(dtype=int32), sums[1] + (chosen == expert).sum(dtype=int32)

        slots_before, group_size = lax.fori_loop(0, steps, count_slots, (int32(0), int32(0)))
        start = group_offset(slots_before, expert)

        def number(step: Array, earlier: Array) -> Array:
            slot, chosen = read(step)
            in_group = chosen == expert
            ordinal = earlier + lax.cumsum(in_group.astype(int32))
            # indices differ even where the store is masked: Pallas's interpreter writes the old value back there
            row = jnp.where(in_group, start + ordinal - 1, rows + slot)
            stores = ((rank_in_expert, slot, ordinal - 1), (slot_to_row, slot, row), (row_to_slot, row, slot))
            for array, index, value in stores:
                gpu.store(array.at[index], value, mask=in_group)
            return earlier + in_group.sum(dtype=int32)

        lax.fori_loop(0, steps, number, int32(0))
        # empty rows up to the next group, among them the room that experts without slots did not need
        empty = start + group_size + jnp.arange(max_empty_rows, dtype=int32)
        zeros = jnp.zeros_like(empty)
        next_offset = group_offset(slots_before + group_size, expert + 1)
        gpu.store(row_to_slot.at[empty], zeros, mask=empty < next_offset)
        group_sizes[expert], group_offsets[expert] = group_size, start

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, int32)

    # the name of the kernel in a profile
    body.__name__ = f"rank_slots_{count}_of_{experts}"
    run: Any = pl.pallas_call(
        body,
        out_shape=[integers(count), integers(experts), integers(experts), integers(count), integers(rows)],
        grid=(experts,),
        compiler_params=gpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )
    rank_in_expert, group_sizes, group_offsets, slot_to_row, row_to_slot = run(ids.ravel().astype(int32))
    return rank_in_expert.reshape(ids.shape), group_sizes, group_offsets, slot_to_row.reshape(ids.shape), row_to_slot
