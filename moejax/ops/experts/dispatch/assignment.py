"""The assignment of slots to rows and experts: computed once, and used by all products of a layer.

Three words:

- A *slot* is one of the K choices of a token: slot ``(t, k)`` means that token ``t`` goes to expert ``ids[t, k]``.
  Slots are counted through ``[T, K]``, so slot ``(t, k)`` has number ``t K + k``.
- A *row* is a line of the matrices that the experts multiply. There are P rows, some more than there are slots.
- A *group* is the range of rows of one expert. It begins at a multiple of eight (``rank_slots.ALIGNMENT``), since the
  matrix unit of a GPU works on tiles of at least eight rows. Rows between two groups belong to no slot: they may hold
  anything, and nothing that is computed from them reaches a slot.

An example with T = 3 tokens, K = 2 slots each and E = 4 experts::

    ids             [[2, 0],     token 0 goes to experts 2 and 0
                     [2, 3],     token 1 goes to experts 2 and 3
                     [0, 2]]     token 2 goes to experts 0 and 2

    rank_in_expert  [[0, 0],     slot 0 is the first one of expert 2
                     [1, 0],     slot 2 is the second one of expert 2
                     [1, 2]]     slot 5 is the third one of expert 2
    group_sizes     [2, 0, 3, 1]     slots of each expert; expert 1 has none
    group_offsets   [0, 8, 16, 24]   first row of each group, a multiple of 8

    slot_to_row     [[16,  0],   = group_offsets[ids] + rank_in_expert
                     [17, 24],
                     [ 1, 18]]

    row             0  1  2 .. 7    8 .. 15    16 17 18  19 .. 23    24  25 .. 31
    row_to_slot     1  4  0 .. 0    0 .. 0      0  2  5   0 .. 0      3   0 .. 0
    row_expert      0  0  4 .. 4    4 .. 4      2  2  2   4 .. 4      3   4 .. 4

There are P = 32 rows, which suffices for any routing of six slots to four experts (``rank_slots.padded_rows``).
Dispatch (:func:`permute`) copies the vectors of tokens 0 and 2 to rows 0 and 1, of tokens 0, 1 and 2 to rows 16 to 18,
and of token 1 to row 24. Then each expert multiplies its group (:func:`grouped_matmul`), and :func:`unpermute` reads
the result of slot ``(t, k)`` from row ``slot_to_row[t, k]``.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from moejax.ops.device import in_shard_map, takes_triton
from moejax.ops.experts.dispatch.rank_slots import group_offset, padded_rows, rank_slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Assignment:
    """The rows of the routed slots.

    Attributes:
        ids: the expert of each slot; arbitrary for unassigned slots.
        rank_in_expert: how many earlier slots go to the same expert. Negative for unassigned slots: these have no row,
            and their product is zero.
        group_sizes: number of slots of each expert.
        group_offsets: the first row of each expert's group, if rows are ordered by expert.
        slot_to_row: the row of each slot; arbitrary for unassigned slots.
        row_to_slot: the slot of each row, counted through ``[T, K]``; 0 for rows without a slot.
        by_expert: True if rows are ordered by expert. False if they are ordered as the slots are, which is cheaper for
            few slots; then P = T K (static).
        complete: True if no slot is unassigned (static).
        mesh: devices over which the weights are split; ``None`` if each device has all of them (static).
    """

    ids: Int[Array, "T K"]
    rank_in_expert: Int[Array, "T K"]
    group_sizes: Int[Array, " E"]
    group_offsets: Int[Array, " E"]
    slot_to_row: Int[Array, "T K"]
    row_to_slot: Int[Array, " P"]
    by_expert: bool = field(default=True, metadata={"static": True})
    complete: bool = field(default=True, metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})

    @classmethod
    def of(
        cls,
        ids: Int[Array, "T K"],
        rank_in_expert: Int[Array, "T K"],
        group_sizes: Int[Array, " E"],
        *,
        by_expert: bool,
        complete: bool,
        mesh: Mesh | None,
    ) -> Self:
        """Give rows to slots that have been ranked and counted; arguments as the attributes of the same name."""
        slots = jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape)
        experts = len(group_sizes)
        group_offsets = group_offset(sum_before(group_sizes), jnp.arange(experts, dtype=jnp.int32))
        if by_expert:
            rows = padded_rows(ids.size, experts)
            slot_to_row = jnp.where(rank_in_expert < 0, rows, group_offsets[ids] + rank_in_expert)
            empty = jnp.zeros(rows, jnp.int32)
            row_to_slot = empty.at[slot_to_row].set(slots, mode="drop", unique_indices=complete)
            slot_to_row = jnp.minimum(slot_to_row, rows - 1)
        else:
            slot_to_row, row_to_slot = slots, slots.ravel()
        # without the barrier XLA computes the index of a row again for every number that is copied with it
        slot_to_row, row_to_slot = jax.lax.optimization_barrier((slot_to_row, row_to_slot))
        arrays = ids, rank_in_expert, group_sizes, group_offsets, slot_to_row, row_to_slot
        return cls(*arrays, by_expert=by_expert, complete=complete, mesh=mesh)

    def limited(self, capacity: int) -> Self:
        """The same assignment with at most ``capacity`` slots for each expert; later slots become unassigned."""
        rank_in_expert = jnp.where(self.rank_in_expert < capacity, self.rank_in_expert, -1)
        group_sizes = jnp.minimum(self.group_sizes, capacity)
        return self.of(self.ids, rank_in_expert, group_sizes, by_expert=self.by_expert, complete=False, mesh=self.mesh)

    @property
    def row_expert(self) -> Int[Array, " P"]:
        """The expert of each row; E for rows without a slot."""
        experts = len(self.group_sizes)
        expert = take(self.ids.ravel(), self.row_to_slot)
        if not self.by_expert:
            return jnp.where(self.rank_in_expert.ravel() < 0, experts, expert)
        row_in_group = jnp.arange(len(self.row_to_slot), dtype=jnp.int32) - take(self.group_offsets, expert)
        has_slot = (row_in_group >= 0) & (row_in_group < take(self.group_sizes, expert))
        return jax.lax.optimization_barrier(jnp.where(has_slot, expert, experts))


def assign(
    ids: Int[Array, "T K"],
    num_experts: int,
    *,
    allow_unassigned: bool = False,
    mesh: Mesh | None = None,
    by_expert: bool | None = None,
) -> Assignment:
    """Rank and count the slots of each expert, and give each slot a row.

    Args:
        ids: the expert of each slot. The ids of one token must be distinct, as the result of a top-k selection is.
        num_experts: number of experts E.
        allow_unassigned: accept ids of E and above, which mark slots that go to no expert. These need not be distinct.
        mesh: devices over which the weights are split.
        by_expert: order rows by expert. By default False if there are at most E / 2 slots: then it is cheaper to copy
            the matrix of each slot (the implementation ``"gather"`` of :func:`grouped_matmul`).
    """
    if by_expert is None:
        by_expert = ids.size > num_experts // 2
    plain = partial(_assign, num_experts=num_experts, allow_unassigned=allow_unassigned, mesh=mesh, by_expert=by_expert)
    if by_expert and not allow_unassigned and ids.size and takes_triton(mesh) and not in_shard_map():

        def kernel(ids):
            return Assignment(ids, *rank_slots(ids, num_experts), mesh=mesh)

        # a program for the CPU may be traced on a machine with a GPU
        return lax.platform_dependent(ids, cuda=kernel, default=plain)
    return plain(ids)


# jitted, so that layers of equal shapes are traced once
@partial(jax.jit, static_argnames=("num_experts", "allow_unassigned", "mesh", "by_expert"))
def _assign(
    ids: Int[Array, "T K"], *, num_experts: int, allow_unassigned: bool, mesh: Mesh | None, by_expert: bool
) -> Assignment:
    chosen = (ids[..., None] == jnp.arange(num_experts)).sum(1, dtype=jnp.int32)
    up_to_token = jnp.cumsum(chosen, axis=0)
    valid_ids = jnp.minimum(ids, num_experts - 1) if allow_unassigned else ids
    rank = jnp.take_along_axis(up_to_token - chosen, valid_ids, axis=1)
    rank = jnp.where(ids < num_experts, rank, -1) if allow_unassigned else rank
    group_sizes = up_to_token[-1] if len(ids) else jnp.zeros(num_experts, jnp.int32)
    return Assignment.of(valid_ids, rank, group_sizes, by_expert=by_expert, complete=not allow_unassigned, mesh=mesh)


def sum_before(counts: Int[Array, " E"]) -> Int[Array, " E"]:
    """For each entry the sum of all entries before it (an exclusive cumulative sum)."""
    # a GPU computes a masked sum and its operand in one kernel, a cumulative sum in several
    index = jnp.arange(len(counts))
    return jnp.where(index < index[:, None], counts, 0).sum(1, dtype=counts.dtype)


def take(x: Array, index: Int[Array, "*s"]) -> Array:
    """``x[index]`` along the first axis, for indices that are within bounds."""
    # unsigned and promised to be within bounds: XLA adds no wrapping, clamping or masking to the copy of a row
    return x.at[index.astype(jnp.uint32)].get(mode="promise_in_bounds")
