"""The proportional rule of DLBacktrace (Sankarapu et al., arXiv 2411.12643), idealised, in closed form.

Every sum passes its relevance to its terms in proportion to their absolute values. The published programs deviate from
that (they pool over tokens, lack masks, and give routers a fixed part); these deviations are not reproduced.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.ops.cotangents import by_size, share_by_size
from moejax.rules.attnlrp import AttnLRP
from moejax.rules.gamma import sum_of_sizes
from moejax.rules.registry import register_rule
from moejax.rules.rule import AttentionProduct, MatMul, Slope, Total, Weight, over_slots

_FLAT = -6.0
"""Input of a SiLU below which the published rule takes it as saturated."""


@register_rule("proportional", variants={"proportional-masked": {"saturation": True}})
@dataclass(frozen=True)
class Proportional(AttnLRP):
    """Terms of every sum share its relevance by ``|z| / sum |z|``, and all relevance is conserved.

    This holds for linear maps, attention values, mixtures and residual sums. Norms, gated activations and clamps are as
    in :class:`AttnLRP`; the attention pattern and the routing weights are constants. Since ``|z|`` is never negative, a
    term that works against the target looks like one that works for it.

    Attributes:
        saturation: mask the side of an activation's input sum that does not change the activation. With ``P`` and
            ``N`` the sums of positive and negative contributions and ``f`` the activation, the positive side is masked
            below ``P - N = -6``; else the negative side where ``f(P - N)`` equals ``f(P)``; else the positive side
            where ``f(P - N)`` equals ``f(-N)``.
        tolerance: difference, relative to ``f(P - N)``, up to which two values count as equal. The published rule
            compares floats exactly, so its masks depend on the dtype.
    """

    saturation: bool = False
    tolerance: float = 1e-5

    @property
    def leaks(self) -> frozenset[str]:
        return frozenset({"bias"} | (super().leaks & {"router"}))

    def linear(
        self,
        matmul: MatMul,
        x: Float[Array, "*b D"],
        weight: Weight,
        bias: Float[Array, "*c"] | None = None,
        slope: Slope | None = None,
    ) -> Float[Array, "*c"]:
        y, size = super().linear(matmul, x, weight, bias), sum_of_sizes(matmul, x, weight, bias)
        if slope is None or not self.saturation:
            return by_size(y, size)
        of_gate = (jnp.arange(y.shape[-2]) == 0)[:, None]
        positive, negative = self._seen(slope, stop_gradient(y), stop_gradient(size))
        positive, negative = jnp.where(of_gate, positive, 1), jnp.where(of_gate, negative, 1)
        # unmasked, a contribution z has the size positive * max(z, 0) + negative * max(-z, 0)
        both, difference = 0.5 * (positive + negative), 0.5 * (positive - negative)
        return by_size(y, both.astype(y.dtype) * size + difference.astype(y.dtype) * y)

    def _seen(self, slope: Slope, y: Array, size: Array) -> tuple[Array, Array]:
        """Return masks of positive and of negative contributions to an activation's input: 1 where they count."""
        positive, negative = 0.5 * (size + y), 0.5 * (size - y)

        def f(gate):
            return gate * slope(gate)

        def equals(part):
            return jnp.abs(f(y) - f(part)) <= self.tolerance * jnp.abs(f(y))

        flat, both = y < _FLAT, (positive > 0) & (negative > 0)
        no_negative = ~flat & both & equals(positive)
        no_positive = flat | (both & ~no_negative & equals(-negative))
        return 1.0 - no_positive, 1.0 - no_negative

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G Cv"],
    ) -> Float[Array, "B T H Cv"]:
        """The pattern is a constant; the weighted values of a head share its relevance by size."""
        q, k = stop_gradient(q), stop_gradient(k)
        return by_size(product(q, k, v), product(q, k, jnp.abs(v)))

    def combine(self, terms: Float[Array, "*b K D"], total: Total = over_slots) -> Float[Array, "*b D"]:
        return share_by_size(terms, total)

    def add(self, stream: Float[Array, "*b D"], branch: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return by_size(stream + branch, jnp.abs(stream) + jnp.abs(branch))
