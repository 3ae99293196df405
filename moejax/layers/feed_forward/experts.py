"""Experts that are two products with a unit between them, as stacked matrices, and products by expert."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.feed_forward.activation import HiddenActivation
from moejax.layers.feed_forward.dense import DOWN_AXES, MLP, UP_AXES, MLPConfig
from moejax.layers.feed_forward.expert_stack import ExpertStack, by_token, rows_of
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
class Experts(ExpertStack):
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

    def widths(self, inputs: int) -> tuple[int, int]:
        """Widths of an expert's input ``D`` and output ``O``, whatever it is to take."""
        return self.gate_up.shape[-1], self.down.shape[1]

    @property
    def hidden_dim(self) -> int:
        """Hidden units ``F`` of an expert."""
        return self.down.shape[-1]

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Logical axes of the leaves, by their paths within the stack."""
        return {path.removeprefix("experts."): axes for path, axes in EXPERT_AXES.items()}

    def summed(self, times: int) -> MLP:
        """The dense layer that has ``times`` the hidden units of all experts side by side."""

        def side_by_side(leaf: Any) -> Any:
            return None if leaf is None else jnp.concatenate([*leaf] * times, axis=1)

        inputs, outputs = side_by_side(self.gate_up), side_by_side(self.down)
        bias = None if self.down_bias is None else times * self.down_bias.sum(0)
        config = MLPConfig(inputs.shape[-1], inputs.shape[1], self.unit, bias is not None)
        return MLP(inputs, outputs, side_by_side(self.gate_up_bias), bias, config)

    def __call__(
        self, x: Float[Array, "B T One D"], assignment: Assignment, reading: Reading
    ) -> Float[Array, "B T K O"]:
        """The output of the expert of every routed slot; zero for unassigned slots."""
        if reading.needs_whole("neurons"):
            return self._by_whole_neurons(x, assignment, reading)
        return super().__call__(x, assignment, reading)

    def slots(self, x: Float[Array, "B T One D"], assignment: Assignment, reading: Reading) -> Float[Array, "B T K O"]:
        """Outputs of the slots that are assigned to these experts; zero for all others."""
        hidden, in_rows = self._hidden(x, assignment, reading)
        outputs = _linear(in_rows.node("neurons", hidden), self.down, self.down_bias, assignment, in_rows)
        return by_token(unpermute(outputs, assignment), x)

    def _hidden(self, x: Array, assignment: Assignment, reading: Reading) -> tuple[Float[Array, "P F"], Reading]:
        """Hidden units by row, and the reading of rows."""
        # kernels for MXFP4 take rows in another order: one copy for XLA
        rows, in_rows = rows_of(x, assignment, reading, copied=not isinstance(self.gate_up, MXFP4))
        branches = _linear(rows, self.gate_up, self.gate_up_bias, assignment, in_rows, self.unit.slope)
        return self.unit(branches, in_rows), in_rows

    def _by_whole_neurons(self, x: Array, assignment: Assignment, reading: Reading) -> Float[Array, "B T K O"]:
        """:meth:`__call__` in two steps, between which each slot's hidden units are seen whole and in order."""

        def first(experts: Experts, own: Assignment, psum: Psum, x: Array, reading: Reading) -> Array:
            hidden, _ = experts._hidden(x, own, reading)
            return psum(by_token(unpermute(hidden, own), x))

        def second(experts: Experts, own: Assignment, psum: Psum, hidden: Array, reading: Reading) -> Array:
            rows, in_rows = rows_of(hidden, own, reading, copied=not isinstance(experts.down, MXFP4))
            outputs = _linear(rows, experts.down, experts.down_bias, own, in_rows)
            return psum(by_token(unpermute(outputs, own), hidden))

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
        rows, in_rows = rows_of(x, own, reading)
        return psum(by_token(unpermute(_linear(rows, weight, None, own, in_rows), own), x))

    return expert_parallel(run, weight, assignment, x, reading)


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
