"""Gated linear unit between an expert's two products."""

import math
from dataclasses import dataclass

from jaxtyping import Array, Float

from moejax.errors import ConfigError
from moejax.ops.activation import SLOPES
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
        if self.activation not in SLOPES:
            raise ConfigError(f"hidden_act={self.activation!r} is not supported; supported are: {', '.join(SLOPES)}.")

    @property
    def slope(self) -> Slope:
        """The activation over its input: ``slope(alpha * g)``."""
        slope = SLOPES[self.activation]
        return slope if self.alpha == 1 else lambda g: slope(self.alpha * g)

    def __call__(
        self, gate: Float[Array, "B *s F"], up: Float[Array, "B *s F"], reading: Reading
    ) -> Float[Array, "B *s F"]:
        """The hidden units of an expert."""
        rule = reading.rule
        if (limit := self.limit) is not None:
            gate = reading.book("clamp", lambda g: rule.clamp(g, -math.inf, limit), gate)
            up = reading.book("clamp", lambda u: rule.clamp(u, -limit, limit), up)
        return reading.book("activation", lambda g, u: rule.gated(self.slope, g, u, self.offset), gate, up)
