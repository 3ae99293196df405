"""Helpers for tests of the grouped matmul, and of rules on it: the product by slots instead of rows, and some loads."""

import numpy as np
from jaxtyping import Array, Float

from moejax.ops.experts import Assignment, grouped_matmul, permute, unpermute

LOADS = {"uneven": (11, 0, 37, 5), "one expert": (0, 0, 0, 18), "nobody": (0, 0, 0, 0)}
"""Number of slots of each of four experts."""


def rows_of(load: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The first row of each expert, and the number of rows."""
    aligned = -(-np.array(load) // 8) * 8
    return (np.cumsum(aligned) - aligned).astype(np.int32), int(aligned.sum()) + 8


def expert_matmul(
    x: Float[Array, "T KorOne D"], weight: Float[Array, "E *M D"], assignment: Assignment, *, implementation=None
) -> Float[Array, "T K *M"]:
    """``weight[ids[t, k]] @ x[t, k]``, zero for unassigned slots."""
    if implementation is not None:
        a, by_expert = assignment, implementation != "gather"
        assignment = Assignment.of(
            a.ids, a.rank_in_expert, a.group_sizes, by_expert=by_expert, complete=a.complete, mesh=a.mesh
        )
    rows = grouped_matmul(permute(x, assignment), weight, assignment, implementation=implementation)
    return unpermute(rows, assignment)


def ids_with_load(tokens: int, slots: int, experts: int, load: int) -> np.ndarray:
    """Distinct experts for each token; expert 3 gets exactly ``load`` slots, the last one none if that is possible."""
    rng = np.random.default_rng(tokens * load)
    others = [e for e in range(experts) if e not in (3, experts - 1)]
    ids = np.empty((tokens, slots), np.int32)
    for t in range(tokens):
        ids[t] = np.roll(others, -t * slots)[:slots] if slots <= len(others) else np.arange(slots)
        if 3 not in ids[t] and t < load:
            ids[t, rng.integers(slots)] = 3
        rng.shuffle(ids[t])
    return rng.permutation(ids)
