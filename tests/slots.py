"""A grouped product of slots rather than rows: what the tests of the product, and of rules on it, are written in."""

from jaxtyping import Array, Float

from moejax.ops.experts import Assignment, collect, grouped_matmul, spread


def expert_matmul(
    x: Float[Array, "T KorOne D"], weight: Float[Array, "E *M D"], assignment: Assignment, *, implementation=None
) -> Float[Array, "T K *M"]:
    """``weight[ids[t, k]] @ x[t, k]``, zero for slots that go nowhere."""
    if implementation is not None:
        a, by_expert = assignment, implementation != "gather"
        assignment = Assignment.of(a.ids, a.rank, a.load, by_expert=by_expert, complete=a.complete, mesh=a.mesh)
    rows = grouped_matmul(spread(x, assignment), weight, assignment, implementation=implementation)
    return collect(rows, assignment)
