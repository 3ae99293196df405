"""Which rows go to which expert, computed once for the products of a layer."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Assignment(NamedTuple):
    """Routed slots by expert.

    Attributes:
        ids: the expert of each slot of each token.
        rank: how many earlier slots went to the same expert: the slot's row in that expert's buffer.
        load: slots of each expert.
    """

    ids: Int[Array, "T K"]
    rank: Int[Array, "T K"]
    load: Int[Array, " E"]


def assign(ids: Int[Array, "T K"], num_experts: int) -> Assignment:
    """Count and rank the slots of each expert. The ids of one token must be distinct, as a top-k selection's are."""
    chosen = (ids[..., None] == jnp.arange(num_experts)).sum(1, dtype=jnp.int32)
    earlier = jnp.cumsum(chosen, axis=0) - chosen
    return Assignment(ids, jnp.take_along_axis(earlier, ids, axis=1), chosen.sum(0))
