"""What a mixture asks of its experts, whatever they compute: the outputs of the routed slots, and their weighted sum.

Three things are passed in as functions here, each so that a step is written once:

- :func:`moejax.ops.experts.expert_parallel` is given the body of a step and runs it on one device with all experts, or
  on every device with its own; ``psum`` is the sum over these devices, or the identity.
- ``rule.combine`` is given the sum over slots, so that a rule may put something else in front of it or behind it.
- ``reading.book`` and ``reading.linear`` are given an operation, so that the ledger sees its inputs and outputs.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.layers.parts import Axes
from moejax.ops.experts import Assignment, Psum, expert_parallel, permute
from moejax.rules import Reading


class ExpertStack(nnx.Module):
    """Experts of one architecture. Every leaf has the expert as its first axis ``E``.

    A subclass computes :meth:`slots` and describes itself: :meth:`widths`, :attr:`hidden_dim`, :attr:`axes`.
    """

    leaks: ClassVar[frozenset[str]] = frozenset()
    """Names under which the ledger books what the experts do not conserve under any rule."""

    def widths(self, inputs: int) -> tuple[int, int]:
        """Widths of an expert's input ``D`` and output ``O``, where it is to take inputs of width ``inputs``."""
        raise NotImplementedError

    @property
    def hidden_dim(self) -> int:
        """Hidden units ``F`` of an expert, which the node ``neurons`` shows; zero if it has none to show."""
        return 0

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Logical axes of the leaves, by their paths within the stack."""
        raise NotImplementedError

    def slots(self, x: Float[Array, "B T One D"], assignment: Assignment, reading: Reading) -> Float[Array, "B T K O"]:
        """Outputs of the slots that are assigned to these experts; zero for all others."""
        raise NotImplementedError

    def summed(self, times: int) -> Any:
        """A dense layer ``(x, reading)`` that computes ``times`` the sum of all experts."""
        raise NotImplementedError

    @property
    def num_experts(self) -> int:
        """Number of experts ``E``."""
        return jax.tree.leaves(self)[0].shape[0]

    def only(self, which: slice) -> Self:
        """The stack of some of the experts."""
        return jax.tree.map(lambda leaf: leaf[which], self)

    def __call__(
        self, x: Float[Array, "B T One D"], assignment: Assignment, reading: Reading
    ) -> Float[Array, "B T K O"]:
        """The output of the expert of every routed slot; zero for unassigned slots."""

        def run(experts, own, psum, x, reading):
            return psum(experts.slots(x, own, reading))

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
            experts: ExpertStack,
            own: Assignment,
            psum: Psum,
            x: Array,
            weights: Array,
            ids: Array,
            reading: Reading,
        ) -> Array:
            return combine(experts.slots(x, own, reading), weights, ids, reading, psum=psum)

        if reading.touches("expert_outputs") or (self.hidden_dim and reading.needs_whole("neurons")):
            # an edit must see each slot's output whole and once, not on every device
            return combine(self(x, assignment, reading), weights, ids, reading)
        return expert_parallel(run, self, assignment, x, weights, ids, reading)


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


def rows_of(
    x: Float[Array, "B T KorOne D"], assignment: Assignment, reading: Reading, *, copied: bool = True
) -> tuple[Array, Reading]:
    """The experts' rows (``copied`` as for :func:`permute`), and the reading whose batch they are."""

    def by_row(slots):
        return permute(slots.reshape(-1, *slots.shape[2:]), assignment)

    batch, tokens = x.shape[:2]
    rows = permute(x.reshape(-1, *x.shape[2:]), assignment, copied=copied)
    return rows, reading.rearranged(by_row, (batch, tokens, assignment.ids.shape[1]))


def by_token(slots: Float[Array, "N K *M"], x: Float[Array, "B T KorOne D"]) -> Float[Array, "B T K *M"]:
    """The slots with the axes of sequences and tokens that ``x`` has."""
    return slots.reshape(*x.shape[:2], *slots.shape[1:])
