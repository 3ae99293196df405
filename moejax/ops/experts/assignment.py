"""Which rows go to which expert, computed once for the products of a layer."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Assignment:
    """Routed slots by expert.

    Attributes:
        ids: the expert of each slot of each token.
        rank: how many earlier slots went to the same expert: the slot's row in that expert's buffer. Negative for a
            slot that goes nowhere: it takes no place, and its product is zero.
        load: slots of each expert.
        complete: whether every slot goes somewhere (static).
        mesh: devices over whose axis ``expert`` the experts are split (static); ``None`` where each has all of them.
    """

    ids: Int[Array, "T K"]
    rank: Int[Array, "T K"]
    load: Int[Array, " E"]
    complete: bool = field(default=True, metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})

    def limited(self, capacity: int) -> "Assignment":
        """The same with no more than ``capacity`` slots for an expert; later ones go nowhere."""
        rank = jnp.where(self.rank < capacity, self.rank, -1)
        return replace(self, rank=rank, load=jnp.minimum(self.load, capacity), complete=False)


def assign(ids: Int[Array, "T K"], num_experts: int, *, nowhere: bool = False, mesh: Mesh | None = None) -> Assignment:
    """Count and rank the slots of each expert. The ids of one token must be distinct, as a top-k selection's are.

    With ``nowhere``, ids from ``num_experts`` on, which need not be distinct, are slots that go to no expert.
    """
    chosen = (ids[..., None] == jnp.arange(num_experts)).sum(1, dtype=jnp.int32)
    earlier = jnp.cumsum(chosen, axis=0) - chosen
    inside = jnp.minimum(ids, num_experts - 1) if nowhere else ids
    rank = jnp.take_along_axis(earlier, inside, axis=1)
    rank = jnp.where(ids < num_experts, rank, -1) if nowhere else rank
    return Assignment(inside, rank, chosen.sum(0), complete=not nowhere, mesh=mesh)
