"""The experts of a mixture as stacked arrays: their products for the routed slots, and the weighted sum of these."""

from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.layers.glu import Unit
from moejax.ops.experts import Assignment, expert_matmul
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
        """The output of the expert of every routed slot."""
        branches = expert_linear(x, self.input, self.input_bias, assignment, reading, self.unit.slope)
        hidden = reading.tap("neurons", self.unit(branches, reading))
        return expert_linear(hidden, self.output, self.output_bias, assignment, reading)


def expert_linear(
    x: Float[Array, "B T KorOne D"],
    weight: Float[Array, "E *M D"] | MXFP4,
    bias: Float[Array, "E *M"] | None,
    assignment: Assignment,
    reading: Reading,
    slope: Slope | None = None,
) -> Float[Array, "B T K *M"]:
    """``weight[e] x + bias[e]`` for the expert ``e`` of every routed slot; ``slope`` as in :meth:`Rule.linear`."""
    batch, tokens = x.shape[:2]

    def product(x: Array, weight: Array | MXFP4) -> Array:
        rows = expert_matmul(x.reshape(batch * tokens, *x.shape[2:]), weight, assignment)
        return rows.reshape(batch, tokens, *rows.shape[1:])

    if bias is not None:
        chosen = bias[assignment.ids]
        bias = chosen.reshape(batch, tokens, *chosen.shape[1:]).astype(x.dtype)
    return reading.linear(product, x, weight, bias, slope)


def combine(
    outputs: Float[Array, "B T K D"],
    weights: Float[Array, "B T K"],
    ids: Int[Array, "B T K"],
    reading: Reading,
    prefix: str = "",
) -> Float[Array, "B T D"]:
    """Gated weighted sum of the routed slots' outputs; ``prefix`` names the gates."""
    weights, outputs = weights.astype(outputs.dtype), reading.enter("router", outputs)
    mixed = reading.leave("router", reading.rule.mix(weights, outputs))
    return reading.rule.combine(reading.gate_experts(mixed, ids, prefix))
