"""LRP-gamma on linear maps (Montavon et al., 2019, "Layer-Wise Relevance Propagation: An Overview", section 10.2.3)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.ops.cotangents import attach
from moejax.rules.attnlrp import AttnLRP
from moejax.rules.registry import register_rule
from moejax.rules.rule import MatMul, Slope, Weight


@register_rule("gamma")
@dataclass(frozen=True)
class Gamma(AttnLRP):
    """AttnLRP whose linear maps favour contributions that have the sign of the output.

    Let ``y = sum z``, and ``m`` the sum of the contributions ``z`` that have the sign of ``y``. A contribution receives
    ``(z + gamma z [z y > 0]) / (y + gamma m)`` of the relevance. This is the generalisation to inputs and outputs of
    both signs that LRP toolkits use; its denominator is never smaller than ``|y|``.

    Attributes:
        gamma: weight of the favoured contributions above 1; 0 is AttnLRP.
    """

    gamma: float = 0.25

    def linear(
        self,
        matmul: MatMul,
        x: Float[Array, "*b D"],
        weight: Weight,
        bias: Float[Array, "*c"] | None = None,
        slope: Slope | None = None,
    ) -> Float[Array, "*c"]:
        # |z| + sign(y) z is twice the part of z that has the sign of y
        y, size = super().linear(matmul, x, weight, bias), sum_of_sizes(matmul, x, weight, bias)
        half = 0.5 * self.gamma
        total = (1 + half) * jnp.abs(y) + half * size
        share = stop_gradient(jnp.where(total == 0, 0, jnp.abs(y) / jnp.where(total == 0, 1, total)))
        favoured = stop_gradient(jnp.sign(y)) * size
        return attach(stop_gradient(y), share * ((1 + half) * y + half * favoured))


def sum_of_sizes(
    matmul: MatMul, x: Float[Array, "*b D"], weight: Weight, bias: Float[Array, "*c"] | None
) -> Float[Array, "*c"]:
    """Sum the absolute values of each output's contributions: ``matmul(|x|, |weight|) + |bias|``."""
    size = matmul(jnp.abs(x), abs(weight))
    return size if bias is None else size + jnp.abs(bias)
