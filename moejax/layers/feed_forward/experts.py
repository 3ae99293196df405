"""The experts of a mixture as stacked arrays: their products for the routed slots, and the weighted sum of these."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.layers.feed_forward.activation import Unit
from moejax.ops.experts import Assignment, Psum, expert_parallel, grouped_matmul, permute, unpermute
from moejax.ops.mxfp4 import MXFP4
from moejax.rules import Reading
from moejax.rules.rule import Slope


@nnx.dataclass
class Experts(nnx.Module):
    """``output[e] unit(input[e] x)``; ``input`` has a matrix for each branch ``M`` of the unit, the gate's first."""

    input: Float[Array, "E M F D"] | MXFP4 = nnx.data()
    output: Float[Array, "E O F"] | MXFP4 = nnx.data()
    input_bias: Float[Array, "E M F"] | None = nnx.data()
    output_bias: Float[Array, "E O"] | None = nnx.data()
    unit: Unit = nnx.static()

    def __call__(
        self, x: Float[Array, "B T One D"], assignment: Assignment, reading: Reading
    ) -> Float[Array, "B T K O"]:
        """The output of the expert of every routed slot; zero for slots that go nowhere."""
        run = lambda experts, own, psum, x, reading: psum(experts._slots(x, own, reading))
        return expert_parallel(run, self, assignment, x, reading)

    def mixed(
        self,
        x: Float[Array, "B T One D"],
        assignment: Assignment,
        weights: Float[Array, "B T K"],
        ids: Int[Array, "B T K"],
        reading: Reading,
    ) -> Float[Array, "B T O"]:
        """:func:`combine` of the slots' outputs; where experts are split over devices, these send sums alone."""

        def run(
            experts: Experts,
            own: Assignment,
            psum: Psum,
            x: Array,
            weights: Array,
            ids: Array,
            reading: Reading,
        ) -> Array:
            return combine(experts._slots(x, own, reading), weights, ids, reading, psum=psum)

        return expert_parallel(run, self, assignment, x, weights, ids, reading)

    def _slots(self, x: Array, assignment: Assignment, reading: Reading) -> Float[Array, "B T K O"]:
        # packed matrices are multiplied with rows in another order: one copy for XLA
        rows, in_rows = _rows(x, assignment, reading, copied=not isinstance(self.input, MXFP4))
        branches = _linear(rows, self.input, self.input_bias, assignment, in_rows, self.unit.slope)
        hidden = in_rows.tap("neurons", self.unit(branches, in_rows))
        outputs = _linear(hidden, self.output, self.output_bias, assignment, in_rows)
        return _by_token(unpermute(outputs, assignment), x)


def expert_linear(
    x: Float[Array, "B T KorOne D"],
    weight: Float[Array, "E M D"],
    assignment: Assignment,
    reading: Reading,
) -> Float[Array, "B T K M"]:
    """``weight[e] x`` for the expert ``e`` of every routed slot; zero for slots that go nowhere."""

    def run(weight: Array, own: Assignment, psum: Psum, x: Array, reading: Reading) -> Array:
        rows, in_rows = _rows(x, own, reading)
        return psum(_by_token(unpermute(_linear(rows, weight, None, own, in_rows), own), x))

    return expert_parallel(run, weight, assignment, x, reading)


def combine(
    outputs: Float[Array, "B T K D"],
    weights: Float[Array, "B T K"],
    ids: Int[Array, "B T K"],
    reading: Reading,
    prefix: str = "",
    psum: Psum = lambda x: x,
) -> Float[Array, "B T D"]:
    """Gated weighted sum of the routed slots' outputs.

    Args:
        prefix: names the gates.
        psum: sum over devices, on each of which the slots of other devices' experts are zero.
    """
    weights, outputs = weights.astype(outputs.dtype), reading.ledger_in("router", outputs)
    mixed = reading.ledger_out("router", reading.rule.mix(weights, outputs))

    def over_all(terms: Float[Array, "B T K D"]) -> Float[Array, "B T D"]:
        # rounded once, however many devices there are
        wide = jnp.promote_types(terms.dtype, jnp.float32)
        return psum(terms.sum(-2, dtype=wide)).astype(terms.dtype)

    return reading.rule.combine(reading.gate_experts(mixed, ids, prefix), over_all)


def _linear(
    rows: Float[Array, "P D"],
    weight: Float[Array, "E *M D"] | MXFP4,
    bias: Float[Array, "E *M"] | None,
    assignment: Assignment,
    reading: Reading,
    slope: Slope | None = None,
) -> Float[Array, "P *M"]:
    """``weight[e] x + bias[e]`` for the expert ``e`` of every row; ``slope`` as in :meth:`Rule.linear`."""
    product = lambda x, weight: grouped_matmul(x, weight, assignment)
    if bias is not None:
        # what has no slot has no expert, whose bias it would move
        bias = bias.at[assignment.row_expert].get(mode="fill", fill_value=0).astype(rows.dtype)
    return reading.linear(product, rows, weight, bias, slope)


def _rows(
    x: Float[Array, "B T KorOne D"], assignment: Assignment, reading: Reading, *, copied: bool = True
) -> tuple[Array, Reading]:
    """The experts' rows (``copied`` as for :func:`permute`), and the reading whose batch they are."""
    by_row = lambda slots: permute(slots.reshape(-1, *slots.shape[2:]), assignment)
    batch, tokens = x.shape[:2]
    rows = permute(x.reshape(-1, *x.shape[2:]), assignment, copied=copied)
    return rows, reading.rearranged(by_row, (batch, tokens, assignment.ids.shape[1]))


def _by_token(slots: Float[Array, "N K *M"], x: Float[Array, "B T KorOne D"]) -> Float[Array, "B T K *M"]:
    return slots.reshape(*x.shape[:2], *slots.shape[1:])
