"""A rule that the package does not have: calculus, but for norms, whose statistic is a constant."""

from dataclasses import dataclass

from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.rules import Plain
from moejax.rules.registry import register_rule


@register_rule("frozen-norm")
@dataclass(frozen=True)
class FrozenNorm(Plain):
    """Gradient times input with frozen norms."""

    @property
    def leaks(self) -> frozenset[str]:
        return super().leaks - {"norm"}

    def norm(self, x: Float[Array, "*b D"], inverse_rms: Float[Array, "*b 1"]) -> Float[Array, "*b D"]:
        """The statistic is a constant (AttnLRP, proposition 3.4)."""
        return x * stop_gradient(inverse_rms)
