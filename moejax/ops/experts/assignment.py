"""Which rows go to which expert, computed once for the products of a layer."""

from dataclasses import dataclass, field
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from moejax.ops.device import in_shard_map, takes_triton
from moejax.ops.experts.places import begin, places, rows_for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Assignment:
    """Routed slots by expert.

    The products of a layer work on *rows*: the routed slots ordered by expert, each expert's from a multiple of
    eight on (``places.ALIGNED``), so that there are some rows more than slots. What stands in these reaches no slot.

    Attributes:
        ids: the expert of each slot of each token; any for a slot that goes nowhere.
        rank: how many earlier slots went to the same expert. Negative for a slot that goes nowhere: it has no row, and
            its product is zero.
        load: slots of each expert.
        first: the first row of each expert, where they are ordered by expert.
        place: the row of each slot; of one that goes nowhere, any.
        slot: the slot at each row, counted through ``[T K]``; 0 where there is none.
        by_expert: whether rows are ordered by expert (static); if not, as the slots are, which suits a few of them.
        complete: whether every slot goes somewhere (static).
        mesh: devices over which the weights are split (static); ``None`` where each has all of them.
    """

    ids: Int[Array, "T K"]
    rank: Int[Array, "T K"]
    load: Int[Array, " E"]
    first: Int[Array, " E"]
    place: Int[Array, "T K"]
    slot: Int[Array, " P"]
    by_expert: bool = field(default=True, metadata={"static": True})
    complete: bool = field(default=True, metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})

    @classmethod
    def of(
        cls,
        ids: Int[Array, "T K"],
        rank: Int[Array, "T K"],
        load: Int[Array, " E"],
        *,
        by_expert: bool,
        complete: bool,
        mesh: Mesh | None,
    ) -> Self:
        """The rows of ranked slots."""
        slots = jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape)
        first = begin(sum_before(load), jnp.arange(len(load), dtype=jnp.int32))
        if by_expert:
            rows = rows_for(ids.size, len(load))
            place = jnp.where(rank < 0, rows, first[ids] + rank)
            slot = jnp.zeros(rows, jnp.int32).at[place].set(slots, mode="drop", unique_indices=complete)
            place = jnp.minimum(place, rows - 1)
        else:
            place, slot = slots, slots.ravel()
        # otherwise XLA computes a row's index again for every number that is copied with it
        place, slot = jax.lax.optimization_barrier((place, slot))
        return cls(ids, rank, load, first, place, slot, by_expert=by_expert, complete=complete, mesh=mesh)

    def limited(self, capacity: int) -> Self:
        """The same with no more than ``capacity`` slots for an expert; later ones go nowhere."""
        rank = jnp.where(self.rank < capacity, self.rank, -1)
        load = jnp.minimum(self.load, capacity)
        return self.of(self.ids, rank, load, by_expert=self.by_expert, complete=False, mesh=self.mesh)

    @property
    def expert(self) -> Int[Array, " P"]:
        """The expert of each row; E where there is no slot."""
        expert = take(self.ids.ravel(), self.slot)
        if not self.by_expert:
            return jnp.where(self.rank.ravel() < 0, len(self.load), expert)
        rank = jnp.arange(len(self.slot), dtype=jnp.int32) - take(self.first, expert)
        held = (rank >= 0) & (rank < take(self.load, expert))
        return jax.lax.optimization_barrier(jnp.where(held, expert, len(self.load)))


def assign(
    ids: Int[Array, "T K"],
    num_experts: int,
    *,
    allow_unassigned: bool = False,
    mesh: Mesh | None = None,
    by_expert: bool | None = None,
) -> Assignment:
    """Count and rank the slots of each expert. The ids of one token must be distinct, as a top-k selection's are.

    Args:
        allow_unassigned: ids from ``num_experts`` on, which need not be distinct, are slots that go to no expert.
        by_expert: order rows by expert; by default unless there are no more slots than half the experts, for which it
            is cheaper to copy each slot's matrix.
    """
    if by_expert is None:
        by_expert = ids.size > num_experts // 2
    plain = partial(_assign, num_experts=num_experts, allow_unassigned=allow_unassigned, mesh=mesh, by_expert=by_expert)
    if by_expert and not allow_unassigned and ids.size and takes_triton(mesh) and not in_shard_map():
        kernel = lambda ids: Assignment(ids, *places(ids, num_experts), mesh=mesh)
        # a program for the CPU may be traced where there is a GPU
        return lax.platform_dependent(ids, cuda=kernel, default=plain)
    return plain(ids)


# layers of equal shapes share one tracing
@partial(jax.jit, static_argnames=("num_experts", "allow_unassigned", "mesh", "by_expert"))
def _assign(
    ids: Int[Array, "T K"], *, num_experts: int, allow_unassigned: bool, mesh: Mesh | None, by_expert: bool
) -> Assignment:
    chosen = (ids[..., None] == jnp.arange(num_experts)).sum(1, dtype=jnp.int32)
    until = jnp.cumsum(chosen, axis=0)
    inside = jnp.minimum(ids, num_experts - 1) if allow_unassigned else ids
    rank = jnp.take_along_axis(until - chosen, inside, axis=1)
    rank = jnp.where(ids < num_experts, rank, -1) if allow_unassigned else rank
    load = until[-1] if len(ids) else jnp.zeros(num_experts, jnp.int32)
    return Assignment.of(inside, rank, load, by_expert=by_expert, complete=not allow_unassigned, mesh=mesh)


def sum_before(counts: Int[Array, " N"]) -> Int[Array, " N"]:
    """The sum of the counts before each."""
    # on a GPU a masked sum is one kernel with what it sums, a cumulative sum is several
    index = jnp.arange(len(counts))
    return jnp.where(index < index[:, None], counts, 0).sum(1, dtype=counts.dtype)


def take(x: Array, index: Int[Array, "*s"]) -> Array:
    """``x[index]`` along the first axis."""
    # unsigned and promised: no wrapping, no clamping, no masking around a plain row copy
    return x.at[index.astype(jnp.uint32)].get(mode="promise_in_bounds")
