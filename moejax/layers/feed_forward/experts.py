"""The experts of a mixture as stacked arrays: their products for the routed slots, and the weighted sum of these.

Three things are passed in as functions here, each so that a step is written once:

- :func:`moejax.ops.experts.expert_parallel` is given the body of a step and runs it on one device with all experts, or
  on every device with its own; ``psum`` is the sum over these devices, or the identity.
- ``rule.combine`` is given the sum over slots, so that a rule may put something else in front of it or behind it.
- ``reading.book`` and ``reading.linear`` are given an operation, so that the ledger sees its inputs and outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers.feed_forward.activation import HiddenActivation
from moejax.layers.feed_forward.dense import DOWN_AXES, MLP, UP_AXES
from moejax.layers.linear import normal
from moejax.layers.parts import Axes
from moejax.ops.device import takes_triton
from moejax.ops.experts import (
    Assignment,
    Psum,
    capacities,
    expert_parallel,
    grouped_matmul,
    padded_rows,
    permute,
    supports_shapes,
    unpermute,
)
from moejax.ops.mxfp4 import MXFP4
from moejax.ops.packed import FORMATS, Packed, with_packed_axes
from moejax.rules import Reading
from moejax.rules.rule import Slope

EXPERT_AXES: Mapping[str, Axes] = {
    **with_packed_axes({"experts.gate_up": ("expert", *UP_AXES), "experts.down": ("expert", *DOWN_AXES)}),
    "experts.gate_up_bias": ("expert", None, "hidden"),
    "experts.down_bias": ("expert", None),
}
"""Logical axes of the leaves, by their paths in the mixture; of matrices in each format that they may have."""


@nnx.dataclass
class Experts(nnx.Module):
    """``down[e] unit(gate_up[e] x)`` for expert ``e``.

    Attributes:
        gate_up: a matrix for each expert and each branch ``M`` of the unit, the gate's first.
        down: from hidden units to the output.
        unit: from the first product to the hidden units.
    """

    gate_up: Float[Array, "E M F D"] | Packed = nnx.data()
    down: Float[Array, "E O F"] | Packed = nnx.data()
    gate_up_bias: Float[Array, "E M F"] | None = nnx.data()
    down_bias: Float[Array, "E O"] | None = nnx.data()
    unit: HiddenActivation = nnx.static()

    @classmethod
    def init(
        cls,
        keys: tuple[PRNGKeyArray, PRNGKeyArray],
        experts: int,
        hidden: int,
        dim: int,
        unit: HiddenActivation,
        *,
        bias: bool,
        packed: str,
        dtype: DTypeLike,
    ) -> Self:
        """Random matrices, one key for each stack, and zero biases; ``packed`` names the format of the matrices."""
        matrices = random_matrices(packed, dtype)
        return cls(
            matrices(keys[0], (experts, unit.branches, hidden, dim)),
            matrices(keys[1], (experts, dim, hidden)),
            jnp.zeros((experts, unit.branches, hidden), dtype) if bias else None,
            jnp.zeros((experts, dim), dtype) if bias else None,
            unit,
        )

    def __call__(
        self, x: Float[Array, "B T One D"], assignment: Assignment, reading: Reading
    ) -> Float[Array, "B T K O"]:
        """The output of the expert of every routed slot; zero for unassigned slots."""
        if reading.needs_whole("neurons"):
            return self._by_whole_neurons(x, assignment, reading)

        def run(experts, own, psum, x, reading):
            return psum(experts._slots(x, own, reading))

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

        if reading.touches("expert_outputs") or reading.needs_whole("neurons"):
            # an edit must see each slot's output whole and once, not on every device
            return combine(self(x, assignment, reading), weights, ids, reading)
        return expert_parallel(run, self, assignment, x, weights, ids, reading)

    def _slots(self, x: Array, assignment: Assignment, reading: Reading) -> Float[Array, "B T K O"]:
        hidden, in_rows = self._hidden(x, assignment, reading)
        outputs = _linear(in_rows.node("neurons", hidden), self.down, self.down_bias, assignment, in_rows)
        return _by_token(unpermute(outputs, assignment), x)

    def _hidden(self, x: Array, assignment: Assignment, reading: Reading) -> tuple[Float[Array, "P F"], Reading]:
        """Hidden units by row, and the reading of rows."""
        # kernels for MXFP4 take rows in another order: one copy for XLA
        rows, in_rows = _rows(x, assignment, reading, copied=not isinstance(self.gate_up, MXFP4))
        branches = _linear(rows, self.gate_up, self.gate_up_bias, assignment, in_rows, self.unit.slope)
        return self.unit(branches, in_rows), in_rows

    def _by_whole_neurons(self, x: Array, assignment: Assignment, reading: Reading) -> Float[Array, "B T K O"]:
        """:meth:`__call__` in two steps, between which each slot's hidden units are seen whole and in order."""

        def first(experts: Experts, own: Assignment, psum: Psum, x: Array, reading: Reading) -> Array:
            hidden, _ = experts._hidden(x, own, reading)
            return psum(_by_token(unpermute(hidden, own), x))

        def second(experts: Experts, own: Assignment, psum: Psum, hidden: Array, reading: Reading) -> Array:
            rows, in_rows = _rows(hidden, own, reading, copied=not isinstance(experts.down, MXFP4))
            outputs = _linear(rows, experts.down, experts.down_bias, own, in_rows)
            return psum(_by_token(unpermute(outputs, own), hidden))

        hidden = expert_parallel(first, self, assignment, x, reading)
        hidden = reading.node("neurons", hidden, assignment.ids.reshape(hidden.shape[:3]))
        return expert_parallel(second, self, assignment, hidden, reading)


def random_matrices(
    packed: str, dtype: DTypeLike
) -> Callable[[PRNGKeyArray, tuple[int, ...]], Float[Array, "..."] | Packed]:
    """Return a function that draws matrices of a key and a shape in the packed format, or in ``dtype`` if it is ""."""
    return FORMATS.find(packed).random if packed else lambda key, shape: normal(key, shape, dtype)


def expert_linear(
    x: Float[Array, "B T KorOne D"],
    weight: Float[Array, "E M D"] | Packed,
    assignment: Assignment,
    reading: Reading,
) -> Float[Array, "B T K M"]:
    """``weight[e] x`` for the expert ``e`` of every routed slot; zero for unassigned slots."""

    def run(weight: Array | Packed, own: Assignment, psum: Psum, x: Array, reading: Reading) -> Array:
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
    outputs = reading.node(f"{prefix}expert_outputs", outputs, ids)
    weights, outputs = weights.astype(outputs.dtype), reading.ledger_in("router", outputs)
    mixed = reading.ledger_out("router", reading.rule.mix(weights, outputs))

    def over_all(terms: Float[Array, "B T K D"]) -> Float[Array, "B T D"]:
        # rounded once, however many devices there are
        wide = jnp.promote_types(terms.dtype, jnp.float32)
        return psum(terms.sum(-2, dtype=wide)).astype(terms.dtype)

    return reading.rule.combine(reading.gate_experts(mixed, ids, prefix), over_all)


def _linear(
    rows: Float[Array, "P D"],
    weight: Float[Array, "E *M D"] | Packed,
    bias: Float[Array, "E *M"] | None,
    assignment: Assignment,
    reading: Reading,
    slope: Slope | None = None,
) -> Float[Array, "P *M"]:
    """``weight[e] x + bias[e]`` for the expert ``e`` of every row; ``slope`` as in :meth:`Rule.linear`."""

    def product(x, weight):
        return grouped_matmul(x, weight, assignment)

    if bias is not None:
        # what has no slot has no expert, whose bias it would move
        bias = bias.at[assignment.row_expert].get(mode="fill", fill_value=0).astype(rows.dtype)
    return reading.linear(product, rows, weight, bias, slope)


def _rows(
    x: Float[Array, "B T KorOne D"], assignment: Assignment, reading: Reading, *, copied: bool = True
) -> tuple[Array, Reading]:
    """The experts' rows (``copied`` as for :func:`permute`), and the reading whose batch they are."""

    def by_row(slots):
        return permute(slots.reshape(-1, *slots.shape[2:]), assignment)

    batch, tokens = x.shape[:2]
    rows = permute(x.reshape(-1, *x.shape[2:]), assignment, copied=copied)
    return rows, reading.rearranged(by_row, (batch, tokens, assignment.ids.shape[1]))


def _by_token(slots: Float[Array, "N K *M"], x: Float[Array, "B T KorOne D"]) -> Float[Array, "B T K *M"]:
    return slots.reshape(*x.shape[:2], *slots.shape[1:])


def buffer_rows(rows: int, slots: int, experts: int, itemsize: int, *widths: int) -> int:
    """Rows that the grouped products take beside one for each slot, for estimates of memory.

    These are buffers of equal size for every expert, or what aligns each expert's rows where the Hopper kernel runs.
    """
    if supports_shapes(itemsize, *widths):
        return padded_rows(rows * slots, experts) - rows * slots
    return experts * capacities(rows, slots, experts)[-1]


def unpacked_values(packed: str, experts: int, *matrices: tuple[int, int]) -> int:
    """Values of the experts' packed matrices that a layer unpacks, for estimates of memory; ``packed`` as in a config.

    They are those of the whole layer, or none where a kernel multiplies with packed matrices.
    """
    if not packed or (FORMATS.find(packed) is MXFP4 and takes_triton()):
        return 0
    return experts * sum(rows * width for rows, width in matrices)


def stack_experts(expert: MLP | Sequence[MLP], count: int, inputs: int, outputs: int) -> Experts:
    """``count`` experts: copies of one dense layer, or one from each of several.

    Raises:
        ConfigError: they do not have the layer's widths, one shape, or the right number.
    """
    several = [expert] * count if isinstance(expert, MLP) else list(expert)
    if len(several) != count:
        raise ConfigError(f"{len(several)} experts are given for a layer of {count}.")
    if not all(isinstance(e, MLP) for e in several):
        raise ConfigError(f"an expert is a moejax.layers.MLP, not a {type(several[0]).__name__}.")
    if len({e.config for e in several}) > 1:
        raise ConfigError("the experts that are given differ in their architecture; one stack needs one.")
    widths = several[0].gate_up.shape[-1], several[0].down.shape[0]
    if widths != (inputs, outputs):
        raise ConfigError(f"an expert from {widths[0]} to {widths[1]} is given for a layer from {inputs} to {outputs}.")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    unit = several[0].config.unit
    return Experts(stacked.gate_up, stacked.down, stacked.gate_up_bias, stacked.down_bias, unit)
