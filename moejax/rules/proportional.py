"""The proportional rule of DLBacktrace (Sankarapu et al., arXiv 2411.12643), idealised, in closed form.

Every sum hands its relevance to its terms in proportion to their absolute values. What the published programs do beside
or instead of that (pooling over tokens, missing masks, fixed shares for routers) is not reproduced.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from moejax.rules.attnlrp import AttnLRP
from moejax.rules.gamma import sum_of_sizes
from moejax.rules.primitives import by_size, share_by_size
from moejax.rules.rule import AttentionProduct, MatMul, Slope, Total, Weight, over_slots

_FLAT = -6.0
"""Where the published rule takes a SiLU as saturated."""


@dataclass(frozen=True)
class Proportional(AttnLRP):
    """Linear maps, attention's values, mixtures and residual sums share by ``|z| / sum |z|``; everything conserves.

    Norms, gated activations and clamps are as in :class:`AttnLRP`; the attention pattern and the routing weights are
    constants. Since shares are never negative, a term that works against the target cannot be told from one that
    works for it.

    Attributes:
        saturation: mask the side of a gate's sum that its activation does not see. With ``P`` and ``N`` the sums of
            positive and negative contributions and ``f`` the activation: the positive side below ``P - N = -6``; else
            the negative side where ``f(P - N)`` equals ``f(P)``, else the positive side where it equals ``f(-N)``.
        tolerance: how close, relative to ``f(P - N)``, counts as equal. The published rule compares floats exactly,
            so its masks depend on the dtype.
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
        # of a contribution z the seen side is (positive max(z, 0) + negative max(-z, 0)) in size
        both, difference = 0.5 * (positive + negative), 0.5 * (positive - negative)
        return by_size(y, both.astype(y.dtype) * size + difference.astype(y.dtype) * y)

    def _seen(self, slope: Slope, y: Array, size: Array) -> tuple[Array, Array]:
        """1 where the positive, and where the negative contributions to a gate count; 0 elsewhere."""
        positive, negative = 0.5 * (size + y), 0.5 * (size - y)
        f = lambda gate: gate * slope(gate)
        equals = lambda part: jnp.abs(f(y) - f(part)) <= self.tolerance * jnp.abs(f(y))
        flat, both = y < _FLAT, (positive > 0) & (negative > 0)
        no_negative = ~flat & both & equals(positive)
        no_positive = flat | (both & ~no_negative & equals(-negative))
        return 1.0 - no_positive, 1.0 - no_negative

    def attention(
        self,
        product: AttentionProduct,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S G C"],
        v: Float[Array, "B S G C"],
    ) -> Float[Array, "B T H C"]:
        """The pattern is a constant; what a head adds up is shared among the values by size."""
        q, k = stop_gradient(q), stop_gradient(k)
        return by_size(product(q, k, v), product(q, k, jnp.abs(v)))

    def combine(self, terms: Float[Array, "*b K D"], total: Total = over_slots) -> Float[Array, "*b D"]:
        return share_by_size(terms, total)

    def add(self, stream: Float[Array, "*b D"], branch: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return by_size(stream + branch, jnp.abs(stream) + jnp.abs(branch))
