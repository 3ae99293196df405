"""The grouped product written by slots instead of rows, and some loads, for the tests of it and of rules on it."""

import numpy as np
from jaxtyping import Array, Float

from moejax.ops.experts import Assignment, grouped_matmul, permute, unpermute

LOADS = {"uneven": (11, 0, 37, 5), "one expert": (0, 0, 0, 18), "nobody": (0, 0, 0, 0)}
"""Slots of each of four experts."""


def rows_of(load: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The first row of each expert, and how many rows there are."""
    aligned = -(-np.array(load) // 8) * 8
    return (np.cumsum(aligned) - aligned).astype(np.int32), int(aligned.sum()) + 8


def expert_matmul(
    x: Float[Array, "T KorOne D"], weight: Float[Array, "E *M D"], assignment: Assignment, *, implementation=None
) -> Float[Array, "T K *M"]:
    """``weight[ids[t, k]] @ x[t, k]``, zero for slots that go nowhere."""
    if implementation is not None:
        a, by_expert = assignment, implementation != "gather"
        assignment = Assignment.of(a.ids, a.rank, a.load, by_expert=by_expert, complete=a.complete, mesh=a.mesh)
    rows = grouped_matmul(permute(x, assignment), weight, assignment, implementation=implementation)
    return unpermute(rows, assignment)
