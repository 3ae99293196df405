"""What stands between the two products of an expert: a gated linear unit, or an activation."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float

from moejax.errors import ConfigError
from moejax.ops.activation import SLOPES, split_branches
from moejax.rules import Reading
from moejax.rules.rule import Slope


@dataclass(frozen=True)
class GLU:
    """``a(gate) * (up + offset)`` with ``a(g) = g * slope(alpha * g)``, on inputs limited by ``limit``.

    Attributes:
        activation: name of the slope in ``ops.activation.SLOPES``.
        limit: the gate is limited from above, the linear branch on both sides (GPT-OSS); none by default.
    """

    activation: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        _known(self.activation)

    @property
    def slope(self) -> Slope:
        """The activation over its input: ``slope(alpha * g)``."""
        slope = SLOPES[self.activation]
        return slope if self.alpha == 1 else lambda g: slope(self.alpha * g)

    branches: ClassVar[int] = 2
    """The first product has two outputs for a hidden unit: the gate's, then the linear branch's."""

    def __call__(self, x: Float[Array, "B *s 2 F"], reading: Reading) -> Float[Array, "B *s F"]:
        """The hidden units of an expert."""
        rule, (gate, up), limit = reading.rule, split_branches(x), self.limit
        if limit is not None and reading.is_booked("clamp"):
            limited = rule.limited(reading.ledger_in("clamp", gate), reading.ledger_in("clamp", up), limit)
            gate, up = (reading.ledger_out("clamp", branch) for branch in limited)
            limit = None
        return reading.book("activation", lambda g, u: rule.gated(self.slope, g, u, self.offset, limit), gate, up)


@dataclass(frozen=True)
class Activation:
    """``a(x)``, named as in ``ops.activation.SLOPES``; the hidden units of an expert without a gate."""

    activation: str = "gelu"

    branches: ClassVar[int] = 1
    """The first product has one output for a hidden unit."""

    def __post_init__(self) -> None:
        _known(self.activation)

    @property
    def slope(self) -> Slope:
        """The activation over its input."""
        return SLOPES[self.activation]

    def __call__(self, x: Float[Array, "B *s 1 F"], reading: Reading) -> Float[Array, "B *s F"]:
        """The hidden units of an expert."""
        return reading.book("activation", lambda x: reading.rule.activation(self.slope, x), x[..., 0, :])


HiddenActivation = GLU | Activation
"""From an expert's first product ``[.., branches, F]`` to its hidden units ``[.., F]``."""


def _known(activation: str) -> None:
    if activation not in SLOPES:
        raise ConfigError(f"hidden_act={activation!r} is not supported; supported are: {', '.join(SLOPES)}.")
