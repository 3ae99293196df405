"""LRP-gamma on linear maps (Montavon et al., 2019, "Layer-Wise Relevance Propagation: An Overview", section 10.2.3)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.rules.attnlrp import AttnLRP
from moejax.rules.primitives import attach
from moejax.rules.rule import MatMul, Slope, Weight


@dataclass(frozen=True)
class Gamma(AttnLRP):
    """AttnLRP whose linear maps favour contributions of the output's own sign by ``1 + gamma``; zero is AttnLRP.

    For ``y = sum z`` with ``m`` the sum of the ``z`` that have the sign of ``y``, a contribution receives
    ``(z + gamma z [z y > 0]) / (y + gamma m)`` of the relevance: the generalisation to inputs and outputs of both signs
    that LRP toolkits use, whose denominator is never smaller than ``|y|``.
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
    """``matmul(|x|, |weight|) + |bias|``: for each output the sum of its contributions' absolute values."""
    size = matmul(jnp.abs(x), abs(weight))
    return size if bias is None else size + jnp.abs(bias)
